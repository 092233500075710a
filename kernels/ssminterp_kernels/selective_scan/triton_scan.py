"""Launches the forward pass of the selective scan in Triton and ties both passes into autograd."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssminterp_kernels.launching import launch, repeated
from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.triton_backward_plan import GRAIN
from ssminterp_kernels.selective_scan.triton_chunks import clear_kernel
from ssminterp_kernels.selective_scan.triton_forward import scan_forward_kernel
from ssminterp_kernels.selective_scan.triton_gradients import backward_plan, gradients
from ssminterp_kernels.selective_scan.triton_layouts import lanes_of_a_channel
from ssminterp_kernels.selective_scan.triton_plan import Plan, ceil_div, for_all_states, plan_scan, processor_count
from ssminterp_kernels.selective_scan.triton_tensors import (
    ScanTensors,
    edit_table,
    grouped,
    in_lines,
    new_states,
    numbers_of,
    placement,
    position_table,
    scan_tensors,
    strided,
    strided_state,
    strides_of_channels,
    strides_of_pos,
    tile_options,
)


def triton_scan(
    arguments: ScanArguments,
) -> tuple[
    Float[Tensor, "batch pos d_inner"],
    Float[Tensor, "batch n_positions d_inner d_state"] | None,
    Float[Tensor, "batch d_inner d_state"],
]:
    """y, the states asked for (None if none are) and the final state; takes arguments from `check_arguments`, with or
    without an axis of groups."""
    tensors = scan_tensors(arguments)
    if torch.compiler.is_compiling():
        # Imported here because the operators are built on this module.
        from ssminterp_kernels.selective_scan.triton_ops import scan_op

        y, states, final_state, _ = scan_op(*tensors, arguments.needs_graph)
        return y, None if arguments.states is None else states, final_state
    if arguments.needs_graph:
        y, states, final_state = _Scan.apply(*tensors)
    else:
        y, states, final_state, _ = scan_forward(tensors, save=False)
    return y, states, final_state


def forward_plan(s: ScanTensors, save: bool = False) -> Plan:
    """How the forward pass covers s; save: for a backward pass, too."""
    batch, length, d_inner = s.x.shape
    sizes = (batch, length, d_inner, s.A.shape[1], s.B.shape[2], processor_count(s.x.device))
    # Chunks of several waves: while some wait for the state before them, others have it; the more if many bytes wait.
    wanted = 96 if s.record_all else 24
    plan = plan_scan(*sizes, unroll=GRAIN, enough_warps=3, warps_wanted=wanted, widest_block=64)
    return for_all_states(plan, batch, length, sizes[-1], save, s.edits is not None) if s.record_all else plan


def scan_forward(
    s: ScanTensors, save: bool, every: int | None = None, batch: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, states, final_state, and if save is set the states before the segments of the backward pass.

    The last are [batch, n_segments, d_inner, d_state]; None if there is one segment only, which begins with the initial
    state. every: segments of that many positions (a multiple of 8) instead. batch: how many of the elements the
    backward pass will see at once, if not all.
    """
    return _forward(*s, save, every, batch)


