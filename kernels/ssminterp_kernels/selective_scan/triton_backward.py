"""The backward scan in Triton, by recomputation from the states before every SEGMENT-th position.

With g_t = dLoss/dstate_t (the adjoint), the scan runs backwards in time:

    g_t = A_bar_{t+1} · g_{t+1} + C_t · dy_t + (gradient of the recorded state at t)
    dC_t = Σ_d dy_t state_t,  dB_t = Σ_d g_t Δ_t x_t,  dx_t = Δ_t Σ_n g_t B_t,
    dΔ_t = Σ_n g_t A_bar_t state_{t-1} A + x_t Σ_n g_t B_t,  dA = Σ_t g_t A_bar_t state_{t-1} Δ_t

A segment is replayed forward once, leaving the state before every block of BLOCK_T positions in scratch; then the
blocks are taken last to first: a block's states are replayed into registers and walked backwards. Sums over d_inner
(dB, dC) and over batch and time (dA, dD, dbias) are written as partial sums per program and added up in a fixed order,
so that the result does not depend on scheduling.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import (
    LN2,
    advance,
    any_between,
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
    store_masked,
    store_state,
    tile,
    touch_weights,
    use_touched,
    weight_rows,
    with_state_gradient,
)


@triton.jit
@no_type_check
def _load_inputs(x_rows, delta_rows, t0, begin, end, there, POS: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr):
    """x and delta at COUNT positions from t0 on, as a flat tuple; before begin those of begin, from end on zeros."""
    at = tl.maximum(t0, begin)
    if not MASK:
        at = tl.minimum(at, end - COUNT)
    x_at = x_rows + at.to(tl.int64) * POS[0]
    delta_at = delta_rows + at.to(tl.int64) * POS[1]
    rows = ()
    for u in tl.static_range(COUNT):
        mask = there & (at + u < end)
        rows = rows + (load_masked(x_at + u * POS[0], mask, MASK),)
        rows = rows + (load_masked(delta_at + u * POS[1], mask, MASK),)
    return rows


@triton.jit
@no_type_check
def _load_gates(z_rows, dy_rows, z, t0, begin, end, there, POS: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr):
    """z (zeros if there is none) and dy, as `_load_inputs`."""
    at = tl.maximum(t0, begin)
    z_at = z_rows + at.to(tl.int64) * POS[2]
    dy_at = dy_rows + at.to(tl.int64) * POS[5]
    rows = ()
    for u in tl.static_range(COUNT):
        mask = there & (at + u < end)
        if z is None:
            rows = rows + (0.0,)
        else:
            rows = rows + (load_masked(z_at + u * POS[2], mask, MASK),)
        rows = rows + (load_masked(dy_at + u * POS[5], mask, MASK),)
    return rows


@triton.jit
@no_type_check
def _edited(state, t, edits_here, edits, keep, add, batch, d, n, tile_there, zero):
    """The state after the edit at t, if there is one."""
    if edits is not None:
        edit = count_before(edits_here, edits[2], t)
        if position_or_never(edits_here, edit, edits[2]) == t:
            state = state * load_tile(keep, batch, edit, d, n, tile_there, zero)
            state += load_tile(add, batch, edit, d, n, tile_there, zero)
    return state


@triton.jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size", "zero"])
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
    scratch,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_inner,
    d_state,
    zero,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SEGMENT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group.

    boundaries: the state before every SEGMENT-th position [batch, n_segments, d_inner, d_state], None for zeros.
    future: dLoss/d(state after each chunk) from what comes later [batch, n_chunks, d_inner, d_state].
    dy: [batch, pos, d_inner]; dstates: [batch, n_recorded, d_inner, d_state] or None.
    dweights: [2 (B, C), batch, pos, n_blocks, d_state]; dchannels: [batch, n_chunks, (d_state + 2) × d_inner] (A, D,
    bias); dkeep, dadd: [batch, n_edits, d_inner, d_state]; dstart: [batch, 1, d_inner, d_state].
    scratch: (pointer to [programs, SEGMENT / BLOCK_T, BLOCK_N, BLOCK_D],). POS: the strides of the position axes of x,
    delta, z, B, C, dy, dx, ddelta, dz and dweights. MASK: some block of BLOCK_T positions or BLOCK_D channels is not
    full; MASK_N: d_state is less than BLOCK_N.

    Positions are 32-bit numbers, because pairs of registers for them and their masks cost a twentieth of the time.
    """
    batch, chunk, block, group, d, there = program_place(n_blocks, n_chunks, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_A2(A, d, n, tile_there, zero)
    bias_row = load_channels(bias, d, there)
    D_row = load_channels(D, d, there)
    x_rows = channel_rows(x, batch, d)
    delta_rows = channel_rows(delta, batch, d)
    z_rows = x_rows if z is None else channel_rows(z, batch, d)
    dy_rows = channel_rows(dy, batch, d)
    dx_rows = channel_rows(dx, batch, d)
    ddelta_rows = channel_rows(ddelta, batch, d)
    dz_rows = x_rows if z is None else channel_rows(dz, batch, d)
    B_rows = weight_rows(B, batch, group, n)
    C_rows = weight_rows(C, batch, group, n)
    dB_rows = dweights[0] + ((batch * length) * n_blocks + block) * d_state + n
    dC_rows = dB_rows + (tl.num_programs(0) // n_blocks // n_chunks).to(tl.int64) * length * n_blocks * d_state
    # Aligned scratch (no `zero`) lets the compiler give a thread 4 × 4 states: sums over channels need fewer shuffles.
    own_scratch = tile(
        scratch[0] + tl.program_id(0).to(tl.int64) * (SEGMENT // BLOCK_T) * BLOCK_N * BLOCK_D,
        *(tl.arange(0, BLOCK_D), 1, n, BLOCK_D, 0),
    )
    edits_here = x_rows
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]

    carry = load_tile(future, batch, chunk, d, n, tile_there, zero)
    dA = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dD = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    first = (chunk * chunk_length).to(tl.int32)
    stop = tl.minimum(first + chunk_length, length).to(tl.int32)
    touched = tl.zeros((32,), tl.float32)
    for back in tl.range(0, tl.cdiv(stop - first, SEGMENT)):
        begin = first + (tl.cdiv(stop - first, SEGMENT) - 1 - back) * SEGMENT
        end = tl.minimum(begin + SEGMENT, stop)
        n_pieces = tl.cdiv(end - begin, BLOCK_T)
        if boundaries is None:
            state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        else:
            state = load_tile(boundaries, batch, begin // SEGMENT, d, n, tile_there, zero)
        tl.store(own_scratch, state)
        inputs = _load_inputs(x_rows, delta_rows, begin, begin, end, there, POS, BLOCK_T, MASK)
        for piece in tl.range(1, n_pieces):
            t0 = begin + (piece - 1) * BLOCK_T
            here = inputs
            inputs = _load_inputs(x_rows, delta_rows, t0 + BLOCK_T, begin, end, there, POS, BLOCK_T, MASK)
            touched += touch_weights(B, batch, group, d_state, t0 + BLOCK_T, end, POS[3], BLOCK_T)
            touched += touch_weights(C, batch, group, d_state, t0 + BLOCK_T, end, POS[4], BLOCK_T)
            edited = False
            if edits is not None:
                edited = any_between(edits_here, edits[2], t0, t0 + BLOCK_T)
            B_at = B_rows + t0.to(tl.int64) * POS[3]
            for u in tl.static_range(BLOCK_T):
                step = step_size(here[2 * u + 1], bias_row, SOFTPLUS)
                B_row = load_masked(B_at + u * POS[3], n_there, MASK_N).to(tl.float32)
                state = advance(state, A2, step, here[2 * u], B_row)
                if edits is not None:
                    if edited:
                        state = _edited(state, t0 + u, edits_here, edits, keep, add, batch, d, n, tile_there, zero)
            tl.store(own_scratch + piece * BLOCK_N * BLOCK_D, state)
        tl.debug_barrier()

        gates = _load_gates(z_rows, dy_rows, z, begin + (n_pieces - 1) * BLOCK_T, begin, end, there, POS, BLOCK_T, MASK)
        for later in tl.range(0, n_pieces):
            piece = n_pieces - 1 - later
            t0 = begin + piece * BLOCK_T
            here = inputs
            gates_here = gates
            before = tl.load(own_scratch + piece * BLOCK_N * BLOCK_D)
            inputs = _load_inputs(x_rows, delta_rows, t0 - BLOCK_T, begin, end, there, POS, BLOCK_T, MASK)
            gates = _load_gates(z_rows, dy_rows, z, t0 - BLOCK_T, begin, end, there, POS, BLOCK_T, MASK)
            edited = False
            if edits is not None:
                edited = any_between(edits_here, edits[2], t0, t0 + BLOCK_T)
            B_at = B_rows + t0.to(tl.int64) * POS[3]
            C_at = C_rows + t0.to(tl.int64) * POS[4]
            dB_at = dB_rows + t0.to(tl.int64) * POS[9]
            dC_at = dC_rows + t0.to(tl.int64) * POS[9]
            history = (before,)
            steps = ()
            for u in tl.static_range(BLOCK_T):
                step = step_size(here[2 * u + 1], bias_row, SOFTPLUS)
                if MASK:
                    step = tl.where(t0 + u < end, step, 0.0)
                weight_mask = n_there & (t0 + u < end)
                B_row = load_masked(B_at + u * POS[3], weight_mask, MASK or MASK_N).to(tl.float32)
                state = advance(history[u], A2, step, here[2 * u], B_row)
                if edits is not None:
                    if edited:
                        state = _edited(state, t0 + u, edits_here, edits, keep, add, batch, d, n, tile_there, zero)
                history = history + (state,)
                steps = steps + (step,)
            dx_out = ()
            ddelta_out = ()
            dz_out = ()
            for u in tl.static_range(BLOCK_T - 1, -1, -1):
                t = t0 + u
                weight_mask = n_there & (t < end)
                x_row = here[2 * u].to(tl.float32)
                step = steps[u]
                B_row = load_masked(B_at + u * POS[3], weight_mask, MASK or MASK_N).to(tl.float32)
                C_row = load_masked(C_at + u * POS[4], weight_mask, MASK or MASK_N).to(tl.float32)
                dy_row = gates_here[2 * u + 1].to(tl.float32)
                if z is not None:
                    gate = gates_here[2 * u].to(tl.float32)
                    open_ = sigmoid(gate)
                    y_row = tl.sum(history[u + 1] * C_row[:, None], 0) + D_row * x_row
                    dz_out = dz_out + (dy_row * y_row * open_ * (1.0 + gate * (1.0 - open_)),)
                    dy_row *= gate * open_
                adjoint = carry + C_row[:, None] * dy_row[None, :]
                adjoint = with_state_gradient(adjoint, t, recorded, dstates, batch, d, n, tile_there & (t < end), zero)
                store_masked(
                    dC_at + u * POS[9], tl.sum(history[u + 1] * dy_row[None, :], 1), weight_mask, MASK or MASK_N
                )
                A_bar = tl.exp2(step[None, :] * A2)
                if edits is not None:
                    if edited:
                        edit = count_before(edits_here, edits[2], t)
                        if position_or_never(edits_here, edit, edits[2]) == t:
                            unedited = A_bar * history[u] + (step * x_row)[None, :] * B_row[:, None]
                            store_state(dadd, batch, edit, d, n, adjoint, tile_there)
                            store_state(dkeep, batch, edit, d, n, adjoint * unedited, tile_there)
                            adjoint *= load_tile(keep, batch, edit, d, n, tile_there, zero)
                dB_row = tl.sum(adjoint * (step * x_row)[None, :], 1)
                store_masked(dB_at + u * POS[9], dB_row, weight_mask, MASK or MASK_N)
                through_B = tl.sum(adjoint * B_row[:, None], 0)
                carry = A_bar * adjoint
                through_A = carry * history[u]
                ddelta_row = tl.sum(through_A * A2, 0) * LN2 + x_row * through_B
                dA += through_A * step[None, :]
                dD += dy_row * x_row
                if SOFTPLUS:
                    ddelta_row *= sigmoid(here[2 * u + 1].to(tl.float32) + bias_row)
                if MASK:
                    ddelta_row = tl.where(t < end, ddelta_row, 0.0)
                dbias += ddelta_row
                ddelta_out = ddelta_out + (ddelta_row,)
                dx_out = dx_out + (step * through_B + D_row * dy_row,)
            dx_at = dx_rows + t0.to(tl.int64) * POS[6]
            ddelta_at = ddelta_rows + t0.to(tl.int64) * POS[7]
            dz_at = dz_rows + t0.to(tl.int64) * POS[8]
            # Stored together, because no load moves ahead of a store that it might depend on.
            for u in tl.static_range(BLOCK_T):
                mask = there & (t0 + u < end)
                store_masked(dx_at + u * POS[6], dx_out[BLOCK_T - 1 - u], mask, MASK)
                store_masked(ddelta_at + u * POS[7], ddelta_out[BLOCK_T - 1 - u], mask, MASK)
                if z is not None:
                    store_masked(dz_at + u * POS[8], dz_out[BLOCK_T - 1 - u], mask, MASK)
        tl.debug_barrier()

    channel_sums = dchannels[0] + (batch * n_chunks + chunk) * (d_state + 2) * d_inner
    tl.store(channel_sums + d[None, :] * d_state + n[:, None], dA, mask=tile_there)
    tl.store(channel_sums + d_state * d_inner + d, dD, mask=there)
    tl.store(channel_sums + (d_state + 1) * d_inner + d, dbias, mask=there)
    if dstart is not None:
        if chunk == 0:
            store_state(dstart, batch, 0, d, n, carry, tile_there)
    use_touched(touched, scratch, zero)


@triton.jit(do_not_specialize=["parts"])
@no_type_check
def sum_parts_kernel(parts_at, out, parts, width, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """out [rows, width] = the sum over the middle axis of [rows, parts, width], always in the same order.

    BLOCK_P parts are in flight at once: one after the other, each would cost the latency of the memory.
    """
    row = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for part in tl.range(0, parts, BLOCK_P):
        inside = (part + p < parts)[:, None] & (w < width)[None, :]
        total += tl.load(parts_at + (row * parts + part + p[:, None]) * width + w[None, :], mask=inside, other=0.0)
    tl.store(out + row * width + w, tl.sum(total, 0), mask=w < width)
