"""The tensors of a selective scan as the Triton kernels take them, and what the kernels are told of their plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.triton_layouts import forward_layouts_of
from ssminterp_kernels.selective_scan.triton_plan import Plan


class ScanTensors(NamedTuple):
    """The tensors of a scan as the kernels take them.

    B, C: [batch, pos, d_state] or [batch, pos, n_groups, d_state]; edits: int64 positions [batch or 1, n_edits]; keep,
    add: [batch, n_edits, d_inner, d_state], expanded; recorded: int64 positions [n_recorded]; states_dtype: that of
    recorded states.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    initial_state: Tensor | None
    edits: Tensor | None
    keep: Tensor | None
    add: Tensor | None
    recorded: Tensor | None
    softplus: bool
    record_all: bool
    states_dtype: torch.dtype


def scan_tensors(arguments: ScanArguments) -> ScanTensors:
    """Arguments as the kernels take them; nothing is copied but lists of positions."""
    x, A, edits = arguments.x, arguments.A, arguments.edits
    positions = keep = add = None
    if edits is not None:
        shape = (x.shape[0], edits.n_edits, x.shape[2], A.shape[1])
        keep, add = edits.keep.expand(shape), edits.add.expand(shape)
        if isinstance(edits.positions, Tensor):
            positions = edits.positions.to(x.device, torch.int64).contiguous()
        else:
            positions = _positions_on(x.device, edits.positions).unsqueeze(0)
    record_all = arguments.states == "all"
    recorded = None
    if arguments.states is not None and not record_all:
        recorded = _positions_on(x.device, tuple(arguments.recorded_positions))
    return ScanTensors(
        *(x, arguments.delta, A, arguments.B, arguments.C, arguments.D, arguments.z, arguments.delta_bias),
        *(arguments.initial_state, positions, keep, add, recorded, arguments.delta_softplus, record_all),
        arguments.recorded_dtype,
    )


def _positions_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(positions, dtype=torch.int64, device=device)
    return _kept_positions_on(device, positions)


@functools.lru_cache(maxsize=64)
def _kept_positions_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    """Positions as a tensor; kept, because sending a handful of numbers to the GPU takes as long as a short scan."""
    return torch.tensor(positions, dtype=torch.int64, device=device)


def new_states(s: ScanTensors, *leading: int | torch.SymInt, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor [*leading, d_inner, d_state]."""
    return torch.empty(*leading, *s.A.shape, dtype=dtype, device=s.x.device)


def strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it: pointer and strides."""
    return None if tensor is None else (tensor, *tensor.stride())


def strided_state(state: Tensor | None) -> tuple[Any, ...] | None:
    """A state [batch, d_inner, d_state] as a trajectory of one position."""
    return None if state is None else strided(state.unsqueeze(1))


def strides_of_pos(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.stride(1) for tensor in tensors)


def in_lines(*tensors: Tensor | None) -> bool:
    """Whether what lies side by side on the last axis does so in memory."""
    return all(tensor is None or tensor.stride(-1) == 1 for tensor in tensors)


def strides_of_channels(*states: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if state is None else state.stride(-2) for state in states)


def edit_table(positions: Tensor | None) -> tuple[Any, ...] | None:
    """(positions, stride of the batch axis: 0 if shared, n_edits)."""
    if positions is None:
        return None
    return positions, 0 if positions.shape[0] == 1 else positions.shape[1], positions.shape[1]


def position_table(positions: Tensor | None) -> tuple[Any, ...] | None:
    return None if positions is None else (positions, positions.shape[0])


def grouped(s: ScanTensors) -> ScanTensors:
    """With an axis of groups in B and C. Autograd is not asked to follow, whose bookkeeping would cost more."""
    B, C = (weights.unsqueeze(2) if weights.dim() == 3 else weights for weights in (s.B, s.C))
    return s._replace(B=B, C=C)


def numbers_of(values: Tensor | None) -> int:
    """What the items [d_inner, d_state] of keep or add are: 0 if tiles, 1 if one number each, 2 if one for all."""
    if values is None or not values.stride(-1) == values.stride(-2) == 0:
        return 0
    return 2 if all(values.shape[axis] == 1 or values.stride(axis) == 0 for axis in (0, 1)) else 1


def placement(plan: Plan, length: int) -> tuple[int, ...]:
    return length, plan.chunk_length, plan.n_chunks, plan.n_blocks, plan.group_size


def masks_of(plan: Plan, d_state: int) -> dict[str, bool]:
    return {"MASK_D": plan.group_size % plan.block_d != 0, "MASK_N": plan.block_n != d_state}


@functools.lru_cache(maxsize=256)
def tile_options(plan: Plan, d_state: int, within_warps: bool = False) -> Mapping[str, Any]:
    """What the kernels in tiles of positions are told of their plan; within_warps: see `forward_layouts_of`."""
    sizes = (plan.block_d, plan.block_n, plan.unroll, plan.num_warps, plan.per_thread)
    layouts = forward_layouts_of(*sizes, within_warps=within_warps)
    return {
        **{"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "UNROLL": plan.unroll, "num_warps": plan.num_warps},
        **{name.upper(): layout for name, layout in layouts._asdict().items()},
        **masks_of(plan, d_state),
        "maxnreg": plan.max_registers,
    }
