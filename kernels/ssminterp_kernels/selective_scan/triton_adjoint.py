"""The scan of adjoints alone, backwards in time: it needs no states, so it costs what the forward scan costs.

It summarises chunks for the backward scan of long thin shapes, and emits dLoss/dstate_t at chosen positions or all.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import (
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
    store_state,
    touch_weights,
    use_touched,
    weight_rows,
    with_state_gradient,
)


@triton.jit
@no_type_check
def _load_rows(
    delta_rows, dy_rows, z_rows, z, t0, first, stop, there, POS: tl.constexpr, MASK: tl.constexpr, UNROLL: tl.constexpr
):
    """delta, dy and z (zeros if there is none) at UNROLL positions from t0 on, or from first on if t0 lies before it.

    MASK: zeros from stop on.
    """
    at = tl.maximum(t0, first)
    delta_at = delta_rows + at * POS[0]
    dy_at = dy_rows + at * POS[1]
    z_at = z_rows + at * POS[3]
    rows = ()
    for u in tl.static_range(UNROLL):
        mask = there & (at + u < stop)
        rows = rows + (load_masked(delta_at + u * POS[0], mask, MASK),)
        rows = rows + (load_masked(dy_at + u * POS[1], mask, MASK),)
        if z is None:
            rows = rows + (0.0,)
        else:
            rows = rows + (load_masked(z_at + u * POS[3], mask, MASK),)
    return rows


@triton.jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size", "zero"])
@no_type_check
def scan_adjoint_kernel(
    delta,
    z,
    A,
    C,
    bias,
    edits,
    keep,
    recorded,
    dy,
    dstates,
    future,
    emitted_positions,
    adjoints,
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
    MASK: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group; see `scan_backward_kernel`.

    If decays is given: future is None, and a chunk's effect on the adjoint after it goes to decays and locals_ [batch,
    chunks, d_inner, d_state], for all chunks but the first, which none precedes: n_chunks counts the others. Else
    dLoss/dstate_t goes to adjoints [batch, n_emitted, d_inner, d_state], at emitted_positions (positions, n_emitted) or
    at all positions if that is None. POS: the strides of the position axes of delta, dy, C and z. MASK: some
    block of UNROLL positions or BLOCK_D channels is not full; MASK_N: d_state is less than BLOCK_N.
    """
    batch, chunk, _block, group, d, there = program_place(n_blocks, n_chunks, group_size, BLOCK_D)
    if decays is not None:
        chunk += 1
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_A2(A, d, n, tile_there, zero)
    bias_row = load_channels(bias, d, there)
    delta_rows = channel_rows(delta, batch, d)
    dy_rows = channel_rows(dy, batch, d)
    z_rows = dy_rows if z is None else channel_rows(z, batch, d)
    C_rows = weight_rows(C, batch, group, n)
    edits_here = delta_rows
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
    if future is None:
        carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        carry = load_tile(future, batch, chunk, d, n, tile_there, zero)
    decay = tl.full((BLOCK_N, BLOCK_D), 1.0, tl.float32)
    elapsed = tl.zeros((BLOCK_D,), tl.float32)

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    n_blocks_of_time = tl.cdiv(stop - first, UNROLL)
    t0 = first + (n_blocks_of_time - 1) * UNROLL
    upcoming = _load_rows(delta_rows, dy_rows, z_rows, z, t0, first, stop, there, POS, MASK, UNROLL)
    C_ahead = touch_weights(C, batch, group, d_state, t0, stop, POS[2], UNROLL)
    touched = tl.zeros((32,), tl.float32)
    for later in tl.range(0, n_blocks_of_time):
        t0 = first + (n_blocks_of_time - 1 - later) * UNROLL
        rows = upcoming
        upcoming = _load_rows(delta_rows, dy_rows, z_rows, z, t0 - UNROLL, first, stop, there, POS, MASK, UNROLL)
        touched += C_ahead
        if t0 > first:
            C_ahead = touch_weights(C, batch, group, d_state, t0 - UNROLL, stop, POS[2], UNROLL)
        C_at = C_rows + t0 * POS[2]
        edited = False
        if edits is not None:
            edited = any_between(edits_here, edits[2], t0, t0 + UNROLL)
        for u in tl.static_range(UNROLL - 1, -1, -1):
            t = t0 + u
            step = step_size(rows[3 * u], bias_row, SOFTPLUS)
            if MASK:
                step = tl.where(t < stop, step, 0.0)
            dy_row = rows[3 * u + 1].to(tl.float32)
            if z is not None:
                gate = rows[3 * u + 2].to(tl.float32)
                dy_row *= gate * sigmoid(gate)
            C_row = load_masked(C_at + u * POS[2], n_there & (t < stop), MASK or MASK_N).to(tl.float32)
            adjoint = carry + C_row[:, None] * dy_row[None, :]
            adjoint = with_state_gradient(adjoint, t, recorded, dstates, batch, d, n, tile_there & (t < stop), zero)
            if decays is None:
                if emitted_positions is None:
                    store_state(adjoints, batch, t, d, n, adjoint, tile_there & (t < stop))
                else:
                    emit = count_before(emitted_positions[0], emitted_positions[1], t)
                    if position_or_never(emitted_positions[0], emit, emitted_positions[1]) == t:
                        store_state(adjoints, batch, emit, d, n, adjoint, tile_there)
            A_bar = tl.exp2(step[None, :] * A2)
            if edits is None:
                elapsed += step
            else:
                decay *= A_bar
                if edited:
                    edit = count_before(edits_here, edits[2], t)
                    if position_or_never(edits_here, edit, edits[2]) == t:
                        kept = load_tile(keep, batch, edit, d, n, tile_there, zero)
                        adjoint *= kept
                        decay *= kept
            carry = A_bar * adjoint
    if decays is not None:
        if edits is None:
            decay = tl.exp2(elapsed[None, :] * A2)
        store_state(decays, batch, chunk, d, n, decay, tile_there)
        store_state(locals_, batch, chunk, d, n, carry, tile_there)
    use_touched(touched, C if decays is None else decays, zero)
