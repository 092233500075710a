"""Which thread holds which elements of a tile, said to the compiler in Gluon.

Gluon is Triton's language with explicit layouts and shared memory (triton.experimental.gluon). The backward scan needs
both: left to itself the compiler moves every row of x or delta between lanes at every position, and holds more states
in registers than fit. Triton's interpreter knows no Gluon, so with TRITON_INTERPRET=1 the same kernels are plain
Triton, layouts are None, and a place in shared memory is a Python list.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)


class Layouts(NamedTuple):
    """How tiles lie; all None in the interpreter.

    In registers: tile, states [channel, d_state]; across, the same for sums over channels; rows, B or C [pos, d_state].
    In shared memory: states, a tile; weights, rows of B or C; values, a number per channel.
    """

    tile: Any
    across: Any
    rows: Any
    states: Any
    weights: Any
    values: Any


if INTERPRETED:
    jit = triton.jit

    def layouts_of(block_d: int, block_n: int, block_t: int, num_warps: int) -> Layouts:
        return Layouts(None, None, None, None, None, None)

    @no_type_check
    def channel_numbers(BLOCK_D, TILE):
        return tl.arange(0, BLOCK_D)

    @no_type_check
    def state_numbers(BLOCK_N, TILE):
        return tl.arange(0, BLOCK_N)

    @no_type_check
    def full_tile(value, BLOCK_D, BLOCK_N, TILE):
        return tl.full((BLOCK_D, BLOCK_N), value, tl.float32)

    @no_type_check
    def full_row(value, BLOCK_D, TILE):
        return tl.full((BLOCK_D,), value, tl.float32)

    @no_type_check
    def state_numbers_across(BLOCK_N, ACROSS):
        return tl.arange(0, BLOCK_N)

    @no_type_check
    def position_numbers(BLOCK_T, ROWS):
        return tl.arange(0, BLOCK_T)

    @no_type_check
    def row_state_numbers(BLOCK_N, ROWS):
        return tl.arange(0, BLOCK_N)

    @no_type_check
    def shared_tiles(COUNT, BLOCK_D, BLOCK_N, STATES):
        return tuple([None] for _ in range(COUNT))

    @no_type_check
    def shared_values(COUNT, BLOCK_D, VALUES):
        return tuple([None] for _ in range(COUNT))

    @no_type_check
    def shared_rows(BLOCK_T, BLOCK_N, WEIGHTS):
        return [None]

    @no_type_check
    def put(place, tensor):
        place[0] = tensor

    @no_type_check
    def take_tile(place, TILE):
        return place[0]

    @no_type_check
    def take_value(place, TILE):
        return place[0]

    @no_type_check
    def take_row(place, i, TILE):
        at = tl.arange(0, place[0].shape[0]) == i
        return tl.sum(tl.where(at[:, None], place[0], 0.0), 0)[None, :]

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    jit = gluon.jit

    def layouts_of(block_d: int, block_n: int, block_t: int, num_warps: int) -> Layouts:
        """At most 16 states of a channel in a thread, the lanes and warps along the channels."""
        warps = [num_warps, 1]
        per_thread = min(block_n, 16)
        lanes = block_n // per_thread
        tile = gl.BlockedLayout([1, per_thread], [32 // lanes, lanes], warps, [1, 0])
        # Two states a lane, and the lanes over whole rows of 128 bytes: reading across meets no conflict either.
        pairs = max(1, min(block_n // 2, 32))
        across = gl.BlockedLayout([1, min(block_n, 2)], [32 // pairs, pairs], warps, [1, 0])
        lanes = min(block_n, 32)
        of_t = max(1, block_t * lanes // (32 * num_warps))
        rows = gl.BlockedLayout([of_t, block_n // lanes], [32 // lanes, lanes], warps, [1, 0])
        # A channel's 16 states are 64 bytes; moving every second channel's by 16 lets 8 lanes write without conflict.
        states = gl.SwizzledSharedLayout(min(4, block_n), 2, 4 if block_n >= 16 else 1, [1, 0])
        return Layouts(
            tile, across, rows, states, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), gl.SwizzledSharedLayout(1, 1, 1, [0])
        )

    @jit
    @no_type_check
    def channel_numbers(BLOCK_D: tl.constexpr, TILE: tl.constexpr):
        return gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, TILE))

    @jit
    @no_type_check
    def state_numbers(BLOCK_N: tl.constexpr, TILE: tl.constexpr):
        return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, TILE))

    @jit
    @no_type_check
    def full_tile(value, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):
        return gl.full([BLOCK_D, BLOCK_N], value, gl.float32, TILE)

    @jit
    @no_type_check
    def full_row(value, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
        return gl.full([BLOCK_D], value, gl.float32, gl.SliceLayout(1, TILE))

    @jit
    @no_type_check
    def state_numbers_across(BLOCK_N: tl.constexpr, ACROSS: tl.constexpr):
        return gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ACROSS))

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
    def shared_tiles(COUNT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STATES: tl.constexpr):
        """Places for COUNT tiles. Each is memory of its own, so that using one waits for nobody who uses another."""
        places = ()
        for _ in tl.static_range(COUNT):
            places = places + (gl.allocate_shared_memory(gl.float32, [BLOCK_D, BLOCK_N], STATES),)
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
    def shared_rows(BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHTS: tl.constexpr):
        """A place for BLOCK_T rows of B or C."""
        return gl.allocate_shared_memory(gl.float32, [BLOCK_T, BLOCK_N], WEIGHTS)

    @jit
    @no_type_check
    def put(place, tensor):
        place.store(tensor)

    @jit
    @no_type_check
    def take_tile(place, TILE: tl.constexpr):
        return place.load(TILE)

    @jit
    @no_type_check
    def take_value(place, TILE: tl.constexpr):
        return place.load(gl.SliceLayout(1, TILE))

    @jit
    @no_type_check
    def take_row(place, i, TILE: tl.constexpr):
        """Row i [1, BLOCK_N] of B or C."""
        return place.slice(i, 1).load(TILE)
