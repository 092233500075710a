"""Edits in the forward scan: which is the next, and what it does to the state.

An edit is at the first position of its tile. What a program needs to know of the next tile's edit is under way while it
works on a tile.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    jit,
    prefetch,
    put,
    shared_tiles,
    state_numbers,
    take_tile,
)
from ssminterp_kernels.selective_scan.triton_rows import LINE_BYTES, events_before, load_edit, position, read_position


@jit
@no_type_check
def edits_from(edits, batch, t):
    """Where position t is among the edits: the number of the first from there on, whether it is at t, the position of
    the first after t, and the one after that as `read_position` gives it."""
    listed = edits[0] + batch * edits[1]
    edit = events_before(listed, edits[2], t)
    read = read_position(listed, edit, edits[2])
    read_second = read_position(listed, edit + 1, edits[2])
    read_third = read_position(listed, edit + 2, edits[2])
    later = position(read, edit, edits[2])
    edited = later == t
    later = tl.where(edited, position(read_second, edit + 1, edits[2]), later)
    return edit, edited, later, tl.where(edited, read_third, read_second)


@jit
@no_type_check
def read_first_edits(edits, batch):
    """The positions of an element's first two edits, as `read_position` gives them."""
    listed = edits[0] + batch * edits[1]
    return read_position(listed, 0, edits[2]), read_position(listed, 1, edits[2])


@jit
@no_type_check
def edits_after(here, edits, batch_next, t_next, ends_element, firsts, SEVERAL: tl.constexpr):
    """What `edits_from` says of the next tile, given what it says of this one; firsts: those of the next element."""
    edit, edited, later, read = here
    edit += edited.to(tl.int32)
    following = position(read, edit + 1, edits[2])
    if SEVERAL:
        edit = tl.where(ends_element, 0, edit)
        later = tl.where(ends_element, position(firsts[0], 0, edits[2]), later)
        following = tl.where(ends_element, position(firsts[1], 1, edits[2]), following)
    edited = later == t_next
    read = read_position(edits[0] + batch_next * edits[1], edit + edited.to(tl.int32) + 1, edits[2])
    return edit, edited, tl.where(edited, following, later), read


@jit
@no_type_check
def _value_start(tensor, batch, edit, n_edits):
    """Pointer to keep or add of an edit, or of the last if there is no such edit."""
    return tensor[0] + (batch * tensor[1] + tl.minimum(edit, n_edits - 1).to(tl.int64) * tensor[2])


@jit
@no_type_check
def _load_value(
    tensor,
    at,
    wanted,
    neutral,
    NUMBER: tl.constexpr,
    STRIDE: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOADED: tl.constexpr,
):
    """keep or add as `load_values` does."""
    batch, edit, n_edits, d0, d_end, d_state = at
    start = _value_start(tensor, batch, edit, n_edits)
    if NUMBER:
        loaded = tl.load(start, mask=wanted, other=neutral)
    else:
        d = channel_numbers(BLOCK_D, LOADED)
        n = state_numbers(BLOCK_N, LOADED)
        if MASK:
            wanted = wanted & (d0 + d < d_end)[:, None] & (n < d_state)[None, :]
        start += d0 * STRIDE
        loaded = tl.load(start + (d[:, None] * STRIDE + n[None, :] * tensor[4]), mask=wanted, other=neutral)
    return loaded.to(tl.float32)


@jit
@no_type_check
def only_number(tensor, NUMBER: tl.constexpr):
    """keep if it is one number for all edits."""
    number = 1.0
    if NUMBER == 2:
        number = tl.load(tensor[0]).to(tl.float32)
    return number


