"""Which thread holds which elements of a tile, said to the compiler in Gluon.

Gluon is Triton's language with explicit layouts and shared memory (triton.experimental.gluon). The scans need both:
left to itself the compiler has every thread load and convert every row of B and C, moves rows of x or delta between
lanes at every position, and holds more states in registers than fit. Triton's interpreter knows no Gluon, so with
TRITON_INTERPRET=1 the same kernels are plain Triton, layouts are None, and a place in shared memory is a Python list.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)


class Layouts(NamedTuple):
    """How tiles lie; all None in the interpreter.

    In registers: tile, states [channel, d_state]; lines, a channel a lane, with what it sums over d_state; sums, sums
    over channels [position, part, d_state]; rows, B or C [pos, d_state].
    In shared memory: plain, as they are counted; values, a number per channel, those of a thread's tile side by side.
    """

    tile: Any
    lines: Any
    sums: Any
    rows: Any
    plain: Any
    values: Any


class ForwardLayouts(NamedTuple):
    """As `Layouts`; spread: tiles whose lanes lie side by side along d_state, so that stores fill whole lines.

    block: numbers per channel at several positions [pos, channel], which every thread has some of.
    """

    tile: Any
    spread: Any
    block: Any
    rows: Any
    plain: Any


class Parts(NamedTuple):
    """How a tile [channel, d_state] is split: into parts of as many states of a channel, and of as many channels.

    states: how many of a channel a thread holds next to each other; channels: a thread's, `groups` apart.
    """

    states: int
    channels: int
    groups: int


def parts_of(block_d: int, block_n: int, num_warps: int) -> Parts:
    """4 states of a thread's channels, of which it has block_d / groups."""
    states = min(4, block_n)
    lanes = min(32, block_n // states)
    groups = min(block_d, 32 // lanes * num_warps)
    return Parts(states, block_d // groups, groups)


def lanes_of_a_channel(block_n: int, states: int) -> int:
    """Of a tile of which a thread has so many states next to each other."""
    return min(32, max(1, block_n // states))


if INTERPRETED:
    jit = triton.jit

    def layouts_of(block_d: int, block_n: int, block_t: int, num_warps: int) -> Layouts:
        return Layouts(None, None, None, None, None, None)

    def forward_layouts_of(
        block_d: int, block_n: int, unroll: int, num_warps: int, per_thread: int, within_warps: bool = False
    ) -> ForwardLayouts:
        return ForwardLayouts(None, None, None, None, None)

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

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    jit = gluon.jit

    def layouts_of(block_d: int, block_n: int, block_t: int, num_warps: int) -> Layouts:
        """A thread has 4 states of every `groups`-th channel; see `Parts`."""
        warps = [num_warps, 1]
        states, _, groups = parts_of(block_d, block_n, num_warps)
        lanes = min(32, block_n // states)
        tile = gl.BlockedLayout([1, states], [32 // lanes, lanes], warps, [1, 0])
        lines = gl.BlockedLayout([1, block_n // states], [32, 1], warps, [1, 0])
        # Warps share the positions, so that lanes are left over for the parts.
        over = min(num_warps, 32 // lanes)
        sums = gl.BlockedLayout(
            [1, max(1, groups // over), states], [32 // lanes // over, over, lanes], [num_warps, 1, 1], [2, 1, 0]
        )
        lanes = min(block_n, 32)
        of_t = max(1, block_t * lanes // (32 * num_warps))
        rows = gl.BlockedLayout([of_t, block_n // lanes], [32 // lanes, lanes], warps, [1, 0])
        slots = [[1 << i] for i in range(block_d.bit_length() - 1)]
        apart = groups.bit_length() - 1
        values = gl.SharedLinearLayout([*slots[apart:], *slots[:apart]])
        return Layouts(tile, lines, sums, rows, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), values)

    def _spread_layout(block_d: int, block_n: int, num_warps: int) -> Any:
        """4 states of a thread, and in a warp the channels that it has if a thread has all states of a channel."""
        states = [[0, 1 << i] for i in range(block_n.bit_length() - 1)]
        channels = [[1 << i, 0] for i in range(block_d.bit_length() - 1)]
        of_warps = num_warps.bit_length() - 1
        inner = channels[: len(channels) - of_warps]
        lanes = [*states[2:], *inner][:5]
        registers = [*states[:2], *[base for base in (*states[2:], *inner) if base not in lanes]]
        return gl.DistributedLinearLayout(registers, lanes, channels[len(inner) :], [], [block_d, block_n])

    def forward_layouts_of(
        block_d: int, block_n: int, unroll: int, num_warps: int, per_thread: int, within_warps: bool = False
    ) -> ForwardLayouts:
        """per_thread: how many states of a channel a thread holds, at most; within_warps: whether tiles are spread over
        the lanes of a warp, which takes more instructions, and not by way of shared memory, where warps wait."""
        warps = [num_warps, 1]

        def tile(many: int) -> Any:
            lanes = min(32, block_n // min(block_n, many))
            return gl.BlockedLayout([1, min(block_n, many)], [32 // lanes, lanes], warps, [1, 0])

        lanes = min(block_d, 32)
        of_a_channel = lanes_of_a_channel(block_n, min(per_thread, block_n))
        parts = gl.BlockedLayout([1, 1, of_a_channel], [32 // lanes, lanes, 1], [num_warps, 1, 1], [2, 1, 0])
        lanes = min(block_n, 32)
        of_t = max(1, unroll * lanes // (32 * num_warps))
        rows = gl.BlockedLayout([of_t, block_n // lanes], [32 // lanes, lanes], warps, [1, 0])
        spread = _spread_layout(block_d, block_n, num_warps) if within_warps else tile(min(4, per_thread))
        plain = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        return ForwardLayouts(tile(per_thread), spread, gl.SliceLayout(2, parts), rows, plain)

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
