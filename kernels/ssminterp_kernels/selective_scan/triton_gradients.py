"""Launches the backward pass of the selective scan in Triton: the gradients of everything that a scan takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.launching import launch, repeated, zeros
from ssminterp_kernels.selective_scan.triton_adjoint import combine_chunks_kernel, scan_adjoint_kernel
from ssminterp_kernels.selective_scan.triton_backward import scan_backward_kernel
from ssminterp_kernels.selective_scan.triton_backward_plan import BackwardPlan, plan_backward
from ssminterp_kernels.selective_scan.triton_chunks import clear_kernel
from ssminterp_kernels.selective_scan.triton_layouts import layouts_of, parts_of
from ssminterp_kernels.selective_scan.triton_plan import Plan, ceil_div, processor_count
from ssminterp_kernels.selective_scan.triton_sums import sum_parts
from ssminterp_kernels.selective_scan.triton_tensors import (
    ScanTensors,
    edit_table,
    grouped,
    masks_of,
    new_states,
    placement,
    position_table,
    strided,
    strided_state,
    strides_of_pos,
    tile_options,
)


def backward_plan(s: ScanTensors, batch: int | None = None) -> BackwardPlan:
    """How the backward pass covers s, or as many as `batch` of its elements, and which states are saved for it."""
    # Sizes that a compiler follows as symbols become those of this call.
    elements, length, d_inner = map(int, s.x.shape)
    batch = elements if batch is None else batch
    d_state, n_groups = int(s.A.shape[1]), 1 if s.B.dim() == 3 else int(s.B.shape[2])
    sizes = (batch, length, d_inner, d_state, n_groups, processor_count(s.x.device))
    return plan_backward(*sizes, s.x.dtype.itemsize, 2 if s.z is None else 3)


def scan_backward(
    s: ScanTensors,
    boundaries: Tensor | None,
    dy: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    of_channels: bool = True,
) -> dict[str, Tensor | None]:
    """The gradient of every tensor of the scan, by name, from those of its outputs (None means zero).

    of_channels: whether those of A, D and bias are wanted, which are sums over batch and pos.
    """
    return dict(zip(ScanTensors._fields, gradients(s, boundaries, dy, dstates, dfinal, of_channels), strict=False))


def gradients(
    s: ScanTensors,
    boundaries: Tensor | None,
    dy: Tensor | None,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    of_channels: bool,
) -> list[Tensor | None]:
    """As `scan_backward`, in the order of the tensors of s."""
    if dy is None:
        dy = zeros(s.x.shape, s.x.dtype, s.x.device)
    if dfinal is None:
        dfinal = zeros((s.x.shape[0], *s.A.shape), torch.float32, s.x.device)
    found = _backward(*s, boundaries, dy, dstates, dfinal, of_channels)
    # Sums are float32, those of B and C have the dtype of B.
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, s[:13], strict=True)]


@repeated
def _backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    *fields, boundaries, dy, dstates, dfinal, of_channels = arguments
    given = ScanTensors(*fields)
    s = grouped(given)
    batch, length, d_inner = s.x.shape
    d_state, n_groups = s.A.shape[1], s.B.shape[2]
    plan = backward_plan(s)
    n_saved = 0 if boundaries is None else boundaries.shape[1]
    if n_saved != plan.boundaries:
        raise ValueError(
            f"the forward pass saved {n_saved} states of each of {batch} elements, and their backward pass needs "
            f"{plan.boundaries}: tell scan_forward of the batch that it is for"
        )
    new = functools.partial(torch.empty, dtype=torch.float32, device=s.x.device)
    dx, ddelta = torch.empty_like(s.x), torch.empty_like(s.delta)
    dz = None if s.z is None else torch.empty_like(s.z)
    dkeep = dadd = None
    if s.edits is not None:
        dkeep, dadd = (new_states(s, batch, s.edits.shape[1]) for _ in range(2))
    n_sums = n_groups * plan.paired_blocks
    dweights = new(2, batch, length, n_sums, d_state)
    programs = ceil_div(batch, plan.elements) * plan.n_chunks  # of each block of channels
    dchannels = new(programs, 2, d_inner)
    dstart = None if s.initial_state is None else new_states(s, batch)
    layouts = layouts_of(plan.block_d, plan.block_n, plan.block_t, plan.num_warps)
    large = [tensor for tensor in (dx, ddelta, dz) if tensor is not None]
    if plan.outputs and not _hold_rows_of_states(large):
        plan = plan.with_own_planes()
    kept = new(plan.planes, programs, d_inner, d_state)
    masks = masks_of(plan, d_state)
    edits, keep, add, recorded = edit_table(s.edits), strided(s.keep), strided(s.add), position_table(s.recorded)
    tiles = {"BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "num_warps": plan.num_warps}
    future = strided_state(dfinal)
    if plan.is_chunked:
        future = strided(futures_of_chunks(s, plan, dy, dstates, dfinal, kept[0], dweights))
    launch(clear_kernel, (-(-dweights.numel() // 4096),), dweights, dweights.numel(), BLOCK=4096, num_warps=4)
    begin = strided(boundaries) if boundaries is not None else strided_state(s.initial_state)
    launch(
        scan_backward_kernel,
        (programs * plan.n_blocks,),
        *(
            strided(s.x),
            strided(s.delta),
            strided(s.z),
            strided(s.A),
            strided(s.B),
            strided(s.C),
            strided(s.D),
            strided(s.bias),
            begin,
        ),
        *(edits, keep, add, recorded, strided(dy), strided(dstates), future, strided(dx), strided(ddelta), strided(dz)),
        *((dweights,), (dchannels,), strided(dkeep), strided(dadd), strided_state(dstart), strided(kept)),
        *(batch, plan.elements, *placement(plan, length), d_inner, d_state),
        POS=(*strides_of_pos(s.x, s.delta, s.z, s.B, s.C, dy, dx, ddelta, dz), n_sums * d_state),
        SOFTPLUS=s.softplus,
        HEAD=plan.head,
        SEGMENT=plan.segment,
        MASK=length % plan.block_t != 0 or masks["MASK_D"],
        KEPT=plan.kept,
        PLANES=plan.planes,
        SEVERAL=plan.elements > 1,
        OUTPUTS=plan.outputs,
        MASK_N=masks["MASK_N"],
        BLOCK_T=plan.block_t,
        PARTS=parts_of(plan.block_d, plan.block_n, plan.num_warps),
        **tiles,
        **{name.upper(): layout for name, layout in layouts._asdict().items()},
        maxnreg=plan.max_registers,
    )
    dBC = sum_parts(dweights, 2 * batch * length * n_groups, n_sums // n_groups, d_state, s.B.dtype)
    dB, dC = dBC.view(2, batch, length, n_groups, d_state)
    dA = dD = dbias = None
    if of_channels:
        dA = sum_parts(kept[0], 1, programs, d_state * d_inner, s.A.dtype).view(d_inner, d_state)
        sums = sum_parts(dchannels, 1, programs, 2 * d_inner, torch.float32)
        dD, dbias = sums.view(-1).split((d_inner, d_inner))
        dD, dbias = None if s.D is None else dD, None if s.bias is None else dbias
    dB, dC = dB.view(given.B.shape), dC.view(given.C.shape)
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dstart, None, dkeep, dadd, None


def _hold_rows_of_states(outputs: list[Tensor]) -> bool:
    """Whether states can be kept in rows of these outputs: 16 bytes at a time, in the same places of each."""
    strides, itemsize = outputs[0].stride(), outputs[0].itemsize
    return strides[2] == 1 and all(
        each.dtype == outputs[0].dtype
        and each.stride() == strides
        and each.data_ptr() % 16 == each.stride(0) * itemsize % 16 == each.stride(1) * itemsize % 16 == 0
        for each in outputs
    )


def futures_of_chunks(
    s: ScanTensors,
    plan: Plan,
    dy: Tensor,
    dstates: Tensor | None,
    dfinal: Tensor | None,
    futures: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """dLoss/d(state after each chunk) from what comes after the chunk, [batch, n_chunks, d_inner, d_state].

    futures: where they shall be, of as many numbers. spare: memory that may be written meanwhile.
    """
    batch = s.x.shape[0]
    if s.recorded is not None and s.recorded.shape[0] == 0:
        dstates = None
    shape = (batch, plan.n_chunks, *s.A.shape)
    futures = new_states(s, *shape[:2]) if futures is None else futures.view(shape)
    if spare is None or spare.numel() < futures.numel():
        decays = new_states(s, *shape[:2])
    else:
        decays = spare.view(-1)[: futures.numel()].view(shape)
    events = s.edits is not None or (dstates is not None and s.recorded is not None)
    options = adjoint_options(s, plan, dy, events) | {"n_chunks": plan.n_chunks - 1}
    launch(
        scan_adjoint_kernel,
        (plan.programs(batch) - batch * plan.n_blocks,),
        *(strided(s.delta), strided(s.z), strided(s.A), strided(s.C), strided(s.bias), edit_table(s.edits)),
        *(strided(s.keep), position_table(s.recorded), strided(dy), strided(dstates), None, None, None),
        *(strided(decays), strided(futures)),
        **options,
    )
    _combine(decays, futures, dfinal)
    return futures


def adjoint_options(s: ScanTensors, plan: Plan, dy: Tensor, events: bool) -> dict[str, Any]:
    """What the scan of adjoints is told of its plan.

    events: there are positions between tiles, so that tiles may hold less than all their positions.
    """
    length, d_state = s.x.shape[1], s.A.shape[1]
    tiles = {name: value for name, value in tile_options(plan, d_state).items() if name not in ("BLOCK", "VALUES")}
    names = ("length", "chunk_length", "n_chunks", "n_blocks", "group_size", "d_state")
    return {
        **dict(zip(names, (*placement(plan, length), d_state), strict=True)),
        "POS": strides_of_pos(s.delta, dy, s.C, s.z),
        "SOFTPLUS": s.softplus,
        "PARTIAL": events or length % plan.unroll != 0,
        **tiles,
    }


def _combine(decays: Tensor, locals_: Tensor, start: Tensor | None) -> None:
    """Turn locals_ [batch, n_chunks, d_inner, d_state] into the adjoint with which every chunk begins."""
    batch, n_chunks, d_inner, d_state = locals_.shape
    whole = d_state * d_inner
    block = 128
    launch(
        combine_chunks_kernel,
        ((whole + block - 1) // block, batch),
        *(decays, locals_, strided(start), n_chunks, d_state, whole),
        BLOCK=block,
        AHEAD=8,
        num_warps=4,
    )
