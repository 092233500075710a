"""Tiles, places in shared memory and sums, in layouts that kernels name: functions for kernels, in Gluon.

Gluon is Triton's language with explicit layouts and shared memory (triton.experimental.gluon). `triton_interpreted`
has a namesake of each; `triton_layouts` picks between the two, and kernels import from there.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

jit = gluon.jit


@jit
@no_type_check
def channel_numbers(BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """Of a tile or of lines."""
    return gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, TILE))


@jit
@no_type_check
def state_numbers(BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, TILE))


@jit
@no_type_check
def sum_numbers(COUNT: tl.constexpr, SUMS: tl.constexpr):
    return gl.arange(0, COUNT, layout=gl.SliceLayout(1, gl.SliceLayout(1, SUMS)))


@jit
@no_type_check
def summed_state_numbers(BLOCK_N: tl.constexpr, SUMS: tl.constexpr):
    return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))


@jit
@no_type_check
def full_tile(value, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):
    return gl.full([BLOCK_D, BLOCK_N], value, gl.float32, TILE)


@jit
@no_type_check
def full_row(value, BLOCK_D: tl.constexpr, LINES: tl.constexpr):
    return gl.full([BLOCK_D], value, gl.float32, gl.SliceLayout(1, LINES))


@jit
@no_type_check
def position_numbers(BLOCK_T: tl.constexpr, ROWS: tl.constexpr):
    return gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, ROWS))


@jit
@no_type_check
def row_state_numbers(BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ROWS))


@jit
@no_type_check
def shared_tiles(COUNT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr):
    """Places for COUNT tiles. Each is memory of its own, so that using one waits for nobody who uses another."""
    places = ()
    for _ in tl.static_range(COUNT):
        places = places + (gl.allocate_shared_memory(gl.float32, [BLOCK_D, BLOCK_N], PLAIN),)
    return places


@jit
@no_type_check
def shared_values(COUNT: tl.constexpr, BLOCK_D: tl.constexpr, VALUES: tl.constexpr):
    """Places for COUNT rows of a number per channel."""
    places = ()
    for _ in tl.static_range(COUNT):
        places = places + (gl.allocate_shared_memory(gl.float32, [BLOCK_D], VALUES),)
    return places


@jit
@no_type_check
def shared_rows(BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr):
    """A place for BLOCK_T rows of B or C, or of numbers per channel."""
    return gl.allocate_shared_memory(gl.float32, [BLOCK_T, BLOCK_N], PLAIN)


@jit
@no_type_check
def shared_sums(COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A place for COUNT sums over channels; apart by what lets the lanes read two of them without conflict."""
    layout: tl.constexpr = gl.PaddedSharedLayout.with_identity_for(
        [[GROUPS * BLOCK_N, 16]], [COUNT, GROUPS, BLOCK_N], [2, 1, 0]
    )
    return gl.allocate_shared_memory(gl.float32, [COUNT, GROUPS, BLOCK_N], layout)


@jit
@no_type_check
def put(place, tensor):
    place.store(tensor)


@jit
@no_type_check
def take_tile(place, TILE: tl.constexpr):
    """All that was put there."""
    return place.load(TILE)


@jit
@no_type_check
def take_value(place, LAYOUT: tl.constexpr):
    """A number per channel, for a tile or for lines."""
    return place.load(gl.SliceLayout(1, LAYOUT))


@jit
@no_type_check
def take_row(place, i, TILE: tl.constexpr):
    """Row i [1, BLOCK_N] of B or C."""
    return place.slice(i, 1).load(TILE)


@jit
@no_type_check
def prefetch(pointers, wanted):
    """Begin to bring the lines of memory in which these numbers are to the L2 cache; no register waits for them."""
    gl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        *("=r,l,r", [pointers.to(gl.int64), wanted.to(gl.int32)], gl.int32, False, 1),
    )


@jit
@no_type_check
def spread(tile, SPREAD: tl.constexpr):
    return gl.convert_layout(tile, SPREAD)


@jit
@no_type_check
def take_column(place, i: tl.constexpr, TILE: tl.constexpr):
    """Row i of a block [pos, channel] as a column [channel, 1]."""
    return place.slice(i, 1).permute((1, 0)).load(TILE)


@jit
@no_type_check
def held_blocks(COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """A place for COUNT blocks [BLOCK_T, BLOCK_D] of numbers as they come from memory."""
    layout: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(DTYPE, [COUNT, BLOCK_T, BLOCK_D], layout)


@jit
@no_type_check
def hold(place, i, block):
    """Put a block where `take_held` finds it."""
    place.index(i).store(block)


@jit
@no_type_check
def take_held(place, i, BLOCK: tl.constexpr):
    return place.index(i).load(BLOCK)


@jit
@no_type_check
def shared_parts(COUNT: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr):
    """A place for parts of COUNT sums over d_state."""
    layout: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(gl.float32, [COUNT, BLOCK_D, LANES], layout)


@jit
@no_type_check
def part_over_states(tile, STATES: tl.constexpr, LANES: tl.constexpr):
    """The sums over d_state of a tile, as far as each of the LANES of a channel can add them, STATES in a row."""
    parts = gl.reshape(tile, [tile.shape[0], tile.shape[1] // STATES // LANES, LANES, STATES])
    return tl.sum(tl.sum(parts, 3), 1)


@jit
@no_type_check
def _in_pairs(tensors, HALF: tl.constexpr):
    """The first and the second half of the tensors, joined along a new last axis."""
    pairs = ()
    for i in tl.static_range(HALF):
        pairs = pairs + (gl.join(tensors[i], tensors[i + HALF]),)
    return pairs


@jit
@no_type_check
def put_parts(place, first: tl.constexpr, parts, COUNT: tl.constexpr):
    """Leave the parts of COUNT sums from the first-th on; together: there is a barrier between any two stores."""
    for level in tl.static_range(1, COUNT.bit_length()):
        parts = _in_pairs(parts, COUNT >> level)
    together = gl.reshape(parts[0], [place.shape[1], place.shape[2], COUNT])
    place.slice(first, COUNT).store(gl.permute(together, [2, 0, 1]))


@jit
@no_type_check
def take_parts(place, BLOCK: tl.constexpr):
    """All sums over d_state [COUNT, BLOCK_D] that were left."""
    return tl.sum(place.load(BLOCK.parent), 2)


@jit
@no_type_check
def put_over_states(place, tile, STATES: tl.constexpr):
    """Leave the sums over d_state of a tile, as far as a thread can add them."""
    parts = gl.reshape(tile, [tile.shape[0], tile.shape[1] // STATES, STATES])
    place.store(tl.sum(parts, 2))


@jit
@no_type_check
def take_over_states(place, LINES: tl.constexpr):
    """The sums over d_state [BLOCK_D] of what was left, a channel a lane."""
    return tl.sum(place.load(LINES), 1)


@jit
@no_type_check
def part_over_channels(tile, CHANNELS: tl.constexpr):
    """The sums over channels of a tile, as far as a thread can add them."""
    parts = gl.reshape(tile, [CHANNELS, tile.shape[0] // CHANNELS, tile.shape[1]])
    return tl.sum(parts, 0)


@jit
@no_type_check
def put_two_over_channels(place, i, first, second):
    """Leave such parts as sums i and i + 1: two at once, because the compiler puts a barrier between any two."""
    place.slice(i, 2).store(gl.permute(gl.join(first, second), [2, 0, 1]))


@jit
@no_type_check
def take_over_channels(place, SUMS: tl.constexpr):
    """All sums over channels [COUNT, BLOCK_N] that were left."""
    return tl.sum(place.load(SUMS), 1)
