"""Which programs, chunks of time and memory the backward scan takes for a given shape.

What it needs beside its inputs and outputs, as a part of all states (batch × pos × d_inner × d_state in float32):

- partial sums of dB and dC: 1/64 if 64 divides the channels of a group, else 1/32;
- of a chunk of c positions, the states before its segments, saved by the forward pass, and `planes` states: together at
  most c/72 + 1.5 √c + 1 of c states. A chunk has at least 32 positions, unless that is all there are;
- two numbers per channel and chunk: 2/16 of a state for 16 states a channel.

In float32 with z that is 3.0 % at (8, 2048, 5120), 3.7 % at (1, 16384, 2048), 4.0 % at (8, 512, 2048), on an H200.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ssminterp_kernels.selective_scan.triton_plan import Plan, ceil_div, plan_scan

REGISTERS = 168  # of a thread: what 12 warps on a multiprocessor leave each
WARPS = 12  # on a multiprocessor at once
GRAIN = 8  # positions of which chunks and segments are multiples: the forward scan saves states between its tiles
SHORTEST_CHUNK = 32
LONGEST_SEGMENT = 72  # positions whose inner states, of all programs at once, still lie in the L2 cache


@dataclass(frozen=True, kw_only=True)
class BackwardPlan(Plan):
    """A chunk is taken in segments: its first `head` positions, then `segment` at a time; the last may be shorter.

    The forward pass saves the states before them, `boundaries`: none for one segment, which begins with the initial
    state. The backward pass walks a segment in blocks of `block_t` positions, and keeps the states before its inner
    blocks: `planes` of them in memory of their own, the others in rows of as many `outputs` (dx, ddelta, dz) that it
    has not yet computed.
    """

    block_t: int
    head: int
    segment: int
    boundaries: int
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
        """The same for outputs in whose rows no states can lie."""
        return dataclasses.replace(self, outputs=0, planes=_planes(dataclasses.replace(self, outputs=0)))


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
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    chunk_length, n_chunks = plan.chunk_length, plan.n_chunks
    # A state has room in rows of whole blocks only if nothing of it is masked.
    if d_state != 16 or plan.group_size % plan.block_d:
        outputs = 0
    block_t = 4 if plan.block_n <= 32 else 2
    options = []
    for head, segment in _segmentations(min(chunk_length, length)):
        boundaries = (n_chunks - 1) * _segments(chunk_length, head, segment)
        boundaries += _segments(length - (n_chunks - 1) * chunk_length, head, segment)
        cut = {"block_t": block_t, "head": head, "segment": segment, "boundaries": boundaries if boundaries > 1 else 0}
        option = BackwardPlan(**fields, **cut, planes=0, outputs=outputs)
        options.append(dataclasses.replace(option, planes=_planes(option, 16 // itemsize // block_t)))
    return min(options, key=lambda each: (each.boundaries + n_chunks * each.planes, each.segment))


def _segmentations(chunk_length: int) -> Iterator[tuple[int, int]]:
    """(head, segment) to choose from."""
    longest = min(LONGEST_SEGMENT, ceil_div(chunk_length, GRAIN) * GRAIN)
    for segment in range(GRAIN, longest + 1, GRAIN):
        for head in range(GRAIN, segment + 1, GRAIN):
            yield head, segment


def _segments(chunk_length: int, head: int, segment: int) -> int:
    return 1 + ceil_div(max(0, chunk_length - head), segment)


def _planes(plan: BackwardPlan, blocks_of_quarter: int = 1) -> int:
    """How many of the states before a segment's inner blocks do not fit into rows of the outputs; at least one, whose
    memory dA takes in the end.

    Before block b of a segment is walked, the outputs of all blocks after it may be written. So the states before
    blocks 1 to b have the rows up to block b: of the segment, and of `head` positions before it. A quarter of a state
    takes the rows of `blocks_of_quarter` blocks of one output.
    """

    def suffice(planes: int, blocks: int, before: int) -> bool:
        return all(
            ceil_div(4 * (k + 1 - planes), plan.outputs) * blocks_of_quarter <= before + k + 2
            for k in range(planes, blocks - 2)
        )

    head_blocks = ceil_div(min(plan.head, plan.chunk_length), plan.block_t)
    segment_blocks = ceil_div(plan.segment, plan.block_t) if plan.chunk_length > plan.head else 0
    most = max(1, head_blocks - 2, segment_blocks - 2)
    if plan.outputs == 0:
        return most
    return next(
        planes
        for planes in range(1, most + 1)
        if suffice(planes, head_blocks, 0) and suffice(planes, segment_blocks, head_blocks)
    )


def _cost_of_chunks(warps: int, length: int, chunk_length: int, slots: int) -> float:
    """The backward pass's time in positions of a full GPU: waves of programs, and the pass that summarises chunks.

    A wave that fills a share of the slots takes a third of a full one's time and as much of the rest as its share. To
    begin a chunk costs what 3 positions do; summarising, a fifth of the pass itself; a short last chunk counts half.
    """
    chunks = (ceil_div(length, chunk_length) + length / chunk_length) / 2
    waves = warps * chunks / slots
    whole = int(waves)
    rest = waves - whole
    busy = whole + (1 + 2 * rest) / 3 * (rest > 0)
    return (chunk_length + 3) * busy * (1 if chunk_length >= length else 1.2)
