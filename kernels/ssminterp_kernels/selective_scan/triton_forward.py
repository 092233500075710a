"""The forward scan in Triton: one pass over time, or chunks of time in parallel (local pass, combine, replay).

Chunking: a chunk maps the state before it to the state after it by an affine map `decay · h + local`. A local pass
computes decay and local per chunk from a zero start, `combine_chunks_kernel` chains them, and the full pass then starts
every chunk from its true state. It pays the exponentials twice, for shapes whose batch × d_inner does not fill the GPU.

Positions are taken in blocks of UNROLL, which the compiler overlaps as long as no branch is between them. A block with
one edit or one recorded position stays without branches: every position selects. Only one with more goes position by
position.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import (
    LOG2E,
    NUMBER,
    WIDE,
    advance,
    channel_rows,
    count_before,
    item,
    load_A2,
    load_channels,
    load_masked,
    load_tile,
    load_wide,
    position_or_never,
    program_place,
    sigmoid,
    step_size,
    store_masked,
    store_state,
    store_wide,
    touch_weights,
    use_touched,
    weight_rows,
)

FAR = tl.constexpr((1 << 31) - 1)  # a position that no block reaches


@triton.jit
@no_type_check
def _load_rows(
    x_rows, delta_rows, z_rows, z, t, stop, there, POS: tl.constexpr, MASK_D: tl.constexpr, UNROLL: tl.constexpr
):
    """x, delta and z at UNROLL positions from t on, as a flat tuple; those before stop if t is too late for that.

    So the last rows may be such that no one uses, but none needs a mask, whose zeros take a tenth of the time.
    """
    at = tl.maximum(tl.minimum(t, stop - UNROLL), 0).to(tl.int64)
    x_at = x_rows + at * POS[0]
    delta_at = delta_rows + at * POS[1]
    z_at = z_rows + at * POS[2]
    rows = ()
    for u in tl.static_range(UNROLL):
        rows = rows + (load_masked(x_at + u * POS[0], there, MASK_D),)
        rows = rows + (load_masked(delta_at + u * POS[1], there, MASK_D),)
        if z is None:
            rows = rows + (0.0,)
        else:
            rows = rows + (load_masked(z_at + u * POS[2], there, MASK_D),)
    return rows


@triton.jit
@no_type_check
def _read_out(state, x, z_row, z, C, D_row):
    """y at one position, float32 [BLOCK_D]."""
    y = tl.sum(state * C[:, None], 0) + D_row * x.to(tl.float32)
    if z is not None:
        gate = z_row.to(tl.float32)
        y *= gate * sigmoid(gate)
    return y


@triton.jit
@no_type_check
def _position(positions, i, n_positions):
    """The i-th of the positions, or one that no block reaches; in 32 bits, which are one register."""
    return tl.minimum(position_or_never(positions, i, n_positions), FAR).to(tl.int32)


@triton.jit
@no_type_check
def _load_A2(A, d, n, there, tile_there, zero, KIND: tl.constexpr):
    """A · log2(e), float32 [BLOCK_N, BLOCK_D]."""
    if KIND == WIDE:
        A2 = load_wide(A[0], d, A[1], there, n.shape[0]) * LOG2E
    else:
        A2 = load_A2(A, d, n, tile_there, zero)
    return A2


@triton.jit
@no_type_check
def _load_state(tensor, batch, i, d, n, there, tile_there, zero, KIND: tl.constexpr):
    """Item i of a tensor [batch, i, d_inner, d_state] as float32 [BLOCK_N, BLOCK_D], or one number that fills it."""
    if KIND == NUMBER:
        loaded = tl.load(item(tensor, batch, i)).to(tl.float32)
    elif KIND == WIDE:
        loaded = load_wide(item(tensor, batch, i), d, tensor[3], there, n.shape[0])
    else:
        loaded = load_tile(tensor, batch, i, d, n, tile_there, zero)
    return loaded


@triton.jit
@no_type_check
def _load_edit(keep, add, batch, edit, n_edits, d, n, there, tile_there, zero, KINDS: tl.constexpr):
    """keep and add of an edit, of the last one if there is no such edit."""
    edit = tl.minimum(edit, n_edits - 1)
    kept = _load_state(keep, batch, edit, d, n, there, tile_there, zero, KINDS[1])
    return kept, _load_state(add, batch, edit, d, n, there, tile_there, zero, KINDS[2])


@triton.jit
@no_type_check
def _store_state(tensor, batch, i, d, n, state, there, tile_there, KIND: tl.constexpr):
    """Write item i of a tensor [batch, i, d_inner, d_state]."""
    if KIND == WIDE:
        store_wide(item(tensor, batch, i), d, tensor[3], state, there)
    else:
        store_state(tensor, batch, i, d, n, state, tile_there)


@triton.jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size", "zero"])
@no_type_check
def scan_forward_kernel(
    x,
    delta,
    z,
    A,
    B,
    C,
    D,
    bias,
    start,
    edits,
    keep,
    add,
    recorded,
    y,
    states,
    boundaries,
    final_state,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    zero,
    POS: tl.constexpr,
    KINDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    SEGMENT: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group.

    start: the state before every chunk [batch, n_chunks, d_inner, d_state], or None for zeros. edits: (positions,
    stride of batch, n_edits); keep, add: [batch, n_edits, d_inner, d_state]. recorded: (positions, n_recorded).
    states: where recorded states go; boundaries: [batch, n_boundaries, d_inner, d_state], where the state before every
    SEGMENT-th position goes; final_state: [batch, 1, d_inner, d_state]. POS: the strides of the position axes of x,
    delta, z, B, C and y, as constants so that neighbouring positions cost no address arithmetic. KINDS: how A, keep,
    add and start are loaded and states and the other two stored. SPARE: there are registers to spare, for the values of
    the next edit and for a recorded state until its block ends.
    """
    batch, chunk, _block, group, d, there = program_place(n_blocks, n_chunks, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = _load_A2(A, d, n, there, tile_there, zero, KINDS[0])
    bias_row = load_channels(bias, d, there)
    D_row = load_channels(D, d, there)
    x_rows = channel_rows(x, batch, d)
    delta_rows = channel_rows(delta, batch, d)
    z_rows = x_rows if z is None else channel_rows(z, batch, d)
    y_rows = channel_rows(y, batch, d)
    B_rows = weight_rows(B, batch, group, n)
    C_rows = weight_rows(C, batch, group, n)
    if start is None:
        state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        state = _load_state(start, batch, chunk, d, n, there, tile_there, zero, KINDS[3])

    first = (chunk * chunk_length).to(tl.int32)
    stop = tl.minimum(first + chunk_length, length).to(tl.int32)
    EVENTS: tl.constexpr = edits is not None or recorded is not None
    next_edit = tl.full((), FAR, tl.int32)
    after_edit = next_edit
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], first)
        next_edit = _position(edits_here, edit, edits[2])
        after_edit = _position(edits_here, edit + 1, edits[2])
        if SPARE:
            held = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)
    next_record = tl.full((), FAR, tl.int32)
    after_record = next_record
    if recorded is not None:
        record = count_before(recorded[0], recorded[1], first)
        next_record = _position(recorded[0], record, recorded[1])
        after_record = _position(recorded[0], record + 1, recorded[1])

    upcoming = _load_rows(x_rows, delta_rows, z_rows, z, first, stop, there, POS, MASK_D, UNROLL)
    B_ahead = touch_weights(B, batch, group, d_state, first, stop, POS[3], UNROLL)
    C_ahead = touch_weights(C, batch, group, d_state, first, stop, POS[4], UNROLL)
    touched = tl.zeros((32,), tl.float32)
    for t in tl.range(first, stop, UNROLL):
        rows = upcoming
        upcoming = _load_rows(x_rows, delta_rows, z_rows, z, t + UNROLL, stop, there, POS, MASK_D, UNROLL)
        touched += B_ahead + C_ahead
        B_ahead = touch_weights(B, batch, group, d_state, t + UNROLL, stop, POS[3], UNROLL)
        C_ahead = touch_weights(C, batch, group, d_state, t + UNROLL, stop, POS[4], UNROLL)
        B_at = B_rows + tl.cast(t, tl.int64) * POS[3]
        C_at = C_rows + tl.cast(t, tl.int64) * POS[4]
        y_at = y_rows + tl.cast(t, tl.int64) * POS[5]
        if SEGMENT:
            if t % SEGMENT == 0:
                _store_state(boundaries, batch, t // SEGMENT, d, n, state, there, tile_there, KINDS[5])
        whole = t + UNROLL <= stop
        one_event = False
        if EVENTS:
            one_event = whole & (t + UNROLL <= after_edit) & (t + UNROLL <= after_record)
            whole = whole & (t + UNROLL <= next_edit) & (t + UNROLL <= next_record)
        if whole:
            out = ()
            for u in tl.static_range(UNROLL):
                B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                C_row = load_masked(C_at + u * POS[4], n_there, MASK_N).to(tl.float32)
                step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                state = advance(state, A2, step, rows[3 * u], B_row)
                if RECORD_ALL:
                    _store_state(states, batch, t + u, d, n, state, there, tile_there, KINDS[4])
                out = out + (_read_out(state, rows[3 * u], rows[3 * u + 2], z, C_row, D_row),)
            # Stored together, because no load moves ahead of a store that it might depend on.
            for u in tl.static_range(UNROLL):
                store_masked(y_at + u * POS[5], out[u], there, MASK_D)
        elif one_event:
            # One edit, one recorded position or one of each: the same without branches.
            if edits is not None:
                edit_at = next_edit - t
                if SPARE:
                    edit_here = held
                    later = edit + (next_edit < t + UNROLL).to(tl.int32)
                    held = _load_edit(keep, add, batch, later, edits[2], d, n, there, tile_there, zero, KINDS)
                else:
                    edit_here = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)
            if recorded is not None:
                record_at = next_record - t
                later_record = _position(recorded[0], record + 2, recorded[1])
                kept = state
            out = ()
            for u in tl.static_range(UNROLL):
                B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                C_row = load_masked(C_at + u * POS[4], n_there, MASK_N).to(tl.float32)
                step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                state = advance(state, A2, step, rows[3 * u], B_row)
                if edits is not None:
                    state = tl.where(edit_at == u, state * edit_here[0] + edit_here[1], state)
                if RECORD_ALL:
                    _store_state(states, batch, t + u, d, n, state, there, tile_there, KINDS[4])
                if recorded is not None:
                    if SPARE:
                        kept = tl.where(record_at == u, state, kept)
                    else:
                        here = record_at == u
                        _store_state(states, batch, record, d, n, state, there & here, tile_there & here, KINDS[4])
                out = out + (_read_out(state, rows[3 * u], rows[3 * u + 2], z, C_row, D_row),)
            for u in tl.static_range(UNROLL):
                store_masked(y_at + u * POS[5], out[u], there, MASK_D)
            if recorded is not None:
                if next_record < t + UNROLL:
                    if SPARE:
                        _store_state(states, batch, record, d, n, kept, there, tile_there, KINDS[4])
                    record += 1
                    next_record = after_record
                    after_record = later_record
            if edits is not None:
                if next_edit < t + UNROLL:
                    edit += 1
                    next_edit = after_edit
                    after_edit = _position(edits_here, edit + 1, edits[2])
        else:
            # Several of them, or the end of the chunk: position by position.
            for i in tl.range(t, tl.minimum(t + UNROLL, stop)):
                at = tl.cast(i, tl.int64)
                x_row = load_masked(x_rows + at * POS[0], there, MASK_D)
                delta_row = load_masked(delta_rows + at * POS[1], there, MASK_D)
                z_row = load_masked(z_rows + at * POS[2], there, MASK_D) if z is not None else x_row
                B_row = load_masked(B_rows + at * POS[3], n_there, MASK_N).to(tl.float32)
                C_row = load_masked(C_rows + at * POS[4], n_there, MASK_N).to(tl.float32)
                step = step_size(delta_row, bias_row, SOFTPLUS)
                state = advance(state, A2, step, x_row, B_row)
                if edits is not None:
                    if i == next_edit:
                        if SPARE:
                            edit_here = held
                        else:
                            edit_here = _load_edit(
                                keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS
                            )
                        state = state * edit_here[0] + edit_here[1]
                        edit += 1
                        next_edit = after_edit
                        after_edit = _position(edits_here, edit + 1, edits[2])
                        if SPARE:
                            held = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)
                if RECORD_ALL:
                    _store_state(states, batch, i, d, n, state, there, tile_there, KINDS[4])
                if recorded is not None:
                    if i == next_record:
                        _store_state(states, batch, record, d, n, state, there, tile_there, KINDS[4])
                        record += 1
                        next_record = after_record
                        after_record = _position(recorded[0], record + 1, recorded[1])
                y_row = _read_out(state, x_row, z_row, z, C_row, D_row)
                store_masked(y_rows + at * POS[5], y_row, there, MASK_D)
    if chunk == n_chunks - 1:
        _store_state(final_state, batch, 0, d, n, state, there, tile_there, KINDS[5])
    use_touched(touched, final_state, zero)


