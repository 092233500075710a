"""What the forward scan does at a tile of positions where the state after every one of them is written."""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_edits import edited_state
from ssminterp_kernels.selective_scan.triton_layouts import (
    jit,
    part_over_states,
    put,
    put_parts,
    take_column,
    take_parts,
    take_row,
)
from ssminterp_kernels.selective_scan.triton_loads import tile_at
from ssminterp_kernels.selective_scan.triton_math import gated, step_size
from ssminterp_kernels.selective_scan.triton_rows import row_start


@jit
@no_type_check
def recorded_tile(
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
    times,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state after the positions of a tile; the lanes of a channel share what is computed once for it.

    blocks: x, delta and z [pos, channel]; shared: places of such blocks; across: what numbers them: positions,
    channels, which are there. The rest: as of `triton_tiles`.
    """
    y, states = targets
    batch, d0 = place[0], place[1]
    window, t, end = times
    u_across, lane_across, across_there = across
    steps, inputs, sums = shared
    x_block = blocks[0][0].to(tl.float32)
    step_block = step_size(blocks[1][0], bias_across[None, :], SOFTPLUS)
    put(steps, step_block)
    put(inputs, step_block * x_block)
    target = tile_at(states, batch, window, d0 + place[3], place[6])
    tile_there = place[4][:, None] & place[7][None, :]
    for begin in tl.static_range(0, UNROLL, TOGETHER):
        out = ()
        for u in tl.static_range(begin, begin + TOGETHER):
            after = tl.exp2(take_column(steps, u, TILE) * A2) * state
            after += take_column(inputs, u, TILE) * take_row(weights[0], u, TILE)
            if WHOLE:
                state = after
                if edit_here[0] is not None and u == 0:
                    state = edited_state(state, edit_here, place, NUMBERS, AHEAD, TILE)
                tl.store(target + u * POS[6], state, mask=tile_there, cache_modifier=".cs")
            else:
                is_here = (window + u >= t) & (window + u < end)
                state = tl.where(is_here, after, state)
                if edit_here[0] is not None:
                    if window + u == t:
                        state = edited_state(state, edit_here, place, NUMBERS, AHEAD, TILE)
                tl.store(target + u * POS[6], state, mask=tile_there & is_here, cache_modifier=".cs")
            out = out + (part_over_states(state * take_row(weights[1], u, TILE), STATES, LANES),)
        put_parts(sums, begin, out, TOGETHER)
    out = take_parts(sums, BLOCK) + D_across[None, :] * x_block
    out = gated(out, blocks[2][0], z)
    if not WHOLE:
        across_there = across_there & ((window + u_across >= t) & (window + u_across < end))[:, None]
    y_place = row_start(y, batch, d0, window, POS[5])
    tl.store(y_place + (u_across[:, None] * POS[5] + lane_across[None, :] * y[3]), out, mask=across_there)
    return state
