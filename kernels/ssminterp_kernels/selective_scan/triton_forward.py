"""The forward scan in Gluon: one pass over time, or chunks of time in parallel (summaries, combined, then replayed).

Chunking: a chunk maps the state before it to the state after it by an affine map `decay · h + local`. A local pass
computes decay and local per chunk from a zero start (`triton_chunks`), these are chained, and the full pass then starts
every chunk from its true state. It pays the exponentials twice, for shapes whose batch × d_inner does not fill the GPU.

Positions are taken in tiles of UNROLL, which the compiler overlaps as long as no branch is between them. Edits and
recorded positions therefore happen between tiles: where less than a tile is left before the next of them, or before the
end, positions are taken one by one, and the next tile begins after it.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_backward_loads import count_before, load_row, load_tile
from ssminterp_kernels.selective_scan.triton_chunks import announce, summarise, wait_for
from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    full_tile,
    jit,
    position_numbers,
    put,
    put_column,
    row_state_numbers,
    shared_rows,
    state_numbers,
    take_column,
    take_row,
    take_tile,
)
from ssminterp_kernels.selective_scan.triton_math import LOG2E, sigmoid, step_size, store_masked
from ssminterp_kernels.selective_scan.triton_rows import (
    load_block,
    load_edit,
    load_per_channel,
    load_rows,
    load_weight_row,
    load_weights,
    position,
    store_spread,
)


@jit
@no_type_check
def read_out(state, x, z_row, z, C, D_row):
    """y at one position, float32 [BLOCK_D]."""
    y = tl.sum(state * C, 1) + D_row * x.to(tl.float32)
    if z is not None:
        gate = z_row.to(tl.float32)
        y *= gate * sigmoid(gate)
    return y


@jit
@no_type_check
def _edited(state, edit_here, place, t, NUMBERS: tl.constexpr, SPARE: tl.constexpr):
    """The state after position t, edited if the next edit is there.

    edit_here: the edits, keep and add, the next edit's position and number and, with SPARE, its values.
    """
    if edit_here[0] is not None:
        if edit_here[3] == t:
            if SPARE:
                state = state * edit_here[5] + edit_here[6]
            else:
                batch, d0, _d_end, lane, there, _group, n, n_there = place
                tile_there = there[:, None] & n_there[None, :]
                n_edits = edit_here[0][2]
                edit = edit_here[4]
                kept = load_edit(edit_here[1], batch, edit, n_edits, d0 + lane, n, tile_there, NUMBERS[0])
                added = load_edit(edit_here[2], batch, edit, n_edits, d0 + lane, n, tile_there, NUMBERS[1])
                state = state * kept + added
    return state


@jit
@no_type_check
def _tile(
    state,
    A2,
    bias_row,
    D_row,
    rows,
    weights,
    z,
    y,
    place,
    edit_here,
    t,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPARE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    MASK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state after UNROLL positions from t on, of which the last may be edited.

    rows: x, delta and z there; weights: where B and C lie in shared memory; place: batch, d0, d_end, lane,
    there and more.
    """
    batch, d0, lane, there = place[0], place[1], place[3], place[4]
    y_place = y[0] + (batch * y[1] + d0 * y[3] + t.to(tl.int64) * POS[5])
    out = ()
    for u in tl.static_range(UNROLL):
        step = step_size(rows[1][u], bias_row, SOFTPLUS)
        dx = step * rows[0][u].to(tl.float32)
        state = tl.exp2(step[:, None] * A2) * state + dx[:, None] * take_row(weights[0], u, TILE)
        if u == UNROLL - 1:
            state = _edited(state, edit_here, place, t + u, NUMBERS, SPARE)
        out = out + (read_out(state, rows[0][u], rows[2][u], z, take_row(weights[1], u, TILE), D_row),)
    # Stored together, because no load moves ahead of a store that it might depend on.
    for u in tl.static_range(UNROLL):
        store_masked(y_place + (lane * y[3] + u * POS[5]), out[u], there, MASK_D)
    return state


