"""Which thread holds which elements of a tile, and the functions by which kernels say so to the compiler.

Gluon is Triton's language with explicit layouts and shared memory (triton.experimental.gluon). The scans need both:
left to itself the compiler has every thread load and convert every row of B and C, moves rows of x or delta between
lanes at every position, and holds more states in registers than fit. Triton's interpreter knows no Gluon, so with
TRITON_INTERPRET=1 the same kernels are plain Triton and layouts are None.

Here are the layouts, and how they are chosen. The functions that kernels call, and `jit`, are imported from here too:
they stand in `triton_gluon`, and for the interpreter under the same names in `triton_interpreted`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton import knobs
from triton.experimental.gluon import language as gl

INTERPRETED = bool(knobs.runtime.interpret)

if INTERPRETED:
    from ssminterp_kernels.selective_scan.triton_interpreted import *  # noqa: F403
else:
    from ssminterp_kernels.selective_scan.triton_gluon import *  # noqa: F403


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

    block: numbers per channel at several positions [pos, channel], which every thread has some of. values: tiles in
    shared memory, written in the spread layout and read in the other without conflicts.
    """

    tile: Any
    spread: Any
    block: Any
    rows: Any
    plain: Any
    values: Any


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


def layouts_of(block_d: int, block_n: int, block_t: int, num_warps: int) -> Layouts:
    """A thread has 4 states of every `groups`-th channel; see `Parts`."""
    if INTERPRETED:
        return Layouts(None, None, None, None, None, None)
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
    if INTERPRETED:
        return ForwardLayouts(None, None, None, None, None, None)
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
    # Rows shorter than a line of 32 banks are shifted from line to line, 4 numbers at a time.
    values = gl.SwizzledSharedLayout(min(4, block_n), max(1, 32 // block_n), min(8, max(1, block_n // 4)), [1, 0])
    return ForwardLayouts(tile(per_thread), spread, gl.SliceLayout(2, parts), rows, plain, values)