@jit
@no_type_check
def load_values(
    keep,
    add,
    at,
    wanted,
    only_kept,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOADED: tl.constexpr,
):
    """keep and add of an edit, or unless wanted what changes nothing: numbers, or tiles in whole lines of memory.

    at: batch, edit, n_edits, d0, d_end, d_state; only_kept: keep if NUMBERS says that it is one number for all;
    CHANNELS: strides of the channels.
    """
    if NUMBERS[0] == 2:
        kept = tl.where(wanted, only_kept, 1.0)
    else:
        kept = _load_value(keep, at, wanted, 1.0, NUMBERS[0], CHANNELS[0], MASK, BLOCK_D, BLOCK_N, LOADED)
    return kept, _load_value(add, at, wanted, 0.0, NUMBERS[1], CHANNELS[1], MASK, BLOCK_D, BLOCK_N, LOADED)


@jit
@no_type_check
def value_places(
    NUMBERS: tl.constexpr,
    AS_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Where keep and add of a tile's edit lie in shared memory, if they are states and not loaded AS_TILES."""
    places = ()
    for i in tl.static_range(2):
        if NUMBERS[i] or AS_TILES:
            places = places + ((),)
        else:
            places = places + (shared_tiles(1, BLOCK_D, BLOCK_N, VALUES),)
    return places


@jit
@no_type_check
def put_values(places, values):
    for i in tl.static_range(2):
        if len(places[i]) > 0:
            put(places[i][0], values[i])


@jit
@no_type_check
def taken_values(places, values, TILE: tl.constexpr):
    """keep and add as a program's tile has them, from where `put_values` put them."""
    kept, added = values
    if len(places[0]) > 0:
        kept = take_tile(places[0][0], TILE)
    if len(places[1]) > 0:
        added = take_tile(places[1][0], TILE)
    return kept, added


@jit
@no_type_check
def _prefetch_value(
    tensor, at, wanted, CHANNEL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr
):
    """keep or add as `prefetch_values` does."""
    batch, edit, n_edits, d0, d_end, d_state = at
    LINE: tl.constexpr = LINE_BYTES // 4
    SIDE: tl.constexpr = LINE // BLOCK_N if BLOCK_N < LINE else 1  # channels that are a line of memory side by side
    LINES: tl.constexpr = BLOCK_N // LINE if BLOCK_N > LINE else 1  # of a channel
    i = channel_numbers(BLOCK_D // SIDE * LINES, TILE)
    d = i // LINES * SIDE
    n = i % LINES * LINE
    start = _value_start(tensor, batch, edit, n_edits) + d0 * CHANNEL
    wanted = wanted & (d0 + d < d_end)
    if LINES > 1:
        wanted = wanted & (n < d_state)
    prefetch(start + (d * CHANNEL + n), wanted)


@jit
@no_type_check
def prefetch_values(
    keep,
    add,
    at,
    wanted,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Begin to bring keep and add of an edit to the L2 cache, as far as they are states.

    at and CHANNELS: as of `load_values`.
    """
    if NUMBERS[0] == 0:
        _prefetch_value(keep, at, wanted, CHANNELS[0], BLOCK_D, BLOCK_N, TILE)
    if NUMBERS[1] == 0:
        _prefetch_value(add, at, wanted, CHANNELS[1], BLOCK_D, BLOCK_N, TILE)


@jit
@no_type_check
def edited_state(state, edit_here, place, NUMBERS: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr):
    """The state after the first position of a tile, which may be edited.

    edit_here: the edits, keep and add, whether this tile has one and its number, and if values are loaded AHEAD, places
    in shared memory and values: the edit's, or such as change nothing.
    """
    if AHEAD:
        kept, added = taken_values(edit_here[5], edit_here[6], TILE)
        state = state * kept + added
    elif edit_here[3]:
        batch, d0, _d_end, lane, there, _group, n, n_there = place
        tile_there = there[:, None] & n_there[None, :]
        where = (batch, edit_here[4], edit_here[0][2], d0 + lane, n, tile_there)
        kept = load_edit(edit_here[1], *where, NUMBERS[0])
        added = load_edit(edit_here[2], *where, NUMBERS[1])
        state = state * kept + added
    return state
