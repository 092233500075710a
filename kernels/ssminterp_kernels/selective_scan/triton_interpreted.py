"""What `triton_gluon` says in Gluon, for Triton's interpreter, which knows no Gluon.

Layouts are None, a place in shared memory is a Python list, and sums are whole at once. Docstrings stand at the
functions' namesakes.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

jit = triton.jit


@no_type_check
def channel_numbers(BLOCK_D, TILE):
    return tl.arange(0, BLOCK_D)


@no_type_check
def state_numbers(BLOCK_N, TILE):
    return tl.arange(0, BLOCK_N)


@no_type_check
def sum_numbers(COUNT, SUMS):
    return tl.arange(0, COUNT)


@no_type_check
def summed_state_numbers(BLOCK_N, SUMS):
    return tl.arange(0, BLOCK_N)


@no_type_check
def full_tile(value, BLOCK_D, BLOCK_N, TILE):
    return tl.full((BLOCK_D, BLOCK_N), value, tl.float32)


@no_type_check
def full_row(value, BLOCK_D, LINES):
    return tl.full((BLOCK_D,), value, tl.float32)


@no_type_check
def position_numbers(BLOCK_T, ROWS):
    return tl.arange(0, BLOCK_T)


@no_type_check
def row_state_numbers(BLOCK_N, ROWS):
    return tl.arange(0, BLOCK_N)


@no_type_check
def shared_tiles(COUNT, BLOCK_D, BLOCK_N, PLAIN):
    return tuple([None] for _ in range(COUNT))


@no_type_check
def shared_values(COUNT, BLOCK_D, VALUES):
    return tuple([None] for _ in range(COUNT))


@no_type_check
def shared_rows(BLOCK_T, BLOCK_N, PLAIN):
    return [None]


@no_type_check
def shared_sums(COUNT, GROUPS, BLOCK_N):
    return [None] * COUNT


@no_type_check
def put(place, tensor):
    place[0] = tensor


@no_type_check
def take_tile(place, TILE):
    return place[0]


@no_type_check
def take_value(place, LAYOUT):
    return place[0]


@no_type_check
def take_row(place, i, TILE):
    at = tl.arange(0, place[0].shape[0]) == i
    return tl.sum(tl.where(at[:, None], place[0], 0.0), 0)[None, :]


@no_type_check
def prefetch(pointers, wanted):
    pass


@no_type_check
def spread(tile, SPREAD):
    return tile


@no_type_check
def take_column(place, i, TILE):
    at = tl.arange(0, place[0].shape[0]) == i
    return tl.sum(tl.where(at[:, None], place[0], 0.0), 0)[:, None]


@no_type_check
def held_blocks(COUNT, BLOCK_T, BLOCK_D, DTYPE):
    return [tl.full((BLOCK_T, BLOCK_D), 0.0, DTYPE)] * COUNT


@no_type_check
def hold(place, i, block):
    place[i] = block


@no_type_check
def take_held(place, i, BLOCK):
    return place[i]


@no_type_check
def shared_parts(COUNT, BLOCK_D, LANES):
    return []


@no_type_check
def part_over_states(tile, STATES, LANES):
    return tl.sum(tile, 1)


@no_type_check
def put_parts(place, first, parts, COUNT):
    place[first:] = parts


@no_type_check
def take_parts(place, BLOCK):
    return take_over_channels(place, None)


@no_type_check
def put_over_states(place, tile, STATES):
    place[0] = tl.sum(tile, 1)


@no_type_check
def take_over_states(place, LINES):
    return place[0]


@no_type_check
def part_over_channels(tile, CHANNELS):
    return tl.sum(tile, 0)


@no_type_check
def put_two_over_channels(place, i, first, second):
    place[i], place[i + 1] = first, second


@no_type_check
def take_over_channels(place, SUMS):
    i = tl.arange(0, len(place))
    total = tl.zeros((len(place), place[0].shape[0]), tl.float32)
    for k, row in enumerate(place):
        total += tl.where(i[:, None] == k, row[None, :], 0.0)
    return total
