"""What the forward scan does at a tile of positions, or at the fewer that are left before an edit or the end."""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_edits import edited_state
from ssminterp_kernels.selective_scan.triton_layouts import jit, take_row
from ssminterp_kernels.selective_scan.triton_loads import tile_at
from ssminterp_kernels.selective_scan.triton_math import gated, silu, step_size, store_masked
from ssminterp_kernels.selective_scan.triton_recorded_tile import recorded_tile
from ssminterp_kernels.selective_scan.triton_rows import position_at, row_start


@jit
@no_type_check
def terms_of(rows, bias_row, D_row, z, SOFTPLUS: tl.constexpr, UNROLL: tl.constexpr):
    """What x, delta and z at the positions of a tile come to, float32: Δ, Δ x, D x, and what z multiplies y by.

    Called before the next tile's rows are loaded, it spares their being moved from registers to registers later.
    """
    steps = ()
    inputs = ()
    skipping = ()
    gates = ()
    for u in tl.static_range(UNROLL):
        x = rows[0][u].to(tl.float32)
        step = step_size(rows[1][u], bias_row, SOFTPLUS)
        steps = steps + (step,)
        inputs = inputs + (step * x,)
        skipping = skipping + (D_row * x,)
        if z is not None:
            gates = gates + (silu(rows[2][u]),)
    return steps, inputs, skipping, gates


@jit
@no_type_check
def advanced(
    state, A2, bias_row, rows, B, u: tl.constexpr, SOFTPLUS: tl.constexpr, EARLY: tl.constexpr, TILE: tl.constexpr
):
    """The state after position u of a tile; rows, or if EARLY their terms, and B: see `_tile`."""
    if EARLY:
        step = rows[0][u]
        dx = rows[1][u]
    else:
        step = step_size(rows[1][u], bias_row, SOFTPLUS)
        dx = step * rows[0][u].to(tl.float32)
    return tl.exp2(step[:, None] * A2) * state + dx[:, None] * take_row(B, u, TILE)


@jit
@no_type_check
def read_out(state, D_row, rows, z, C, u: tl.constexpr, EARLY: tl.constexpr, TILE: tl.constexpr):
    """y at position u of a tile, float32 [BLOCK_D]; rows, C: see `_tile`."""
    y = tl.sum(state * take_row(C, u, TILE), 1)
    if EARLY:
        y += rows[2][u]
        if z is not None:
            y *= rows[3][u]
    else:
        y += D_row * rows[0][u].to(tl.float32)
        y = gated(y, rows[2][u], z)
    return y


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
    targets,
    place,
    edit_here,
    times,
    records,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EARLY: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    EDITED: tl.constexpr,
):
    """The state after the positions of a tile, of which the first may be edited.

    rows: x, delta and z at UNROLL positions, or if EARLY their terms; weights: where B and C lie in shared memory;
    place: batch, d0, d_end, lane, there and more; times: the first of the UNROLL positions, and from which on to which
    end they are the tile's; records: the next record, its position and all recorded ones, if the tile may have any;
    WHOLE: all positions are the tile's, and one at most is recorded; EDITED: whether an edit may be here.
    """
    batch, d0, lane, there = place[0], place[1], place[3], place[4]
    y, states = targets
    window, t, end = times
    if len(records) > 0:
        record, wanted, recorded = records
        tile_there = there[:, None] & place[7][None, :]
        d = d0 + lane
    y_place = row_start(y, batch, d0, window, POS[5])
    if WHOLE:
        out = ()
        for u in tl.static_range(UNROLL):
            state = advanced(state, A2, bias_row, rows, weights[0], u, SOFTPLUS, EARLY, TILE)
            if EDITED and u == 0:
                state = edited_state(state, edit_here, place, NUMBERS, AHEAD, TILE)
            if len(records) > 0:
                is_wanted = t + u == wanted
                if MASK_D or MASK_N:
                    is_wanted = tile_there & is_wanted
                tl.store(tile_at(states, batch, record, d, place[6]), state, mask=is_wanted)
            out = out + (read_out(state, D_row, rows, z, weights[1], u, EARLY, TILE),)
        # Stored together, because no load moves ahead of a store that it might depend on.
        for u in tl.static_range(UNROLL):
            store_masked(y_place + (lane * y[3] + u * POS[5]), out[u], there, MASK_D)
    else:
        for u in tl.static_range(UNROLL):
            if (window + u >= t) & (window + u < end):
                state = advanced(state, A2, bias_row, rows, weights[0], u, SOFTPLUS, EARLY, TILE)
                if EDITED:
                    if window + u == t:
                        state = edited_state(state, edit_here, place, NUMBERS, AHEAD, TILE)
                if len(records) > 0:
                    if window + u == wanted:
                        store_masked(tile_at(states, batch, record, d, place[6]), state, tile_there, MASK_D or MASK_N)
                        record += 1
                        wanted = position_at(recorded, record)
                y_row = read_out(state, D_row, rows, z, weights[1], u, EARLY, TILE)
                store_masked(y_place + (lane * y[3] + u * POS[5]), y_row, there, MASK_D)
    return state


