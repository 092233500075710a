"""Which tiles, and whether time is cut into chunks, for a scan of a given shape."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

WARPS_FORWARD = 12  # on a multiprocessor at once, at 168 registers a thread
HELD = 10  # tiles of 8 positions and 64 float32 channels: the most that leave room for four programs


class Tiles(NamedTuple):
    """Of a program that writes all states or all adjoints in one pass over time; its channels with 16 states each."""

    programs: float  # for every multiprocessor at least so many, or else tiles further down the list
    channels: int
    positions: int
    beyond: bool
    per_thread: int  # states, for adjoints
    registers: int  # of a thread at most, for adjoints


# As measured on an H200; narrow ones are for adjoints alone. Where programs do not come out even, some have more of the
# bandwidth the further ahead they read, and the others are the last.
WIDE = (
    Tiles(2.0, 64, 16, True, 4, 128),
    Tiles(1.01, 64, 8, False, 4, 128),
    Tiles(0.72, 64, 8, True, 4, 128),
    Tiles(0.64, 64, 16, False, 2, 64),
    Tiles(0.5, 64, 16, True, 2, 64),
)
NARROW = (
    Tiles(0.4, 32, 64, False, 2, 128),
    Tiles(0.9, 8, 64, False, 2, 168),
)


@dataclass(frozen=True)
class Plan:
    """How one kernel covers [batch, pos, d_inner, d_state]."""

    block_n: int
    block_d: int
    num_warps: int
    unroll: int
    max_registers: int | None
    group_size: int
    n_blocks: int
    chunk_length: int
    n_chunks: int
    per_thread: int = 16  # states of a channel that a thread holds, at most
    elements: int = 1  # batch elements that a program takes one after the other
    held: int = 0  # tiles whose x and delta a program of a chunk can hold in shared memory
    beyond: bool = False  # whether the tile after the next is brought to the L2 cache

    @property
    def is_chunked(self) -> bool:
        return self.n_chunks > 1

    @property
    def states_of_a_thread(self) -> int:
        """Of all its channels."""
        return self.block_d * self.block_n // (32 * self.num_warps)

    def programs(self, batch: int) -> int:
        return batch * self.n_chunks * self.n_blocks


@functools.lru_cache(maxsize=1024)
def plan_scan(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    n_groups: int,
    n_processors: int,
    unroll: int,
    enough_warps: int,
    warps_wanted: int,
    widest_block: int = 32,
) -> Plan:
    """One pass over time if that has `enough_warps` per multiprocessor, else chunks to have at most `warps_wanted`.

    A program has at most `widest_block` channels, 32 of them a warp. Warps of one program share their rows of B and C.
    A chunk is a multiple of `unroll` positions. Remembered, because it would take a tenth of a short call's time.
    """
    group_size = d_inner // n_groups
    block_n = next_power_of_2(d_state)
    # At least a warp's width even of fewer channels: on tiles of a few half-precision numbers Triton's compiler fails.
    block_d = max(32, min(widest_block, next_power_of_2(group_size)))
    num_warps = max(1, min(8, block_n // 32)) * (block_d // 32)
    n_blocks = n_groups * ceil_div(group_size, block_d)
    warps_in_one_pass = batch * n_blocks * num_warps
    chunks = 1
    if warps_in_one_pass < enough_warps * n_processors:
        chunks = min(warps_wanted * n_processors // warps_in_one_pass, length // _shortest_chunk(length))
    # Two chunks would pay the second pass over time and win nothing.
    if chunks <= 2:
        chunks = 1
    unroll = _tile(unroll, length)
    chunk_length = ceil_div(ceil_div(length, chunks), unroll) * unroll
    n_chunks = ceil_div(length, chunk_length)
    max_registers = None
    if block_n <= 16:
        # Told a limit, the compiler uses all of it to overlap positions; else it guards an occupancy that does not pay.
        max_registers = 255 if warps_in_one_pass * n_chunks <= 8 * n_processors else 168
    elements = 1
    if n_chunks == 1:
        slots = max(1, WARPS_FORWARD * n_processors // num_warps)
        elements = _elements_of_a_program(batch, n_blocks, slots, length)
    return Plan(
        *(block_n, block_d, num_warps, unroll, max_registers, group_size, n_blocks, chunk_length, n_chunks),
        elements=elements,
    )


def _shortest_chunk(length: int) -> int:
    """Of how many positions a chunk is worth its second pass; below 128 none is."""
    if length < 128:
        return length
    return 16 if length < 256 else 32 if length < 1024 else 64


def _elements_of_a_program(batch: int, n_blocks: int, slots: int, length: int) -> int:
    """Of short sequences several, because to begin a program costs what some positions do; at most 64 positions."""
    to_begin = 8

    def cost(elements: int) -> float:
        waves = max(1.0, ceil_div(batch, elements) * n_blocks / slots)
        return waves * (elements * length + to_begin)

    return min(range(1, max(1, min(batch, 64 // length)) + 1), key=cost)


def for_trajectories(plan: Plan) -> Plan:
    """The plan for writing every state: lanes side by side along d_state, so that stores fill whole lines of memory."""
    per_thread = 4
    num_warps = min(8, max(1, plan.block_d * plan.block_n // (32 * per_thread)))
    return dataclasses.replace(plan, per_thread=per_thread, num_warps=num_warps, max_registers=None)


def for_all_adjoints(plan: Plan, batch: int, length: int, n_processors: int, edited: bool) -> Plan:
    """The plan for writing the adjoints of every state, if `plan` is one for scanning them.

    One pass over time, unless programs are too few even of 8 channels: the fewer channels, the longer the tiles,
    because a tile is how far ahead is read. An edit ends a tile, so that edits want short ones.
    """
    if edited:
        return for_trajectories(plan)
    n_groups = plan.n_blocks // ceil_div(plan.group_size, plan.block_d)
    for tiles in WIDE + NARROW:
        block_d = min(plan.block_d, max(8, tiles.channels * 16 // plan.block_n))
        n_blocks = n_groups * ceil_div(plan.group_size, block_d)
        elements, of_each = _shared_out(batch, length, n_blocks, n_processors, pairs=tiles in WIDE)
        if of_each >= tiles.programs:
            num_warps = max(1, min(16, block_d * plan.block_n // (32 * tiles.per_thread)))
            plan = dataclasses.replace(
                plan,
                block_d=block_d,
                n_blocks=n_blocks,
                per_thread=tiles.per_thread,
                num_warps=num_warps,
                max_registers=min(tiles.registers, 2048 // num_warps),
            )
            return _in_one_pass(plan, length, tiles.positions, tiles.beyond, elements)
    return for_trajectories(plan)


def for_all_states(plan: Plan, batch: int, length: int, n_processors: int, save: bool, edited: bool) -> Plan:
    """The plan for writing every state in the forward pass; save: those for the backward pass, too.

    One pass over time if most multiprocessors get a program and none gets two, or where the plan is one pass anyway;
    tiles of 8 positions if states are saved, which happens between tiles, or if edits cut them. In chunks or with edits
    two channels a thread share their rows of B and C. Chunks are so short that their inputs can be held between the two
    passes, unless edits cut their tiles or more states need the shared memory.
    """
    plan = for_trajectories(plan)
    elements, of_each = _shared_out(batch, length, plan.n_blocks, n_processors, pairs=not edited)
    with_two = dataclasses.replace(plan, num_warps=min(8, max(1, plan.block_d * plan.block_n // 256)))
    if plan.is_chunked and not 0.6 <= of_each <= 1:
        chunk_length = min(plan.chunk_length, HELD * plan.unroll)
        held = 0 if edited or plan.block_n > 16 else HELD
        return dataclasses.replace(
            with_two, chunk_length=chunk_length, n_chunks=ceil_div(length, chunk_length), held=held
        )
    if save or edited:
        return _in_one_pass(with_two if edited else plan, length, plan.unroll, of_each <= 1, elements)
    tiles = next((tiles for tiles in WIDE if of_each >= tiles.programs), WIDE[-1])
    return _in_one_pass(plan, length, tiles.positions, tiles.beyond, elements)


def _in_one_pass(plan: Plan, length: int, positions: int, beyond: bool, elements: int) -> Plan:
    """In tiles of so many positions, if the sequence has as many; beyond: if the sequence has a tile after the next."""
    unroll = _tile(positions, length)
    beyond = beyond and length > 2 * unroll
    return dataclasses.replace(plan, unroll=unroll, chunk_length=length, n_chunks=1, elements=elements, beyond=beyond)


def _shared_out(batch: int, length: int, n_blocks: int, n_processors: int, pairs: bool) -> tuple[int, float]:
    """How many batch elements a program takes, and how many programs every multiprocessor gets on average.

    Of very short sequences several; pairs: two where otherwise some multiprocessors would have two programs.
    """
    programs = batch * n_blocks
    elements = max(1, min(batch, ceil_div(16, length), programs // (2 * n_processors)))
    if pairs and batch % 2 == 0 and n_processors < programs <= 2 * n_processors:
        elements = 2
    return elements, ceil_div(batch, elements) * n_blocks / n_processors


def _tile(positions: int, length: int) -> int:
    """A tile of so many positions, or as many as fit into the sequence."""
    return min(positions, 1 << (length.bit_length() - 1))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def processor_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter, so that tiny shapes exercise chunking."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1
