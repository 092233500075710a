"""The states that the backward scan begins with, replays, and keeps until it comes back to them.

Kept are those before the inner blocks of a segment, all of them or an even part. The first waits in shared memory, and
PLANES of them have memory of their own. The others lie in rows of the gradients as large as x, where those of the
segment and of HEAD positions before it are yet to come (`triton_backward_plan` sees to it that each state is used
before it is overwritten). Where they cannot lie there, all have memory of their own.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import full_tile, jit, put, take_row, take_tile, take_value
from ssminterp_kernels.selective_scan.triton_loads import (
    count_before,
    load_rows,
    load_tile,
    load_weights,
    position_or_never,
    tile_at,
)
from ssminterp_kernels.selective_scan.triton_math import step_size


@jit
@no_type_check
def replayed(state, A2, step, inflow, B, t, edit, edits, edits_here, keep, add, place):
    """The state after position t, edited if its edit is the next, and the number of the next edit.

    inflow: Δ x. place: batch, d, n and which of the tile are there.
    """
    batch, d, n, tile_there = place
    state = tl.exp2(step[:, None] * A2) * state
    state += inflow[:, None] * B
    if edits is not None:
        if position_or_never(edits_here, edit, edits[2]) == t:
            state = state * load_tile(keep, batch, edit, d, n, tile_there)
            state += load_tile(add, batch, edit, d, n, tile_there)
            edit += 1
    return state, edit


@jit
@no_type_check
def replayed_block(
    replay,
    state,
    x_rows,
    delta_rows,
    B_block,
    inputs,
    where,
    shared,
    given,
    place,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    MASK: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state after a block of a segment, and x, delta and B of the next.

    inputs: x, delta and B and where they start, A and bias. where: lanes, the segment's begin and end, numbers of rows.
    shared: places for steps, inflows and B. given: edits, this element's, keep and add.
    """
    x, x_start, delta, delta_start, B_rows, A2, bias_row = inputs
    lane, there, begin, end, row_u, row_there = where
    edits, edits_here, keep, add = given
    t0 = begin + replay * BLOCK_T
    put(shared[2], B_block.to(tl.float32))
    x_next = load_rows(x, x_start, lane, t0 + BLOCK_T, begin, end, there, POS[0], BLOCK_T, MASK)
    delta_next = load_rows(delta, delta_start, lane, t0 + BLOCK_T, begin, end, there, POS[1], BLOCK_T, MASK)
    B_next = load_weights(B_rows, t0 + BLOCK_T, begin, end, row_u, row_there, POS[3], BLOCK_T, MASK or MASK_N)
    edit = tl.cast(0, tl.int32)
    if edits is not None:
        edit = count_before(edits_here, edits[2], t0)
    for u in tl.static_range(BLOCK_T):
        step = step_size(delta_rows[u], bias_row, SOFTPLUS)
        put(shared[0][u], step)
        put(shared[1][u], step * x_rows[u].to(tl.float32))
    for u in tl.static_range(BLOCK_T):
        step = take_value(shared[0][u], TILE)
        inflow = take_value(shared[1][u], TILE)
        B_row = take_row(shared[2], u, TILE)
        state, edit = replayed(state, A2, step, inflow, B_row, t0 + u, edit, edits, edits_here, keep, add, place)
    return state, x_next, delta_next, B_next


@jit
@no_type_check
def boundary_state(boundaries, segment, place, TILE: tl.constexpr):
    """The state before a segment; place: see `replayed`."""
    batch, d, n, tile_there = place
    if boundaries is None:
        state = full_tile(0.0, tile_there.shape[0], tile_there.shape[1], TILE)
    else:
        state = load_tile(boundaries, batch, segment, d, n, tile_there)
    return state


@jit
@no_type_check
def count_kept(block, KEPT: tl.constexpr):
    """How many of the states before blocks 1 to `block` are kept: KEPT[0] of every KEPT[1], evenly."""
    return tl.maximum(block, 0) * KEPT[0] // KEPT[1]


@jit
@no_type_check
def last_kept(block, KEPT: tl.constexpr):
    """The last block, not after this one, before which the state is kept; 0, before which it is given, if none is."""
    return (count_kept(block, KEPT) * KEPT[1] + KEPT[0] - 1) // KEPT[0]