@triton.jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size", "zero"])
@no_type_check
def chunk_summary_kernel(
    x,
    delta,
    A,
    B,
    bias,
    edits,
    keep,
    add,
    decays,
    locals_,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    zero,
    POS: tl.constexpr,
    KINDS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """What every chunk does to the state before it: decays · h + locals_, both [batch, n_chunks, d_inner, d_state].

    The last chunk's effect is not needed and its place stays unwritten; so all chunks here are whole, and a chunk is a
    multiple of UNROLL positions. Between edits the decay of all steps is exp(their sum · A).
    """
    batch, chunk, _block, group, d, there = program_place(n_blocks, n_chunks - 1, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = _load_A2(A, d, n, there, tile_there, zero, KINDS[0])
    bias_row = load_channels(bias, d, there)
    x_rows = channel_rows(x, batch, d)
    delta_rows = channel_rows(delta, batch, d)
    B_rows = weight_rows(B, batch, group, n)
    state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    elapsed = tl.zeros((BLOCK_D,), tl.float32)  # since the last edit
    decay = tl.full((BLOCK_N, BLOCK_D), 1.0, tl.float32)  # up to the last edit

    first = (chunk * chunk_length).to(tl.int32)
    stop = tl.minimum(first + chunk_length, length).to(tl.int32)
    next_edit = tl.full((), FAR, tl.int32)
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], first)
        next_edit = _position(edits_here, edit, edits[2])
        after_edit = _position(edits_here, edit + 1, edits[2])
        if SPARE:
            held = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)

    upcoming = _load_rows(x_rows, delta_rows, x_rows, None, first, stop, there, POS, MASK_D, UNROLL)
    B_ahead = touch_weights(B, batch, group, d_state, first, stop, POS[3], UNROLL)
    touched = tl.zeros((32,), tl.float32)
    for t in tl.range(first, stop, UNROLL):
        rows = upcoming
        upcoming = _load_rows(x_rows, delta_rows, x_rows, None, t + UNROLL, stop, there, POS, MASK_D, UNROLL)
        touched += B_ahead
        B_ahead = touch_weights(B, batch, group, d_state, t + UNROLL, stop, POS[3], UNROLL)
        B_at = B_rows + tl.cast(t, tl.int64) * POS[3]
        if t + UNROLL <= next_edit:
            for u in tl.static_range(UNROLL):
                B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                state = advance(state, A2, step, rows[3 * u], B_row)
                elapsed += step
        elif edits is not None:
            if t + UNROLL <= after_edit:
                edit_at = next_edit - t
                if SPARE:
                    edit_here = held
                    held = _load_edit(keep, add, batch, edit + 1, edits[2], d, n, there, tile_there, zero, KINDS)
                else:
                    edit_here = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)
                before_edit = elapsed
                for u in tl.static_range(UNROLL):
                    B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                    step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                    state = advance(state, A2, step, rows[3 * u], B_row)
                    elapsed += step
                    state = tl.where(edit_at == u, state * edit_here[0] + edit_here[1], state)
                    before_edit = tl.where(edit_at == u, elapsed, before_edit)
                    elapsed = tl.where(edit_at == u, 0.0, elapsed)
                decay *= tl.exp2(before_edit[None, :] * A2) * edit_here[0]
                edit += 1
                next_edit = after_edit
                after_edit = _position(edits_here, edit + 1, edits[2])
            else:
                for i in tl.range(t, t + UNROLL):
                    at = tl.cast(i, tl.int64)
                    x_row = load_masked(x_rows + at * POS[0], there, MASK_D)
                    delta_row = load_masked(delta_rows + at * POS[1], there, MASK_D)
                    B_row = load_masked(B_rows + at * POS[3], n_there, MASK_N).to(tl.float32)
                    step = step_size(delta_row, bias_row, SOFTPLUS)
                    state = advance(state, A2, step, x_row, B_row)
                    elapsed += step
                    if i == next_edit:
                        if SPARE:
                            edit_here = held
                        else:
                            edit_here = _load_edit(
                                keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS
                            )
                        state = state * edit_here[0] + edit_here[1]
                        decay *= tl.exp2(elapsed[None, :] * A2) * edit_here[0]
                        elapsed = tl.zeros((BLOCK_D,), tl.float32)
                        edit += 1
                        next_edit = after_edit
                        after_edit = _position(edits_here, edit + 1, edits[2])
                        if SPARE:
                            held = _load_edit(keep, add, batch, edit, edits[2], d, n, there, tile_there, zero, KINDS)
    decay *= tl.exp2(elapsed[None, :] * A2)
    _store_state(decays, batch, chunk, d, n, decay, there, tile_there, KINDS[3])
    _store_state(locals_, batch, chunk, d, n, state, there, tile_there, KINDS[3])
    use_touched(touched, locals_, zero)


