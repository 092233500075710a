"""What the forward scan does at a tile of positions, or at the fewer that are left before an edit or the end."""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import jit, put, put_column, take_column, take_row, take_tile
from ssminterp_kernels.selective_scan.triton_math import sigmoid, step_size, store_masked
from ssminterp_kernels.selective_scan.triton_rows import (
    load_block,
    load_edit,
    load_rows,
    load_weight_row,
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
def whole_tile(
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
def one_by_one(
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
def rows_ahead(
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
