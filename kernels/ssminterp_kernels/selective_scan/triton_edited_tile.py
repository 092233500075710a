"""A tile of the forward scan of which any positions may be edited.

Elsewhere an edit begins a tile, and its tile costs nothing more than that. Of more edits than there are tiles, some
would leave tiles of a position or two. They are applied here as they come, behind a branch at every position.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_edits import load_values, prefetch_values, put_values, taken_values
from ssminterp_kernels.selective_scan.triton_layouts import jit
from ssminterp_kernels.selective_scan.triton_math import store_masked
from ssminterp_kernels.selective_scan.triton_rows import events_before, position, read_position, row_start
from ssminterp_kernels.selective_scan.triton_tiles import advanced, read_out, terms_of


@jit
@no_type_check
def queue_from(
    source,
    place,
    t,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOADED: tl.constexpr,
):
    """The first edit from position t on: its number, its position, that of the next as `read_position` gives it, and
    its values as `load_values` gives them.

    source: the edits, keep, add, keep if it is one number, places in shared memory, and d_state; place: batch, d0,
    d_end and more.
    """
    edits, keep, add, only_kept, _places, d_state = source
    batch = place[0]
    listed = edits[0] + batch * edits[1]
    edit = events_before(listed, edits[2], t)
    first = position(read_position(listed, edit, edits[2]), edit, edits[2])
    at = (batch, edit, edits[2], place[1], place[2], d_state)
    values = load_values(keep, add, at, True, only_kept, NUMBERS, CHANNELS, MASK, BLOCK_D, BLOCK_N, LOADED)
    return edit, first, read_position(listed, edit + 1, edits[2]), values[0], values[1]


@jit
@no_type_check
def _edited(
    state,
    queue,
    source,
    place,
    batch_after,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEYOND: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOADED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state after the next edit, and the queue without it: what is first then may be of the next batch element."""
    edits, keep, add, only_kept, places, d_state = source
    batch, d0, d_end = place[0], place[1], place[2]
    values = (queue[3], queue[4])
    put_values(places, values)
    kept, added = taken_values(places, values, TILE)
    state = state * kept + added
    edit = queue[0] + 1
    first = position(queue[2], edit, edits[2])
    following = read_position(edits[0] + batch * edits[1], edit + 1, edits[2])
    is_last = edit >= edits[2]
    at = (tl.where(is_last, batch_after, batch), tl.where(is_last, 0, edit), edits[2], d0, d_end, d_state)
    values = load_values(keep, add, at, True, only_kept, NUMBERS, CHANNELS, MASK, BLOCK_D, BLOCK_N, LOADED)
    if BEYOND:
        at = (batch, edit + 3, edits[2], d0, d_end, d_state)
        prefetch_values(keep, add, at, edit + 3 < edits[2], NUMBERS, CHANNELS, BLOCK_D, BLOCK_N, TILE)
    return state, (edit, first, following, values[0], values[1])


@jit
@no_type_check
def _edited_positions(
    state,
    queue,
    A2,
    bias_row,
    D_row,
    rows,
    weights,
    z,
    y,
    source,
    place,
    batch_after,
    times,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BEYOND: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    LOADED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state and the queue after a tile's positions; all of them are the tile's if it is WHOLE."""
    batch, d0, lane, there = place[0], place[1], place[3], place[4]
    window, t, end = times
    terms = terms_of(rows, bias_row, D_row, z, SOFTPLUS, UNROLL)
    out = ()
    for u in tl.static_range(UNROLL):
        is_here = (window + u >= t) & (window + u < end)
        after = advanced(state, A2, bias_row, terms, weights[0], u, SOFTPLUS, True, TILE)
        is_edited = window + u == queue[1]
        if WHOLE:
            state = after
        else:
            state = tl.where(is_here, after, state)
            is_edited = is_edited & is_here
        if is_edited:
            state, queue = _edited(
                *(state, queue, source, place, batch_after, NUMBERS, CHANNELS, BEYOND, MASK_D or MASK_N),
                *(BLOCK_D, BLOCK_N, LOADED, TILE),
            )
        out = out + (read_out(state, D_row, terms, z, weights[1], u, True, TILE),)
    y_place = row_start(y, batch, d0, window, POS[5])
    for u in tl.static_range(UNROLL):
        is_here = (window + u >= t) & (window + u < end)
        if WHOLE:
            store_masked(y_place + (lane * y[3] + u * POS[5]), out[u], there, MASK_D)
        else:
            tl.store(y_place + (lane * y[3] + u * POS[5]), out[u], mask=there & is_here)
    return state, queue


@jit
@no_type_check
def scan_edited_tile(
    state,
    queue,
    A2,
    bias_row,
    D_row,
    rows,
    weights,
    z,
    y,
    source,
    place,
    batch_after,
    times,
    ends_element,
    firsts,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BEYOND: tl.constexpr,
    PARTIAL: tl.constexpr,
    SEVERAL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    LOADED: tl.constexpr,
):
    """The state and the queue after a tile.

    queue, source, place: see `queue_from`; batch_after: the next batch element, or the last; times: as of
    `triton_tiles`; firsts: the positions of the next element's first two edits, if there are SEVERAL.
    """
    given = (state, queue, A2, bias_row, D_row, rows, weights, z, y, source, place, batch_after)
    if not PARTIAL or times[2] - times[1] == UNROLL:
        whole = (times[1], times[1], times[2])
        state, queue = _edited_positions(
            *given,
            *(whole, POS, NUMBERS, CHANNELS, SOFTPLUS, BEYOND, MASK_D, MASK_N),
            *(BLOCK_D, BLOCK_N, UNROLL, TILE, LOADED, True),
        )
    else:
        state, queue = _edited_positions(
            *given,
            *(times, POS, NUMBERS, CHANNELS, SOFTPLUS, BEYOND, MASK_D, MASK_N),
            *(BLOCK_D, BLOCK_N, UNROLL, TILE, LOADED, False),
        )
    if SEVERAL:
        n_edits = source[0][2]
        edit = tl.where(ends_element, 0, queue[0])
        first = tl.where(ends_element, position(firsts[0], 0, n_edits), queue[1])
        following = tl.where(ends_element, firsts[1], queue[2])
        queue = (edit, first, following, queue[3], queue[4])
    return state, queue
