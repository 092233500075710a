"""Which programs, chunks of time and memory the backward scan takes for a given shape.

What it needs beside its inputs and outputs, as a part of all states (batch × pos × d_inner × d_state in float32):

- partial sums of dB and dC: 1/64 if 64 divides the channels of a group, else 1/32;
- of a chunk of c positions, the states before its segments, saved by the forward pass, and `planes` states;
- two numbers per channel and chunk: 2/16 of a state for 16 states a channel.

A plan keeps that within a twentieth (`MOST_MEMORY`) at the price of replaying some positions again, wherever it can:
not with fewer than 64 positions a chunk, nor with a short sequence so small a part of a full GPU that each element of
the batch has a program of its own. Then it takes the least, and for c positions of a program at most
1/64 + (u + 2/16)/c, with u = c/72 + 3 if states fit into rows of the gradients, else u = c/72 + 1 + 0.75 √c, where c is
rounded up to a multiple of 8; and one state more for each element of several that a program takes. Where rows of the
gradients could hold states but are not laid out for it, every second state of a segment is kept: u = c/72 + 20.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ssminterp_kernels.selective_scan.triton_plan import Plan, ceil_div, plan_scan

REGISTERS = 168  # of a thread: what 12 warps on a multiprocessor leave each
WARPS = 12  # on a multiprocessor at once
GRAIN = 8  # positions of which chunks and segments are multiples: the forward scan saves states between its tiles
SHORTEST_CHUNK = 32
MOST_MEMORY = 1 / 20  # of all states
# Of every so many states (second) before a segment's inner blocks so many (first) are kept; most first.
KEPT = ((1, 1), (15, 16), (7, 8), (6, 7), (5, 6), (4, 5), (3, 4), (5, 7), (2, 3), (3, 5), (1, 2), (3, 7), (2, 5))
TO_BEGIN = 3  # positions that take as long as to begin a program
LONGEST_PROGRAM = 256  # positions of several batch elements
LONGEST_SEGMENT = 72  # positions whose inner states, of all programs at once, still lie in the L2 cache


@dataclass(frozen=True, kw_only=True)
class BackwardPlan(Plan):
    """A chunk is taken in segments: its first `head` positions, then `segment` at a time; the last may be shorter.

    The forward pass saves the states before them, `boundaries`: none for one segment, which begins with the initial
    state. The backward pass walks a segment in blocks of `block_t` positions, and keeps `kept` of the states before its
    inner blocks (see `KEPT`): the first in shared memory, `planes` of them in memory of their own, the others in rows
    of as many `outputs` (dx, ddelta, dz) that it has not yet computed; with no outputs, all in memory of their own.
    Those that are not kept are replayed again from the last that is.

    Of short sequences a program takes `elements` of the batch, one after the other, and adds up their gradients of A.
    """

    block_t: int
    head: int
    segment: int
    boundaries: int
    kept: tuple[int, int]
    planes: int
    outputs: int

    @property
    def blocks_of_group(self) -> int:
        return ceil_div(self.group_size, self.block_d)

    @property
    def paired_blocks(self) -> int:
        """Partial sums over the channels of a group: two programs share one."""
        return ceil_div(self.blocks_of_group, 2)

    def with_own_planes(self) -> BackwardPlan:
        """The same for outputs in whose rows no states can lie: of these every second is kept."""
        blocks = (ceil_div(min(self.head, self.chunk_length), self.block_t), ceil_div(self.segment, self.block_t))
        return dataclasses.replace(self, outputs=0, kept=(1, 2), planes=_planes(*blocks, (1, 2), 0, 1))


@functools.lru_cache(maxsize=1024)
def plan_chunks(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    n_groups: int,
    n_processors: int,
    widest_block: int = 32,
    grain: int = GRAIN,
) -> Plan:
    """Chunks of the length that should be quickest, by what was measured on an H200 (`_cost_of_chunks`).

    grain: positions of which a chunk is a multiple.
    """
    sizes = (batch, length, d_inner, d_state, n_groups, n_processors)
    plan = plan_scan(*sizes, GRAIN, enough_warps=0, warps_wanted=0, widest_block=widest_block)
    warps = plan.programs(batch) * plan.num_warps
    shortest = min(length, SHORTEST_CHUNK)
    lengths = {ceil_div(max(shortest, ceil_div(length, n)), grain) * grain for n in range(1, 129)}
    slots = WARPS * n_processors
    chunk_length = min(sorted(lengths, reverse=True), key=lambda each: _cost_of_chunks(warps, length, each, slots))
    return dataclasses.replace(
        plan,
        max_registers=REGISTERS if plan.block_n <= 16 else None,
        chunk_length=chunk_length,
        n_chunks=ceil_div(length, chunk_length),
    )


@functools.lru_cache(maxsize=1024)
def plan_backward(
    batch: int, length: int, d_inner: int, d_state: int, n_groups: int, n_processors: int, itemsize: int, outputs: int
) -> BackwardPlan:
    """itemsize: bytes of a number of the inputs. outputs: how many gradients are as large as x (2, or 3 with z)."""
    # Wide programs write fewer partial sums, unless they would leave more lanes without a channel.
    wide = 64 if (d_inner // n_groups) % 64 == 0 else 32
    plan = plan_chunks(batch, length, d_inner, d_state, n_groups, n_processors, wide)
    chunk_length, n_chunks = plan.chunk_length, plan.n_chunks
    # A state has room in rows of whole blocks only if nothing of it is masked.
    if d_state != 16 or plan.group_size % plan.block_d:
        outputs = 0
    block_t = 4 if plan.block_n <= 32 else 2
    blocks_of_quarter = 16 // itemsize // block_t
    covered = min(chunk_length, length)
    lasting = length - (n_chunks - 1) * chunk_length
    sums = 2 * n_groups * ceil_div(ceil_div(plan.group_size, plan.block_d), 2) * length / d_inner
    slots = WARPS * n_processors / plan.num_warps
    options = []
    for elements in _elements_of_a_program(batch, length, plan.n_blocks, slots) if n_chunks == 1 else [1]:
        programs = ceil_div(batch, elements) * n_chunks / batch
        for (head, segment), kept in itertools.product(_segmentations(covered), KEPT):
            boundaries = (n_chunks - 1) * _segments(chunk_length, head, segment) + _segments(lasting, head, segment)
            boundaries = boundaries if boundaries > 1 else 0
            blocks = ceil_div(min(head, covered), block_t), ceil_div(segment, block_t) if covered > head else 0
            planes = _planes(*blocks, kept, outputs, blocks_of_quarter)
            memory = sums + boundaries + programs * (planes + 2 / d_state)
            replays = _replays(blocks[0], kept) + (_segments(covered, head, segment) - 1) * _replays(blocks[1], kept)
            too_much = max(0.0, memory - MOST_MEMORY * length)
            unlike = -batch % elements  # programs that all have as much to do are quickest
            options.append((too_much, replays, unlike, elements, memory, segment, head, kept, planes, boundaries))
    _, _, _, elements, _, segment, head, kept, planes, boundaries = min(options)
    fields: dict[str, Any] = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    fields |= {"elements": elements, "block_t": block_t, "head": head, "segment": segment, "boundaries": boundaries}
    return BackwardPlan(**fields, kept=kept, planes=planes, outputs=outputs)


def _elements_of_a_program(batch: int, length: int, n_blocks: int, slots: float) -> list[int]:
    """How many elements of the batch a program may take, if that should take at most a tenth longer than the best."""
    most = max(1, min(batch, LONGEST_PROGRAM // length))
    costs = [
        (each * length + TO_BEGIN) * _busy(ceil_div(batch, each) * n_blocks / slots) for each in range(1, most + 1)
    ]
    return [i + 1 for i, cost in enumerate(costs) if cost <= 1.1 * min(costs)]


def _segmentations(chunk_length: int) -> Iterator[tuple[int, int]]:
    """(head, segment) to choose from."""
    longest = min(LONGEST_SEGMENT, ceil_div(chunk_length, GRAIN) * GRAIN)
    for segment in range(GRAIN, longest + 1, GRAIN):
        for head in range(GRAIN, segment + 1, GRAIN):
            yield head, segment


def _segments(chunk_length: int, head: int, segment: int) -> int:
    return 1 + ceil_div(max(0, chunk_length - head), segment)


@functools.lru_cache(maxsize=4096)
def _planes(head_blocks: int, segment_blocks: int, kept: tuple[int, int], outputs: int, blocks_of_quarter: int) -> int:
    """How many of the states kept before inner blocks need memory of their own: at least one, which is dA in the end.

    The first waits in shared memory, the others in rows of the outputs as far as they fit there.
    Before block b of a segment is walked, the outputs of all blocks after it may be written. So the states before
    blocks 1 to b have the rows up to block b: of the segment, and of `head` positions before it. A quarter of a state
    takes the rows of `blocks_of_quarter` blocks of one output.
    """
    of, every = kept
    planes = 1
    in_shared_memory = min(1, outputs)
    for blocks, before in ((head_blocks, 0), (segment_blocks, head_blocks)):
        for b in range(1, blocks - 1):
            in_rows = (before + b + 1) // blocks_of_quarter * outputs // 4
            planes = max(planes, b * of // every - in_shared_memory - in_rows)
    return planes


@functools.lru_cache(maxsize=1024)
def _replays(blocks: int, kept: tuple[int, int]) -> int:
    """How many blocks of a segment are replayed again, because states before its inner blocks are not kept."""
    of, every = kept
    return sum(b - ceil_div(b * of // every * every, of) for b in range(1, blocks - 1))


def _busy(waves: float) -> float:
    """The time that waves of programs take, in full ones: one that fills a share of the slots takes a third of a full
    one's and as much of the rest as its share."""
    whole = int(waves)
    rest = waves - whole
    return whole + (1 + 2 * rest) / 3 * (rest > 0)


def _cost_of_chunks(warps: int, length: int, chunk_length: int, slots: int) -> float:
    """The backward pass's time in positions of a full GPU: waves of programs, and the pass that summarises chunks.

    Summarising takes a fifth of the pass itself; a short last chunk counts half.
    """
    chunks = (ceil_div(length, chunk_length) + length / chunk_length) / 2
    return (chunk_length + TO_BEGIN) * _busy(warps * chunks / slots) * (1 if chunk_length >= length else 1.2)