@repeated
def _forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    *fields, save, every, elements = arguments
    s = grouped(ScanTensors(*fields))
    batch, length, _ = s.x.shape
    d_state = s.A.shape[1]
    plan = forward_plan(s, save)
    y = torch.empty_like(s.x)
    n_recorded = length if s.record_all else 0 if s.recorded is None else s.recorded.shape[0]
    states = None
    if s.record_all or s.recorded is not None:
        states = new_states(s, batch, n_recorded, dtype=s.states_dtype)
    final_state = new_states(s, batch)
    boundaries = segments = None
    segments_chunk = length
    if save:
        if every is None:
            backward = backward_plan(s, elements)
            segments, n_boundaries = (backward.head, backward.segment), backward.boundaries
            segments_chunk = backward.chunk_length
        else:
            segments, n_boundaries = (every, every), ceil_div(length, every)
            segments_chunk = n_boundaries * every
        boundaries = new_states(s, batch, n_boundaries) if n_boundaries > 1 else None
    recorded = position_table(s.recorded) if n_recorded else None
    start = s.initial_state if s.initial_state is None else s.initial_state.unsqueeze(1)
    decays = locals_ = ends = flags = None
    if plan.is_chunked:
        decays, locals_, ends = (new_states(s, batch, plan.n_chunks) for _ in range(3))
        flags = torch.empty(2 * plan.programs(batch), dtype=torch.int32, device=s.x.device)
        launch(clear_kernel, (-(-flags.shape[0] // 1024),), flags, flags.shape[0], BLOCK=1024, num_warps=4)
    tensors = (s.x, s.delta, s.z, s.A, s.B, s.C, s.D, s.bias, start)
    of_a_channel = min(plan.per_thread, plan.block_n)  # states that a thread holds
    # Where few warps are at work, waiting for one another costs more; with records it was measured so, too.
    within_warps = not s.record_all and (plan.max_registers == 255 or recorded is not None)
    ahead = _edits_ahead(s, plan)
    inside = ahead and not n_recorded and _more_edits_than_tiles(s, plan)
    launch(
        scan_forward_kernel,
        (plan.programs(-(-batch // plan.elements)),),
        *(strided(tensor) for tensor in tensors),
        *(edit_table(s.edits), strided(s.keep), strided(s.add), recorded),
        *(strided(y), strided(states), strided(boundaries), strided_state(final_state)),
        *(strided(decays), strided(locals_), strided(ends), flags, segments_chunk),
        *(batch, plan.elements, *placement(plan, length), d_state),
        POS=strides_of_pos(s.x, s.delta, s.z, s.B, s.C, y, states if s.record_all else None),
        NUMBERS=(numbers_of(s.keep), numbers_of(s.add)),
        CHANNELS=strides_of_channels(s.keep, s.add) if ahead else None,
        SOFTPLUS=s.softplus,
        RECORD_ALL=s.record_all,
        SEGMENTS=None if boundaries is None else segments,
        PARTIAL=(s.edits is not None and not inside) or length % plan.unroll != 0,
        # Addresses that stay the same take registers, which edits have to spare and nothing else has.
        SEVERAL=plan.elements > 1 or (plan.max_registers == 168 and s.edits is None),
        AHEAD=ahead and not inside,
        BEYOND=_beyond(s, plan, ahead),
        INSIDE=inside,
        # Where edits or records branch and few warps are at work, the next tile's loads would begin too late.
        EARLY=not s.record_all and s.edits is None and (recorded is None or plan.max_registers != 255),
        STATES=of_a_channel,
        LANES=lanes_of_a_channel(plan.block_n, of_a_channel),
        TOGETHER=min(8, plan.unroll),
        HELD=plan.held,
        **tile_options(plan, d_state, within_warps),
    )
    return y, states, final_state, boundaries


def _edits_ahead(s: ScanTensors, plan: Plan) -> bool:
    """Whether an edit's values are loaded a tile before it, which takes registers, or when it happens."""
    if s.edits is None or plan.states_of_a_thread > (8 if s.record_all else 16):
        return False
    return s.record_all or plan.max_registers == 255 or (plan.max_registers == 168 and len(_whole_states(s)) < 2)


def _more_edits_than_tiles(s: ScanTensors, plan: Plan) -> bool:
    """Whether so many positions are edited that tiles which begin with an edit would be of one or two positions."""
    return s.edits is not None and s.edits.shape[1] > ceil_div(s.x.shape[1], plan.unroll)


def _beyond(s: ScanTensors, plan: Plan, ahead: bool) -> bool:
    """Whether the tile after the next is brought to the L2 cache: with edits where few warps are at work, with all
    states as planned; and where a tile is lines of memory."""
    wanted = plan.beyond if s.record_all else ahead and plan.max_registers == 255
    return wanted and in_lines(s.x, s.delta, s.z, *_whole_states(s))


def _whole_states(s: ScanTensors) -> list[Tensor]:
    """Of keep and add those that are no numbers."""
    return [values for values in (s.keep, s.add) if values is not None and numbers_of(values) == 0]


_A, _D, _BIAS = (ScanTensors._fields.index(name) for name in ("A", "D", "bias"))


class _Scan(torch.autograd.Function):
    """The scan and its backward pass; saves the inputs and the states before segments."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        s = ScanTensors(*tensors)
        y, states, final_state, boundaries = scan_forward(s, save=True)
        ctx.save_for_backward(*s[:13], boundaries)
        ctx.flags = s[13:]
        ctx.set_materialize_grads(False)
        return y, states, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstates: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        *saved, boundaries = ctx.saved_tensors
        s = ScanTensors(*saved, *ctx.flags)
        wanted = ctx.needs_input_grad
        of_channels = wanted[_A] or wanted[_D] or wanted[_BIAS]
        return *gradients(s, boundaries, dy, dstates, dfinal, of_channels), None, None, None
