"""The forward scan in Triton: one pass over time, or chunks of time in parallel (local pass, combine, replay).

Chunking: a chunk maps the state before it to the state after it by an affine map `decay · h + local`. A local pass
computes decay and local per chunk from a zero start, `combine_chunks_kernel` chains them, and the full pass then starts
every chunk from its true state. It pays the exponentials twice, for shapes whose batch × d_inner does not fill the GPU.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import (
    NEVER,
    advance,
    channel_rows,
    count_before,
    load_A2,
    load_channels,
    load_masked,
    load_tile,
    position_or_never,
    program_place,
    sigmoid,
    step_size,
    store_state,
    touch_weights,
    use_touched,
    weight_rows,
)


@triton.jit
@no_type_check
def _load_rows(
    x_rows, delta_rows, z_rows, z, t, stop, there, POS: tl.constexpr, MASK_D: tl.constexpr, UNROLL: tl.constexpr
):
    """x, delta and z at UNROLL positions from t on, as a flat tuple; zeros from stop on."""
    x_at = x_rows + t * POS[0]
    delta_at = delta_rows + t * POS[1]
    z_at = z_rows + t * POS[2]
    rows = ()
    for u in tl.static_range(UNROLL):
        mask = t + u < stop
        if MASK_D:
            mask = there & mask
        rows = rows + (tl.load(x_at + u * POS[0], mask=mask, other=0.0),)
        rows = rows + (tl.load(delta_at + u * POS[1], mask=mask, other=0.0),)
        if z is None:
            rows = rows + (0.0,)
        else:
            rows = rows + (tl.load(z_at + u * POS[2], mask=mask, other=0.0),)
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
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    SEGMENT: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group.

    start: the state before every chunk [batch, n_chunks, d_inner, d_state], or None for zeros. edits: (positions,
    stride of batch, n_edits); keep, add: [batch, n_edits, d_inner, d_state]. recorded: (positions, n_recorded).
    states: where recorded states go; boundaries: [batch, n_boundaries, d_inner, d_state], where the state before every
    SEGMENT-th position goes; final_state: [batch, 1, d_inner, d_state]. POS: the strides of the position axes of x,
    delta, z, B, C and y, as constants so that neighbouring positions cost no address arithmetic.
    """
    batch, chunk, _block, group, d, there = program_place(n_blocks, n_chunks, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_A2(A, d, n, tile_there, zero)
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
        state = load_tile(start, batch, chunk, d, n, tile_there, zero)

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    edit = tl.zeros((), tl.int32)
    next_edit = tl.full((), NEVER, tl.int64)
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], first)
        next_edit = position_or_never(edits_here, edit, edits[2])
    record = tl.zeros((), tl.int32)
    next_record = tl.full((), NEVER, tl.int64)
    if recorded is not None:
        record = count_before(recorded[0], recorded[1], first)
        next_record = position_or_never(recorded[0], record, recorded[1])

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
        B_at = B_rows + t * POS[3]
        C_at = C_rows + t * POS[4]
        y_at = y_rows + t * POS[5]
        if SEGMENT:
            if t % SEGMENT == 0:
                store_state(boundaries, batch, t // SEGMENT, d, n, state, tile_there)
        if (t + UNROLL <= stop) & (t + UNROLL <= next_edit) & (t + UNROLL <= next_record):
            out = ()
            for u in tl.static_range(UNROLL):
                B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                C_row = load_masked(C_at + u * POS[4], n_there, MASK_N).to(tl.float32)
                step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                state = advance(state, A2, step, rows[3 * u], B_row)
                if RECORD_ALL:
                    store_state(states, batch, t + u, d, n, state, tile_there)
                out = out + (_read_out(state, rows[3 * u], rows[3 * u + 2], z, C_row, D_row),)
            # Stored together, because no load moves ahead of a store that it might depend on.
            for u in tl.static_range(UNROLL):
                tl.store(y_at + u * POS[5], out[u], mask=there)
        else:
            # A block with an edit, a recorded position or the end of the chunk: look at every position.
            for u in tl.static_range(UNROLL):
                if t + u < stop:
                    B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                    C_row = load_masked(C_at + u * POS[4], n_there, MASK_N).to(tl.float32)
                    step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
                    state = advance(state, A2, step, rows[3 * u], B_row)
                    if edits is not None:
                        if t + u == next_edit:
                            state = state * load_tile(keep, batch, edit, d, n, tile_there, zero)
                            state += load_tile(add, batch, edit, d, n, tile_there, zero)
                            edit += 1
                            next_edit = position_or_never(edits_here, edit, edits[2])
                    if RECORD_ALL:
                        store_state(states, batch, t + u, d, n, state, tile_there)
                    if recorded is not None:
                        if t + u == next_record:
                            store_state(states, batch, record, d, n, state, tile_there)
                            record += 1
                            next_record = position_or_never(recorded[0], record, recorded[1])
                    y_row = _read_out(state, rows[3 * u], rows[3 * u + 2], z, C_row, D_row)
                    tl.store(y_at + u * POS[5], y_row, mask=there)
    if chunk == n_chunks - 1:
        store_state(final_state, batch, 0, d, n, state, tile_there)
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
    SOFTPLUS: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """What every chunk does to the state before it: decays · h + locals_, both [batch, n_chunks, d_inner, d_state].

    The last chunk's effect is not needed and its place stays unwritten.
    """
    batch, chunk, _block, group, d, there = program_place(n_blocks, n_chunks - 1, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_A2(A, d, n, tile_there, zero)
    bias_row = load_channels(bias, d, there)
    x_rows = channel_rows(x, batch, d)
    delta_rows = channel_rows(delta, batch, d)
    B_rows = weight_rows(B, batch, group, n)
    state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    elapsed = tl.zeros((BLOCK_D,), tl.float32)  # without edits the decay of all steps is exp(their sum · A)
    decay = tl.full((BLOCK_N, BLOCK_D), 1.0, tl.float32)

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    edit = tl.zeros((), tl.int32)
    next_edit = tl.full((), NEVER, tl.int64)
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], first)
        next_edit = position_or_never(edits_here, edit, edits[2])

    upcoming = _load_rows(x_rows, delta_rows, x_rows, None, first, stop, there, POS, MASK_D, UNROLL)
    B_ahead = touch_weights(B, batch, group, d_state, first, stop, POS[3], UNROLL)
    touched = tl.zeros((32,), tl.float32)
    for t in tl.range(first, stop, UNROLL):
        rows = upcoming
        upcoming = _load_rows(x_rows, delta_rows, x_rows, None, t + UNROLL, stop, there, POS, MASK_D, UNROLL)
        touched += B_ahead
        B_ahead = touch_weights(B, batch, group, d_state, t + UNROLL, stop, POS[3], UNROLL)
        B_at = B_rows + t * POS[3]
        for u in tl.static_range(UNROLL):
            B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
            step = step_size(rows[3 * u + 1], bias_row, SOFTPLUS)
            state = advance(state, A2, step, rows[3 * u], B_row)
            if edits is None:
                elapsed += step
            else:
                decay *= tl.exp2(step[None, :] * A2)
                if t + u == next_edit:
                    kept = load_tile(keep, batch, edit, d, n, tile_there, zero)
                    state = state * kept + load_tile(add, batch, edit, d, n, tile_there, zero)
                    decay *= kept
                    edit += 1
                    next_edit = position_or_never(edits_here, edit, edits[2])
    if edits is None:
        decay = tl.exp2(elapsed[None, :] * A2)
    store_state(decays, batch, chunk, d, n, decay, tile_there)
    store_state(locals_, batch, chunk, d, n, state, tile_there)
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
