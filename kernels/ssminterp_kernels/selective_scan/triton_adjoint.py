"""The scan of adjoints alone, backwards in time: it needs no states, so it costs what the forward scan costs.

It summarises chunks for the backward scan of long thin shapes, and emits dLoss/dstate_t at chosen positions; for all of
them see `triton_adjoint_states`.

As in `triton_forward`, positions are taken in tiles without branches. Going backwards, a tile stops at an edit and
before a position whose adjoint is emitted or whose state has a gradient; what happens there happens between tiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    full_row,
    full_tile,
    jit,
    position_numbers,
    put,
    row_state_numbers,
    shared_rows,
    state_numbers,
    take_row,
)
from ssminterp_kernels.selective_scan.triton_loads import count_before, load_row, load_tile
from ssminterp_kernels.selective_scan.triton_math import LOG2E, gated, step_size
from ssminterp_kernels.selective_scan.triton_rows import (
    load_rows,
    load_weight_row,
    load_weights,
    position_before,
    store_spread,
)


@jit
@no_type_check
def _rows_ahead(delta, dy, z, batch, d0, lane, there, t, POS: tl.constexpr, MASK_D: tl.constexpr, UNROLL: tl.constexpr):
    """delta, dy and z at UNROLL positions from t on."""
    delta_rows = load_rows(delta, batch, d0, lane, t, there, POS[0], MASK_D, UNROLL)
    dy_rows = load_rows(dy, batch, d0, lane, t, there, POS[1], MASK_D, UNROLL)
    z_rows = load_rows(z, batch, d0, lane, t, there, POS[3], MASK_D, UNROLL)
    return delta_rows, dy_rows, z_rows


@jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size"])
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
    emitted,
    adjoints,
    decays,
    locals_,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PARTIAL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group; see `scan_backward_kernel`.

    If decays is given: future is None, and a chunk's effect on the adjoint after it goes to decays and locals_ [batch,
    chunks, d_inner, d_state], for all chunks but the first, which none precedes: n_chunks counts the others. Else
    dLoss/dstate_t goes to adjoints [batch, n_emitted, d_inner, d_state], at the positions emitted (positions,
    n_emitted). POS: the strides of the position axes of delta, dy, C and z.
    PARTIAL: some tile may hold less than UNROLL positions; MASK_D: some block has less than BLOCK_D channels; MASK_N:
    d_state is less than BLOCK_N.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    chunk = (pid // n_blocks) % n_chunks
    batch = (pid // n_blocks // n_chunks).to(tl.int64)
    if decays is not None:
        chunk += 1
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
    row_u = position_numbers(UNROLL, ROWS)
    row_n = row_state_numbers(BLOCK_N, ROWS)
    row_there = (row_n < d_state)[None, :] & (row_u >= 0)[:, None]
    C_shared = shared_rows(UNROLL, BLOCK_N, PLAIN)
    if future is None:
        carry = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    else:
        carry = load_tile(future, batch, chunk, d, n, tile_there)
    elapsed = full_row(0.0, BLOCK_D, TILE)  # since the last edit
    decay = full_tile(1.0, BLOCK_D, BLOCK_N, TILE)  # up to the last edit

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], stop) - 1
        next_edit = position_before(edits_here, edit)
    GRADIENTS: tl.constexpr = dstates is not None and recorded is not None
    if GRADIENTS:
        record = count_before(recorded[0], recorded[1], stop) - 1
        next_record = position_before(recorded[0], record)
    if emitted is not None:
        emission = count_before(emitted[0], emitted[1], stop) - 1
        next_emission = position_before(emitted[0], emission)

    top = stop - 1
    window = tl.maximum(stop - UNROLL, 0)
    ahead = _rows_ahead(delta, dy, z, batch, d0, lane, there, window, POS, MASK_D, UNROLL)
    C_next = load_weights(C, batch, group, window, row_u, row_n, row_there, POS[2], MASK_N)
    while top >= first:
        # Positions low..top of the UNROLL that begin at window.
        window = tl.maximum(top + 1 - UNROLL, 0)
        low = tl.maximum(top + 1 - UNROLL, first)
        if GRADIENTS:
            if top == next_record:
                carry += load_tile(dstates, batch, record, d, n, tile_there)
                record -= 1
                next_record = position_before(recorded[0], record)
            low = tl.maximum(low, next_record + 1)
        if emitted is not None:
            if top == next_emission:
                dy_row = load_rows(dy, batch, d0, lane, top, there, POS[1], MASK_D, 1)[0]
                z_row = load_rows(z, batch, d0, lane, top, there, POS[3], MASK_D, 1)[0]
                C_row = load_weight_row(C, batch, group, top, n, n_there, POS[2], MASK_N)
                adjoint = carry + C_row * gated(dy_row, z_row, z)[:, None]
                store_spread(adjoints, batch, emission, d0, d_end, d_state, adjoint, SPREAD)
                emission -= 1
                next_emission = position_before(emitted[0], emission)
            low = tl.maximum(low, next_emission + 1)
        if edits is not None:
            low = tl.maximum(low, next_edit)
        rows = ahead
        C_rows = C_next.to(tl.float32)
        if PARTIAL:
            active = (window + row_u >= low) & (window + row_u <= top)
            C_rows = tl.where(active[:, None], C_rows, 0.0)
        put(C_shared, C_rows)
        window_next = tl.maximum(low - UNROLL, 0)
        ahead = _rows_ahead(delta, dy, z, batch, d0, lane, there, window_next, POS, MASK_D, UNROLL)
        C_next = load_weights(C, batch, group, window_next, row_u, row_n, row_there, POS[2], MASK_N)
        for u in tl.static_range(UNROLL - 1, -1, -1):
            t = window + u
            step = step_size(rows[0][u], bias_row, SOFTPLUS)
            dy_row = gated(rows[1][u], rows[2][u], z)
            t_there = tile_there
            if PARTIAL:
                inside = (t >= low) & (t <= top)
                step = tl.where(inside, step, 0.0)
                dy_row = tl.where(inside, dy_row, 0.0)
                t_there = tile_there & inside
            adjoint = carry + take_row(C_shared, u, TILE) * dy_row[:, None]
            if dstates is not None and recorded is None:
                adjoint += load_tile(dstates, batch, t, d, n, t_there)
            carry = tl.exp2(step[:, None] * A2) * adjoint
            if decays is not None:
                elapsed += step
        if edits is not None:
            if low == next_edit:
                kept = load_tile(keep, batch, edit, d, n, tile_there)
                carry *= kept
                if decays is not None:
                    decay *= tl.exp2(elapsed[:, None] * A2) * kept
                    elapsed = full_row(0.0, BLOCK_D, TILE)
                edit -= 1
                next_edit = position_before(edits_here, edit)
        top = low - 1
    if decays is not None:
        decay *= tl.exp2(elapsed[:, None] * A2)
        store_spread(decays, batch, chunk, d0, d_end, d_state, decay, SPREAD)
        store_spread(locals_, batch, chunk, d0, d_end, d_state, carry, SPREAD)


@triton.jit(do_not_specialize=["n_chunks"])
@no_type_check
def combine_chunks_kernel(decays, locals_, start, n_chunks, d_state, whole, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Overwrite locals_ [batch, n_chunks, d_inner × d_state] by the adjoint with which every chunk begins, its last
    position first.

    start: the adjoint behind the last chunk, as (pointer, strides of batch, d_inner, d_state), or None for zeros.
    AHEAD chunks are loaded before any is written, because no load moves ahead of a store that it might depend on.
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
    # The effect of the first chunk was not computed: its place only takes an adjoint.
    for k in tl.range(0, n_chunks - 1, AHEAD):
        effects = ()
        for u in tl.static_range(AHEAD):
            chunk = n_chunks - 1 - k - u
            at = (batch * n_chunks + chunk) * whole + i
            there = inside & (k + u < n_chunks - 1)
            effects = effects + (tl.load(decays + at, mask=there, other=0.0),)
            effects = effects + (tl.load(locals_ + at, mask=there, other=0.0),)
        for u in tl.static_range(AHEAD):
            chunk = n_chunks - 1 - k - u
            at = (batch * n_chunks + chunk) * whole + i
            there = inside & (k + u < n_chunks - 1)
            tl.store(locals_ + at, state, mask=there)
            state = tl.where(there, effects[2 * u] * state + effects[2 * u + 1], state)
    tl.store(locals_ + batch * n_chunks * whole + i, state, mask=inside)