@jit
@no_type_check
def _recorded_tile(
    state,
    A2,
    bias_across,
    D_across,
    blocks,
    weights,
    shared,
    z,
    targets,
    place,
    across,
    edit_here,
    t,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPARE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_tile` where every state is written: the lanes of a channel share what is computed once for it.

    blocks: x, delta and z [pos, channel]; shared: places of such blocks; across: what numbers them: positions,
    channels, which are there.
    """
    y, states, d_state = targets
    batch, d0, d_end = place[0], place[1], place[2]
    u_across, lane_across, across_there = across
    steps, inputs, sums = shared
    x_block = blocks[0][0].to(tl.float32)
    step_block = step_size(blocks[1][0], bias_across[None, :], SOFTPLUS)
    put(steps, step_block)
    put(inputs, step_block * x_block)
    for u in tl.static_range(UNROLL):
        state = tl.exp2(take_column(steps, u, TILE) * A2) * state
        state += take_column(inputs, u, TILE) * take_row(weights[0], u, TILE)
        if u == UNROLL - 1:
            state = _edited(state, edit_here, place, t + u, NUMBERS, SPARE)
        store_spread(states, batch, t + u, d0, d_end, d_state, state, SPREAD)
        put_column(sums, u, tl.sum(state * take_row(weights[1], u, TILE), 1)[:, None], UNROLL)
    out = take_tile(sums, BLOCK) + D_across[None, :] * x_block
    if z is not None:
        gate = blocks[2][0].to(tl.float32)
        out *= gate * sigmoid(gate)
    y_place = y[0] + (batch * y[1] + d0 * y[3] + t.to(tl.int64) * POS[5])
    tl.store(y_place + (u_across[:, None] * POS[5] + lane_across[None, :] * y[3]), out, mask=across_there)
    return state


@jit
@no_type_check
def _whole_tile(
    state,
    A2,
    bias,
    D,
    rows,
    weights,
    shared,
    z,
    targets,
    place,
    across,
    edit_here,
    t,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPARE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_tile` or `_recorded_tile`."""
    if RECORD_ALL:
        state = _recorded_tile(
            *(state, A2, bias[1], D[1], rows, weights, shared, z, targets, place, across, edit_here, t),
            *(POS, NUMBERS, SPARE, SOFTPLUS, UNROLL, TILE, SPREAD, BLOCK),
        )
    else:
        state = _tile(
            *(state, A2, bias[0], D[0], rows, weights, z, targets[0], place, edit_here, t),
            *(POS, NUMBERS, SPARE, SOFTPLUS, MASK_D, UNROLL, TILE),
        )
    return state


@jit
@no_type_check
def _one_by_one(
    state,
    A2,
    bias_row,
    D_row,
    sources,
    targets,
    place,
    edit_here,
    t,
    end,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPARE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """As `_tile` for positions t..end, each read when its turn comes; sources: x, delta, z, B and C."""
    batch, d0, d_end, lane, there, group, n, n_there = place
    x, delta, z, B, C = sources
    y, states, d_state = targets
    y_place = y[0] + (batch * y[1] + d0 * y[3])
    for i in range(t, end):
        x_row = load_rows(x, batch, d0, lane, i, there, POS[0], MASK_D, 1)[0]
        delta_row = load_rows(delta, batch, d0, lane, i, there, POS[1], MASK_D, 1)[0]
        z_row = load_rows(z, batch, d0, lane, i, there, POS[2], MASK_D, 1)[0]
        B_row = load_weight_row(B, batch, group, i, n, n_there, POS[3], MASK_N)
        C_row = load_weight_row(C, batch, group, i, n, n_there, POS[4], MASK_N)
        step = step_size(delta_row, bias_row, SOFTPLUS)
        state = tl.exp2(step[:, None] * A2) * state + (step * x_row.to(tl.float32))[:, None] * B_row
        state = _edited(state, edit_here, place, i, NUMBERS, SPARE)
        if RECORD_ALL:
            store_spread(states, batch, i, d0, d_end, d_state, state, SPREAD)
        y_row = read_out(state, x_row, z_row, z, C_row, D_row)
        store_masked(y_place + tl.cast(i, tl.int64) * POS[5] + lane * y[3], y_row, there, MASK_D)
    return state


@jit
@no_type_check
def _rows_ahead(
    x,
    delta,
    z,
    batch,
    place,
    across,
    t,
    POS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """x, delta and z at UNROLL positions from t on, as `_tile` or `_recorded_tile` takes them."""
    d0, lane, there = place[1], place[3], place[4]
    if RECORD_ALL:
        u, lane, there = across
        x_rows = load_block(x, batch, d0, t, u, lane, there, POS[0])
        delta_rows = load_block(delta, batch, d0, t, u, lane, there, POS[1])
        z_rows = load_block(z, batch, d0, t, u, lane, there, POS[2])
    else:
        x_rows = load_rows(x, batch, d0, lane, t, there, POS[0], MASK_D, UNROLL)
        delta_rows = load_rows(delta, batch, d0, lane, t, there, POS[1], MASK_D, UNROLL)
        z_rows = load_rows(z, batch, d0, lane, t, there, POS[2], MASK_D, UNROLL)
    return x_rows, delta_rows, z_rows


@jit(
    do_not_specialize=["batches", "elements", "length", "chunk_length", "n_chunks", "n_blocks", "group_size"],
)
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
    ends,
    flags,
    batches,
    elements,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTIAL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One program: BLOCK_D channels of one group, one chunk, `elements` batch elements one after the other.

    start: the state before every chunk [batch, n_chunks, d_inner, d_state], or None for zeros. edits: (positions,
    stride of batch, n_edits); keep, add: [batch, n_edits, d_inner, d_state]. recorded: (positions, n_recorded).
    states: where recorded states go; boundaries: [batch, n_boundaries, d_inner, d_state], where the state before every
    SEGMENT-th position goes; final_state: [batch, 1, d_inner, d_state]. POS: the strides of the position axes of x,
    delta, z, B, C and y, as constants so that neighbouring positions cost no address arithmetic. NUMBERS: whether keep
    and add are one number per edit. PARTIAL: some tile may hold less than UNROLL positions. SPARE: there are registers
    to spare, for the values of the next edit. TILE and what follows: see `Layouts`.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    per_chunk = n_blocks * ((batches + elements - 1) // elements)
    chunk = pid // per_chunk
    batch = ((pid % per_chunk) // n_blocks * elements).to(tl.int64)
    last_batch = tl.minimum(batch + elements, batches) - 1
    blocks_per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group = block // blocks_per_group
    lane = channel_numbers(BLOCK_D, TILE)
    d0 = (group * group_size + (block % blocks_per_group) * BLOCK_D).to(tl.int64)
    d_end = (group + 1) * group_size
    d = d0 + lane
    there = d < d_end
    n = state_numbers(BLOCK_N, TILE)
    n_there = n < d_state
    tile_there = there[:, None] & n_there[None, :]
    A2 = tl.load(A[0] + (d[:, None] * A[1] + n[None, :] * A[2]), mask=tile_there, other=0.0).to(tl.float32) * LOG2E
    bias_row = load_row(bias, d, there, BLOCK_D, TILE)
    D_row = load_row(D, d, there, BLOCK_D, TILE)
    row_u = position_numbers(UNROLL, ROWS)
    row_n = row_state_numbers(BLOCK_N, ROWS)
    row_there = (row_n < d_state)[None, :] & (row_u >= 0)[:, None]
    B_shared = shared_rows(UNROLL, BLOCK_N, PLAIN)
    C_shared = shared_rows(UNROLL, BLOCK_N, PLAIN)
    across = (lane, lane, there)
    bias_across = bias_row
    D_across = D_row
    shared = (B_shared, C_shared)
    if RECORD_ALL:
        lane_across = row_state_numbers(BLOCK_D, BLOCK)
        u_across = position_numbers(UNROLL, BLOCK)
        there_across = d0 + lane_across < d_end
        across = (u_across, lane_across, there_across[None, :] & (u_across >= 0)[:, None])
        bias_across = load_per_channel(bias, d0 + lane_across, there_across)
        D_across = load_per_channel(D, d0 + lane_across, there_across)
        shared = (
            shared_rows(UNROLL, BLOCK_D, PLAIN),
            shared_rows(UNROLL, BLOCK_D, PLAIN),
            shared_rows(UNROLL, BLOCK_D, PLAIN),
        )
    if start is None:
        state = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    else:
        state = load_tile(start, batch, chunk, d, n, tile_there)

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    if ends is not None:
        if chunk > 0:
            if chunk < n_chunks - 1:
                place = (batch, group, d0, lane, d, there, n, n_there, row_u, row_n, row_there)
                decay, local = summarise(
                    *(x, delta, B, edits, keep, add, A2, bias_row, B_shared, place, first, stop),
                    *(POS, NUMBERS, SOFTPLUS, MASK_D, MASK_N, BLOCK_N, BLOCK_D, UNROLL, TILE),
                )
                wait_for(flags + (pid - per_chunk))
                state = load_tile(ends, batch, chunk - 1, d, n, tile_there)
                store_spread(ends, batch, chunk, d0, d_end, d_state, decay * state + local, SPREAD)
                announce(flags + pid)
            else:
                wait_for(flags + (pid - per_chunk))
                state = load_tile(ends, batch, chunk - 1, d, n, tile_there)
    EVENTS: tl.constexpr = edits is not None or recorded is not None
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], first)
        next_edit = position(edits_here, edit, edits[2])
        after_edit = position(edits_here, edit + 1, edits[2])
        if SPARE:
            kept = load_edit(keep, batch, edit, edits[2], d, n, tile_there, NUMBERS[0])
            added = load_edit(add, batch, edit, edits[2], d, n, tile_there, NUMBERS[1])
    if recorded is not None:
        first_record = count_before(recorded[0], recorded[1], first)
        record = first_record
        next_record = position(recorded[0], record, recorded[1])
        after_record = position(recorded[0], record + 1, recorded[1])

    place = (batch, d0, d_end, lane, there, group, n, n_there)
    t = first
    window = tl.minimum(t, stop - UNROLL)  # rows are loaded from here on: near the end, rows that nobody uses
    ahead = _rows_ahead(x, delta, z, batch, place, across, window, POS, RECORD_ALL, MASK_D, UNROLL)
    B_next = load_weights(B, batch, group, window, row_u, row_n, row_there, POS[3], MASK_N)
    C_next = load_weights(C, batch, group, window, row_u, row_n, row_there, POS[4], MASK_N)
    while batch <= last_batch:
        # A tile of UNROLL positions from t on, or the fewer that are left before the next event or the end.
        end = tl.minimum(t + UNROLL, stop)
        if SEGMENT:
            if t % SEGMENT == 0:
                store_spread(boundaries, batch, t // SEGMENT, d0, d_end, d_state, state, SPREAD)
            if EVENTS:
                end = tl.minimum(end, (t // SEGMENT + 1) * SEGMENT)
        if edits is not None:
            end = tl.minimum(end, next_edit + 1)
        if recorded is not None:
            end = tl.minimum(end, next_record + 1)
        ends_element = end == stop
        rows = ahead
        put(B_shared, B_next.to(tl.float32))
        put(C_shared, C_next.to(tl.float32))
        # The next tile's rows are under way while this one is computed, also across batch elements.
        t_next = tl.where(ends_element, first, end)
        batch_next = tl.minimum(batch + ends_element.to(tl.int64), last_batch)
        window_next = tl.minimum(t_next, stop - UNROLL)
        ahead = _rows_ahead(x, delta, z, batch_next, place, across, window_next, POS, RECORD_ALL, MASK_D, UNROLL)
        B_next = load_weights(B, batch_next, group, window_next, row_u, row_n, row_there, POS[3], MASK_N)
        C_next = load_weights(C, batch_next, group, window_next, row_u, row_n, row_there, POS[4], MASK_N)
        place = (batch, d0, d_end, lane, there, group, n, n_there)
        sources = (x, delta, z, B, C)
        targets = (y, states, d_state)
        edit_here = (edits, keep, add)
        if edits is not None:
            if SPARE:
                edit_here = (edits, keep, add, next_edit, edit, kept, added)
            else:
                edit_here = (edits, keep, add, next_edit, edit)
        if PARTIAL:
            if end - t == UNROLL:
                state = _whole_tile(
                    *(state, A2, (bias_row, bias_across), (D_row, D_across), rows, (B_shared, C_shared), shared, z),
                    *(targets, place, across, edit_here, t, POS, NUMBERS, SPARE, SOFTPLUS, RECORD_ALL, MASK_D, UNROLL),
                    *(TILE, SPREAD, BLOCK),
                )
            else:
                state = _one_by_one(
                    *(state, A2, bias_row, D_row, sources, targets, place, edit_here, t, end),
                    *(POS, NUMBERS, SPARE, SOFTPLUS, RECORD_ALL, MASK_D, MASK_N, SPREAD),
                )
        else:
            state = _whole_tile(
                *(state, A2, (bias_row, bias_across), (D_row, D_across), rows, (B_shared, C_shared), shared, z),
                *(targets, place, across, edit_here, t, POS, NUMBERS, SPARE, SOFTPLUS, RECORD_ALL, MASK_D, UNROLL),
                *(TILE, SPREAD, BLOCK),
            )
        if edits is not None:
            if end == next_edit + 1:
                edit += 1
                next_edit = after_edit
                after_edit = position(edits_here, edit + 1, edits[2])
                if SPARE:
                    kept = load_edit(keep, batch, edit, edits[2], d, n, tile_there, NUMBERS[0])
                    added = load_edit(add, batch, edit, edits[2], d, n, tile_there, NUMBERS[1])
        if recorded is not None:
            if end == next_record + 1:
                store_spread(states, batch, record, d0, d_end, d_state, state, SPREAD)
                record += 1
                next_record = after_record
                after_record = position(recorded[0], record + 1, recorded[1])
        t = t_next
        if ends_element:
            if chunk == n_chunks - 1:
                store_spread(final_state, batch, 0, d0, d_end, d_state, state, SPREAD)
            if ends is not None:
                if chunk == 0:
                    store_spread(ends, batch, 0, d0, d_end, d_state, state, SPREAD)
                    announce(flags + pid)
            batch += 1
            if batch <= last_batch:
                if start is None:
                    state = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
                else:
                    state = load_tile(start, batch, chunk, d, n, tile_there)
                if edits is not None:
                    edits_here = edits[0] + batch * edits[1]
                    edit = count_before(edits_here, edits[2], first)
                    next_edit = position(edits_here, edit, edits[2])
                    after_edit = position(edits_here, edit + 1, edits[2])
                    if SPARE:
                        kept = load_edit(keep, batch, edit, edits[2], d, n, tile_there, NUMBERS[0])
                        added = load_edit(add, batch, edit, edits[2], d, n, tile_there, NUMBERS[1])
                if recorded is not None:
                    record = first_record
                    next_record = position(recorded[0], record, recorded[1])
                    after_record = position(recorded[0], record + 1, recorded[1])