@jit
@no_type_check
def _place_in_rows(i, rows, n, BLOCK_D: tl.constexpr, OUTPUTS: tl.constexpr, STRIDE: tl.constexpr):
    """Pointers [BLOCK_D, BLOCK_N] to the i-th of the states that lie in rows of the outputs.

    rows: the first channel, the tile's channels from there, the position from which on rows are used, three pointers to
    position 0: of OUTPUTS outputs, whose positions are STRIDE apart. A quarter of a state's channels (one of a thread's
    4), 16 numbers each, fills ROWS rows of one output. Of 2 outputs a state takes 2 · ROWS rows. Of 3, three states
    take 4 · ROWS: their last quarters, one in each output, then the rest of the first, of the second, of the third.
    """
    channel, begin = rows[1], rows[2]
    ROWS: tl.constexpr = 128 // rows[3].dtype.element_ty.primitive_bitwidth
    WIDTH: tl.constexpr = BLOCK_D // 4  # channels of a quarter
    IN_ROW: tl.constexpr = WIDTH // ROWS
    if OUTPUTS == 2:
        offset = tl.cast(begin + i * 2 * ROWS, tl.int64) * STRIDE
        third = rows[3] + (offset + ROWS * STRIDE)
        fourth = rows[4] + (offset + ROWS * STRIDE)
    else:
        offset = tl.cast(begin + (i + i // 3 + 1) * ROWS, tl.int64) * STRIDE
        third = rows[5] + offset
        fourth = tl.where(i % 3 == 0, rows[3], tl.where(i % 3 == 1, rows[4], rows[5]))
        fourth += tl.cast(begin + i // 3 * 4 * ROWS, tl.int64) * STRIDE
    quarter = channel // WIDTH
    among = channel % WIDTH
    half = tl.where(quarter == 0, rows[3] + offset, rows[4] + offset)
    at = tl.where(quarter < 2, half, tl.where(quarter == 2, third, fourth))
    at = (at + among // IN_ROW * STRIDE).to(tl.pointer_type(tl.float32), bitcast=True)
    return (at + among % IN_ROW * 16)[:, None] + n[None, :]


@jit
@no_type_check
def _place_in_plane(k, kept, own, rows, n, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_D, BLOCK_N] to the k-th state of a program, whose numbers lie side by side."""
    at = kept[0] + (tl.cast(k, tl.int64) * kept[1] + own * kept[2] + rows[0] * BLOCK_N)
    return at + (rows[1][:, None] * BLOCK_N + n[None, :])


@jit
@no_type_check
def keep_state(
    block,
    state,
    spare,
    kept,
    own,
    place,
    rows,
    KEPT: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Keep the state before a block, if it is to be kept; the first in shared memory, `spare`, if there are OUTPUTS.

    kept: memory [PLANES, programs, d_inner, d_state], of which item `own` is this program's. place: see `replayed`;
    rows and what belongs to them: see `_place_in_rows`.
    """
    d, n, tile_there = place[1], place[2], place[3]
    k = count_kept(block, KEPT) - 1
    if k >= count_kept(block - 1, KEPT):
        if OUTPUTS == 0:
            tl.store(tile_at(kept, tl.cast(k, tl.int64), own, d, n), state, mask=tile_there)
        else:
            if k == 0:
                put(spare[0], state)
            else:
                if k <= PLANES:
                    tl.store(_place_in_plane(k - 1, kept, own, rows, n, tile_there.shape[1]), state)
                else:
                    tl.store(_place_in_rows(k - 1 - PLANES, rows, n, tile_there.shape[0], OUTPUTS, STRIDE), state)


@jit
@no_type_check
def kept_state(
    block,
    spare,
    kept,
    own,
    place,
    rows,
    KEPT: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """What was kept by `keep_state` before this block."""
    d, n, tile_there = place[1], place[2], place[3]
    k = count_kept(block, KEPT) - 1
    if OUTPUTS == 0:
        state = load_tile(kept, tl.cast(k, tl.int64), own, d, n, tile_there)
    else:
        if k == 0:
            state = take_tile(spare[0], TILE)
        else:
            if k <= PLANES:
                state = tl.load(_place_in_plane(k - 1, kept, own, rows, n, tile_there.shape[1]))
            else:
                state = tl.load(_place_in_rows(k - 1 - PLANES, rows, n, tile_there.shape[0], OUTPUTS, STRIDE))
    return state