@jit
@no_type_check
def scan_tile(
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
    times,
    records,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EARLY: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    PARTIAL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The state after a tile, by `_tile` or `recorded_tile`.

    records: if states at some positions are recorded: the next record, its position, that of the one after it, and all.
    """
    t, end = times[1], times[2]
    whole = (t, t, end)
    if RECORD_ALL:
        given = (A2, bias[1], D[1], rows, weights, shared, z, targets, place, across, edit_here)
        if not PARTIAL or end - t == UNROLL:
            state = recorded_tile(
                state, *given, whole, POS, NUMBERS, AHEAD, SOFTPLUS, UNROLL, TILE, BLOCK, STATES, LANES, TOGETHER, True
            )
        else:
            state = recorded_tile(
                state, *given, times, POS, NUMBERS, AHEAD, SOFTPLUS, UNROLL, TILE, BLOCK, STATES, LANES, TOGETHER, False
            )
    else:
        EDITS: tl.constexpr = edit_here[0] is not None
        given = (state, A2, bias[0], D[0], rows, weights, z, targets, place, edit_here)
        if len(records) == 0:
            if not PARTIAL or end - t == UNROLL:
                # If AHEAD, a tile without an edit has values that change nothing, because short scans notice when code
                # of another kind of tile must first be fetched.
                if EDITS and not AHEAD:
                    if edit_here[3]:
                        state = _tile(
                            *given,
                            *(whole, (), POS, NUMBERS, AHEAD, SOFTPLUS),
                            *(EARLY, MASK_D, MASK_N, UNROLL, TILE, True, True),
                        )
                    else:
                        state = _tile(
                            *given,
                            *(whole, (), POS, NUMBERS, AHEAD, SOFTPLUS),
                            *(EARLY, MASK_D, MASK_N, UNROLL, TILE, True, False),
                        )
                else:
                    state = _tile(
                        *given,
                        *(whole, (), POS, NUMBERS, AHEAD, SOFTPLUS),
                        *(EARLY, MASK_D, MASK_N, UNROLL, TILE, True, EDITS),
                    )
            else:
                state = _tile(
                    *given,
                    *(times, (), POS, NUMBERS, AHEAD, SOFTPLUS),
                    *(EARLY, MASK_D, MASK_N, UNROLL, TILE, False, EDITS),
                )
        else:
            record, next_record, following, recorded = records
            here = (record, next_record, recorded)
            none_here = next_record >= end
            if PARTIAL:
                none_here = none_here & (end - t == UNROLL)
            if none_here:
                state = _tile(
                    *given,
                    *(whole, (), POS, NUMBERS, AHEAD, SOFTPLUS),
                    *(EARLY, MASK_D, MASK_N, UNROLL, TILE, True, EDITS),
                )
            elif (end - t < UNROLL) | (following < end):
                state = _tile(
                    *given,
                    *(times, here, POS, NUMBERS, AHEAD, SOFTPLUS),
                    *(EARLY, MASK_D, MASK_N, UNROLL, TILE, False, EDITS),
                )
            else:
                state = _tile(
                    *given,
                    *(whole, here, POS, NUMBERS, AHEAD, SOFTPLUS),
                    *(EARLY, MASK_D, MASK_N, UNROLL, TILE, True, EDITS),
                )
    return state
