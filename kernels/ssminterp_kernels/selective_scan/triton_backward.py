"""The backward scan in Triton, by recomputation from the states before segments of time.

With g_t = dLoss/dstate_t (the adjoint), the scan runs backwards in time:

    g_t = A_bar_{t+1} · g_{t+1} + C_t · dy_t + (gradient of the recorded state at t)
    dC_t = Σ_d dy_t state_t,  dB_t = Σ_d g_t Δ_t x_t,  dx_t = Δ_t Σ_n g_t B_t,
    dΔ_t = Σ_n g_t A_bar_t state_{t-1} A + x_t Σ_n g_t B_t,  dA = Σ_t g_t A_bar_t state_{t-1} Δ_t

A segment is replayed forward once, keeping states before its inner blocks of BLOCK_T positions (see
`triton_backward_states`); then the blocks are taken last to first: what lies between the last state that was kept and
the block is replayed again; then the block's states are replayed into shared memory and walked backwards. Sums over
d_inner (dB, dC) are left as partial sums of two programs each, those over batch and time (dA, dD, dbias) of one. They
are added up in a fixed order, so that the result does not depend on scheduling.

What there is per channel (x, delta, z, dy and their gradients) lies a channel a lane. Of a tile [channel, d_state] a
thread holds 4 states of 4 channels: it adds up a quarter of each sum over d_state, and 4 channels of each sum over
channels, in its registers, and reads a quarter of each row of B and C. The rest of a sum is read across shared memory,
through which numbers per channel also pass from lanes to tiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_backward_states import (
    boundary_state,
    keep_state,
    kept_state,
    last_kept,
    replayed,
    replayed_block,
)
from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    full_row,
    full_tile,
    jit,
    part_over_channels,
    position_numbers,
    put,
    put_over_states,
    put_two_over_channels,
    row_state_numbers,
    shared_rows,
    shared_sums,
    shared_tiles,
    shared_values,
    state_numbers,
    sum_numbers,
    summed_state_numbers,
    take_over_channels,
    take_over_states,
    take_row,
    take_tile,
    take_value,
)
from ssminterp_kernels.selective_scan.triton_loads import (
    count_before,
    load_row,
    load_rows,
    load_tile,
    load_weights,
    position_or_never,
    start_of,
    tile_at,
)
from ssminterp_kernels.selective_scan.triton_math import (
    LN2,
    LOG2E,
    sigmoid,
    step_size,
    store_masked,
)


@jit(do_not_specialize=["n_batch", "elements", "length", "chunk_length", "n_chunks", "n_blocks", "group_size"])
@no_type_check
def scan_backward_kernel(
    x,
    delta,
    z,
    A,
    B,
    C,
    D,
    bias,
    boundaries,
    edits,
    keep,
    add,
    recorded,
    dy,
    dstates,
    future,
    dx,
    ddelta,
    dz,
    dweights,
    dchannels,
    dkeep,
    dadd,
    dstart,
    kept,
    n_batch,
    elements,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_inner,
    d_state,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HEAD: tl.constexpr,
    SEGMENT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SEVERAL: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One program: one chunk of one batch element, or all of `elements` of them, and BLOCK_D channels of one group.

    boundaries: the states before segments [batch, n_segments, d_inner, d_state], None for zeros. Segments are the first
    HEAD positions of a chunk, then SEGMENT at a time.
    future: dLoss/d(state after each chunk) from what comes later [batch, n_chunks, d_inner, d_state].
    dy: [batch, pos, d_inner]; dstates: [batch, n_recorded, d_inner, d_state] or None.
    dweights: zeros [2 (B, C), batch, pos, pairs, d_state]; dchannels: [programs, 2 (D, bias), d_inner]; dkeep, dadd:
    [batch, n_edits, d_inner, d_state]; dstart: [batch, 1, d_inner, d_state]. kept: [PLANES, programs, d_inner, d_state]
    (programs of a block of channels); of the first plane, which may be `future` too, dA is made. KEPT: how many of how
    many states before inner blocks are kept. OUTPUTS: in how many of dx,
    ddelta and dz states may lie, which then have the same strides; else 0. POS: the strides of the position axes of
    x, delta, z, B, C, dy, dx, ddelta, dz and dweights. MASK: some block of BLOCK_T positions or BLOCK_D channels is not
    full; MASK_N: d_state is less than BLOCK_N. PARTS: see `Parts`; TILE and what follows: see `Layouts`.

    Positions are 32-bit numbers, because pairs of registers for them and their masks cost a twentieth of the time.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    own = pid // n_blocks
    chunk = own % n_chunks
    first_batch = own // n_chunks * elements
    own = own.to(tl.int64)
    blocks_per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group = block // blocks_per_group
    lane = channel_numbers(BLOCK_D, LINES)
    first_channel = (block % blocks_per_group) * BLOCK_D
    d0 = (group * group_size + first_channel).to(tl.int64)
    if OUTPUTS > 0:  # groups are whole blocks
        d0 = tl.multiple_of(d0, BLOCK_D)
    there = first_channel + lane < group_size
    bias_row = load_row(bias, d0 + lane, there, BLOCK_D, LINES)
    D_row = load_row(D, d0 + lane, there, BLOCK_D, LINES)
    channel = channel_numbers(BLOCK_D, TILE)
    d = d0 + channel
    n = state_numbers(BLOCK_N, TILE)
    tile_there = (first_channel + channel < group_size)[:, None] & (n < d_state)[None, :]
    A2 = tl.load(A[0] + (d[:, None] * A[1] + n[None, :] * A[2]), mask=tile_there, other=0.0).to(tl.float32) * LOG2E
    row_u = position_numbers(BLOCK_T, ROWS)
    row_n = row_state_numbers(BLOCK_N, ROWS)
    row_there = row_n < d_state
    # Sums over channels: dB of BLOCK_T positions, then dC of them.
    sum_number = sum_numbers(2 * BLOCK_T, SUMS)
    sum_u = sum_number % BLOCK_T
    sum_n = summed_state_numbers(BLOCK_N, SUMS)
    sum_there = (sum_n < d_state)[None, :]
    pairs = (blocks_per_group + 1) // 2
    n_sums = n_blocks // blocks_per_group * pairs
    sums_at = dweights[0] + (group * pairs + block % blocks_per_group // 2) * d_state
    sums_at += (sum_number // BLOCK_T).to(tl.int64)[:, None] * n_batch * length * n_sums * d_state
    sums_at += sum_u[:, None] * POS[9] + sum_n[None, :]
    history = shared_tiles(BLOCK_T - 1, BLOCK_D, BLOCK_N, PLAIN)
    spare = shared_tiles(1 if OUTPUTS > 0 else 0, BLOCK_D, BLOCK_N, PLAIN)
    over_states = shared_tiles(2 * BLOCK_T, BLOCK_D, BLOCK_N // PARTS[0], PLAIN)
    over_channels = shared_sums(2 * BLOCK_T, PARTS[2], BLOCK_N)
    step_kept = shared_values(BLOCK_T, BLOCK_D, VALUES)
    inflow_kept = shared_values(BLOCK_T, BLOCK_D, VALUES)
    dy_kept = shared_values(BLOCK_T, BLOCK_D, VALUES)
    B_shared = shared_rows(BLOCK_T, BLOCK_N, PLAIN)
    C_shared = shared_rows(BLOCK_T, BLOCK_N, PLAIN)
    shared = (step_kept, inflow_kept, B_shared)
    carry = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    dA = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    dD = full_row(0.0, BLOCK_D, LINES)
    dbias = full_row(0.0, BLOCK_D, LINES)
    first = (chunk * chunk_length).to(tl.int32)
    stop = tl.minimum(first + chunk_length, length).to(tl.int32)
    record = tl.cast(0, tl.int32)
    n_segments = (stop - first + SEGMENT - HEAD + SEGMENT - 1) // SEGMENT
    first_segment = chunk * ((chunk_length + SEGMENT - HEAD + SEGMENT - 1) // SEGMENT)
    turns = n_segments
    if SEVERAL:
        turns *= tl.minimum(elements, n_batch - first_batch)
    for turn in range(0, turns):
        batch = first_batch.to(tl.int64)
        segment = n_segments - 1 - turn
        if SEVERAL:
            batch += turn // n_segments
            segment = n_segments - 1 - turn % n_segments
        if segment == n_segments - 1:
            carry = load_tile(future, batch, chunk, d, n, tile_there)
            if dstates is not None:
                if recorded is not None:
                    record = count_before(recorded[0], recorded[1], stop) - 1
        x_start = start_of(x, batch, d0)
        delta_start = start_of(delta, batch, d0)
        z_start = x_start if z is None else start_of(z, batch, d0)
        dy_start = start_of(dy, batch, d0)
        dx_start = start_of(dx, batch, d0)
        ddelta_start = start_of(ddelta, batch, d0)
        dz_start = x_start if z is None else start_of(dz, batch, d0)
        B_rows = B[0] + batch * B[1] + group * B[3] + row_n[None, :] * B[4]
        C_rows = C[0] + batch * C[1] + group * C[3] + row_n[None, :] * C[4]
        sums_here = sums_at + batch * length * POS[9]
        place = (batch, d, n, tile_there)
        edits_here = x_start
        if edits is not None:
            edits_here = edits[0] + batch * edits[1]
        given = (edits, edits_here, keep, add)
        begin = tl.maximum(first + segment * SEGMENT - (SEGMENT - HEAD), first)
        end = tl.minimum(first + (segment + 1) * SEGMENT - (SEGMENT - HEAD), stop)
        rows = (d0, channel, tl.maximum(begin - HEAD, first), dx_start, ddelta_start, dz_start)
        n_pieces = (end - begin + BLOCK_T - 1) // BLOCK_T
        before = boundary_state(boundaries, first_segment + segment, place, TILE)
        x_next = load_rows(x, x_start, lane, begin, begin, end, there, POS[0], BLOCK_T, MASK)
        delta_next = load_rows(delta, delta_start, lane, begin, begin, end, there, POS[1], BLOCK_T, MASK)
        B_block = load_weights(B_rows, begin, begin, end, row_u, row_there, POS[3], BLOCK_T, MASK or MASK_N)
        inputs = (x, x_start, delta, delta_start, B_rows, A2, bias_row)
        where = (lane, there, begin, end, row_u, row_there)
        for replay in range(0, n_pieces - 1):
            keep_state(replay, before, spare, kept, own, place, rows, KEPT, PLANES, OUTPUTS, POS[6])
            before, x_next, delta_next, B_block = replayed_block(
                *(replay, before, x_next, delta_next, B_block, inputs, where, shared, given, place),
                *(POS, SOFTPLUS, MASK, MASK_N, BLOCK_T, TILE),
            )
        t0 = begin + (n_pieces - 1) * BLOCK_T
        z_next = load_rows(z, z_start, lane, t0, begin, end, there, POS[2], BLOCK_T, MASK)
        dy_next = load_rows(dy, dy_start, lane, t0, begin, end, there, POS[5], BLOCK_T, MASK)
        C_block = load_weights(C_rows, t0, begin, end, row_u, row_there, POS[4], BLOCK_T, MASK or MASK_N)
        source = n_pieces - 1  # the block that the state is before
        for later in range(0, n_pieces):
            piece = n_pieces - 1 - later
            if KEPT[0] < KEPT[1]:
                for replay in range(source, piece):
                    before, x_next, delta_next, B_block = replayed_block(
                        *(replay, before, x_next, delta_next, B_block, inputs, where, shared, given, place),
                        *(POS, SOFTPLUS, MASK, MASK_N, BLOCK_T, TILE),
                    )
            t0 = begin + piece * BLOCK_T
            put(B_shared, B_block.to(tl.float32))
            put(C_shared, C_block.to(tl.float32))
            x_here = ()
            delta_here = ()
            gates = ()
            for u in tl.static_range(BLOCK_T):
                x_row = x_next[u].to(tl.float32)
                raw = delta_next[u].to(tl.float32) + bias_row
                step = step_size(raw, 0.0, SOFTPLUS)
                dy_row = dy_next[u].to(tl.float32)
                if z is not None:
                    gate = z_next[u].to(tl.float32)
                    open_ = sigmoid(gate)
                    gates = gates + (dy_row * open_ * (1.0 + gate * (1.0 - open_)),)
                    dy_row *= gate * open_
                if MASK:
                    step = tl.where(t0 + u < end, step, 0.0)
                put(step_kept[u], step)
                put(inflow_kept[u], step * x_row)
                put(dy_kept[u], dy_row)
                x_here = x_here + (x_row,)
                delta_here = delta_here + (raw,)
            edit = tl.cast(0, tl.int32)
            if edits is not None:
                edit = count_before(edits_here, edits[2], t0)
            state = before
            for u in tl.static_range(BLOCK_T):
                step = take_value(step_kept[u], TILE)
                inflow = take_value(inflow_kept[u], TILE)
                B_row = take_row(B_shared, u, TILE)
                state, edit = replayed(
                    state, A2, step, inflow, B_row, t0 + u, edit, edits, edits_here, keep, add, place
                )
                if u < BLOCK_T - 1:
                    put(history[u], state)
                if z is not None:
                    put_over_states(over_states[u], state * take_row(C_shared, u, TILE), PARTS[0])
                dC_part = part_over_channels(state * take_value(dy_kept[u], TILE)[:, None], PARTS[1])
                if u % 2 == 0:
                    other_part = dC_part
                else:
                    put_two_over_channels(over_channels, BLOCK_T + u - 1, other_part, dC_part)
            dx_at = dx_start + t0.to(tl.int64) * POS[6]
            ddelta_at = ddelta_start + t0.to(tl.int64) * POS[7]
            dz_at = dz_start + t0.to(tl.int64) * POS[8]
            if z is not None:
                for u in tl.static_range(BLOCK_T):
                    dz_row = gates[u] * (take_over_states(over_states[u], LINES) + D_row * x_here[u])
                    store_masked(dz_at + (lane * dz[3] + u * POS[8]), dz_row, there & (t0 + u < end), MASK)
            source = last_kept(piece - 1, KEPT)
            from_ = begin + source * BLOCK_T
            x_next = load_rows(x, x_start, lane, from_, begin, end, there, POS[0], BLOCK_T, MASK)
            delta_next = load_rows(delta, delta_start, lane, from_, begin, end, there, POS[1], BLOCK_T, MASK)
            z_next = load_rows(z, z_start, lane, t0 - BLOCK_T, begin, end, there, POS[2], BLOCK_T, MASK)
            dy_next = load_rows(dy, dy_start, lane, t0 - BLOCK_T, begin, end, there, POS[5], BLOCK_T, MASK)
            B_block = load_weights(B_rows, from_, begin, end, row_u, row_there, POS[3], BLOCK_T, MASK or MASK_N)
            C_block = load_weights(C_rows, t0 - BLOCK_T, begin, end, row_u, row_there, POS[4], BLOCK_T, MASK or MASK_N)
            for u in tl.static_range(BLOCK_T - 1, -1, -1):
                t = t0 + u
                previous = before
                if u > 0:
                    previous = take_tile(history[u - 1], TILE)
                step = take_value(step_kept[u], TILE)
                inflow = take_value(inflow_kept[u], TILE)
                B_row = take_row(B_shared, u, TILE)
                adjoint = carry + take_row(C_shared, u, TILE) * take_value(dy_kept[u], TILE)[:, None]
                if dstates is not None:
                    if recorded is None:
                        adjoint += load_tile(dstates, batch, t, d, n, tile_there & (t < end))
                    else:
                        if position_or_never(recorded[0], record, recorded[1]) == t:
                            adjoint += load_tile(dstates, batch, record, d, n, tile_there)
                            record -= 1
                A_bar = tl.exp2(step[:, None] * A2)
                if edits is not None:
                    if position_or_never(edits_here, edit - 1, edits[2]) == t:
                        edit -= 1
                        unedited = A_bar * previous + inflow[:, None] * B_row
                        tl.store(tile_at(dadd, batch, edit, d, n), adjoint, mask=tile_there)
                        tl.store(tile_at(dkeep, batch, edit, d, n), adjoint * unedited, mask=tile_there)
                        adjoint *= load_tile(keep, batch, edit, d, n, tile_there)
                dB_part = part_over_channels(adjoint * inflow[:, None], PARTS[1])
                if u % 2 == 1:
                    other_part = dB_part
                else:
                    put_two_over_channels(over_channels, u, dB_part, other_part)
                put_over_states(over_states[u], adjoint * B_row, PARTS[0])
                carry = A_bar * adjoint
                through_A = carry * previous
                put_over_states(over_states[BLOCK_T + u], through_A * A2, PARTS[0])
                dA += through_A * step[:, None]
            if source > 0:
                before = kept_state(source, spare, kept, own, place, rows, KEPT, PLANES, OUTPUTS, POS[6], TILE)
            else:
                before = boundary_state(boundaries, first_segment + segment, place, TILE)
            for v in tl.static_range(BLOCK_T):
                mask = there & (t0 + v < end)
                through_B = take_over_states(over_states[v], LINES)
                ddelta_row = take_over_states(over_states[BLOCK_T + v], LINES) * LN2 + x_here[v] * through_B
                if SOFTPLUS:
                    ddelta_row *= sigmoid(delta_here[v])
                if MASK:
                    ddelta_row = tl.where(t0 + v < end, ddelta_row, 0.0)
                dy_row = take_value(dy_kept[v], LINES)
                dx_row = take_value(step_kept[v], LINES) * through_B + D_row * dy_row
                dD += dy_row * x_here[v]
                dbias += ddelta_row
                store_masked(ddelta_at + (lane * ddelta[3] + v * POS[7]), ddelta_row, mask, MASK)
                store_masked(dx_at + (lane * dx[3] + v * POS[6]), dx_row, mask, MASK)
            sums_mask = sum_there & (t0 + sum_u < end)[:, None]
            sums = take_over_channels(over_channels, SUMS)
            # Two programs add to the same zeros: their sum is the same whoever comes first.
            tl.atomic_add(sums_here + t0.to(tl.int64) * POS[9], sums, mask=sums_mask, sem="relaxed")
        if dstart is not None:
            if (chunk == 0) & (segment == 0):
                tl.store(tile_at(dstart, batch, 0, d, n), carry, mask=tile_there)

    tl.store(tile_at(kept, tl.cast(0, tl.int64), own, d, n), dA, mask=tile_there)
    channel_sums = dchannels[0] + own * 2 * d_inner + d0 + lane
    tl.store(channel_sums, dD, mask=there)
    tl.store(channel_sums + d_inner, dbias, mask=there)