@triton.jit(do_not_specialize=["n_chunks"])
@no_type_check
def combine_chunks_kernel(
    decays, locals_, start, n_chunks, d_state, whole, BACKWARD: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """Overwrite locals_ [batch, n_chunks, d_inner × d_state] by the state with which every chunk begins.

    start: the state before the first chunk, as (pointer, strides of batch, d_inner, d_state), or None for zeros.
    BACKWARD runs from the last chunk to the first, for adjoints. AHEAD chunks are loaded before any is written, because
    no load moves ahead of a store that it might depend on.
    """
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < whole
    if start is None:
        state = tl.zeros((BLOCK,), tl.float32)
    else:
        d = (i // d_state).to(tl.int64)
        n = i % d_state
        state = tl.load(start[0] + batch * start[1] + d * start[2] + n * start[3], mask=inside, other=0.0).to(
            tl.float32
        )
    # The effect of the last chunk was not computed: its place only takes a state.
    for k in tl.range(0, n_chunks - 1, AHEAD):
        effects = ()
        for u in tl.static_range(AHEAD):
            chunk = n_chunks - 1 - k - u if BACKWARD else k + u
            at = (batch * n_chunks + chunk) * whole + i
            there = inside & (k + u < n_chunks - 1)
            effects = effects + (tl.load(decays + at, mask=there, other=0.0),)
            effects = effects + (tl.load(locals_ + at, mask=there, other=0.0),)
        for u in tl.static_range(AHEAD):
            chunk = n_chunks - 1 - k - u if BACKWARD else k + u
            at = (batch * n_chunks + chunk) * whole + i
            there = inside & (k + u < n_chunks - 1)
            tl.store(locals_ + at, state, mask=there)
            state = tl.where(there, effects[2 * u] * state + effects[2 * u + 1], state)
    last = 0 if BACKWARD else n_chunks - 1
    tl.store(locals_ + (batch * n_chunks + last) * whole + i, state, mask=inside)
