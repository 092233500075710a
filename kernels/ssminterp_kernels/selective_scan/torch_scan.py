"""The selective scan in plain torch, for any device and dtype.

Time is cut into chunks. Inside a chunk everything is batched except the recurrence itself, which is one fused
multiply-add per position; across chunks only the state is carried. The backward pass recomputes the states of a chunk
from the state before it, so the graph holds one state per chunk instead of one per position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssminterp_kernels.selective_scan import torch_chunks as chunks
from ssminterp_kernels.selective_scan.arguments import ScanArguments


class _Plan(NamedTuple):
    """What the scan does besides arithmetic on its tensors."""

    length: int
    chunk: int
    recorded: Sequence[int]
    record_all: bool
    dtype: torch.dtype
    edits: chunks.EditTable

    def slices(self) -> list[slice]:
        return [slice(start, min(start + self.chunk, self.length)) for start in range(0, self.length, self.chunk)]

    def recorded_in(self, here: slice) -> Iterator[tuple[int, int]]:
        """(index among the recorded positions, position within the chunk) of what is recorded in a chunk."""
        for i, position in enumerate(self.recorded):
            if here.start <= position < here.stop:
                yield i, position - here.start


class _Tensors(NamedTuple):
    """The differentiable inputs: position first, in the state's dtype."""

    x: Float[Tensor, "pos batch d_inner"]
    delta: Float[Tensor, "pos batch d_inner"]
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "pos batch n_groups d_state"]
    C: Float[Tensor, "pos batch n_groups d_state"]
    initial_state: Float[Tensor, "batch d_inner d_state"]
    keep: Tensor | None
    add: Tensor | None


def torch_scan(
    arguments: ScanArguments,
) -> tuple[
    Float[Tensor, "batch pos d_inner"],
    Float[Tensor, "batch n_positions d_inner d_state"] | None,
    Float[Tensor, "batch d_inner d_state"],
]:
    """y, the states asked for (None if none are) and the final state; takes arguments from `check_arguments`.

    Every output is differentiable, once, with respect to every tensor argument.
    """
    length = arguments.x.shape[1]
    plan = _Plan(
        length=length,
        chunk=_chunk_length(length),
        recorded=arguments.recorded_positions,
        record_all=arguments.states == "all",
        dtype=arguments.recorded_dtype,
        edits=chunks.edit_table(arguments.edits),
    )
    tensors = _position_first(arguments)
    if arguments.needs_graph:
        y, states, final_state = _Scan.apply(plan, *tensors)
    else:
        y, states, final_state, _ = _forward(plan, tensors, save=False)
    y = read_out(y.transpose(0, 1), arguments)
    return y, None if arguments.states is None else states.transpose(0, 1), final_state


def step_size(arguments: ScanArguments) -> Float[Tensor, "batch pos d_inner"]:
    """Δ in the state's dtype: delta after its bias and softplus, where the arguments ask for them."""
    delta = arguments.delta.to(arguments.state_dtype)
    if arguments.delta_bias is not None:
        delta = delta + arguments.delta_bias.to(delta.dtype)
    return F.softplus(delta) if arguments.delta_softplus else delta


def read_out(y: Float[Tensor, "batch pos d_inner"], arguments: ScanArguments) -> Float[Tensor, "batch pos d_inner"]:
    """(y + D · x) · SiLU(z), where the arguments ask for them, in the dtype of x."""
    if arguments.D is not None:
        y = torch.addcmul(y, arguments.D.to(y.dtype), arguments.x.to(y.dtype))
    if arguments.z is not None:
        y = y * F.silu(arguments.z.to(y.dtype))
    return y.to(arguments.x.dtype)


def _position_first(arguments: ScanArguments) -> _Tensors:
    dtype = arguments.state_dtype
    batch, _, d_inner, d_state = arguments.sizes
    in_time = (arguments.x, arguments.delta, arguments.B, arguments.C)
    x, delta, B, C = (tensor.to(dtype).transpose(0, 1).contiguous() for tensor in in_time)
    # After the transposition: torch.compile expects gradients of softplus in the layout of its input.
    delta = step_size(arguments._replace(delta=delta))
    initial_state = arguments.initial_state
    if initial_state is None:
        initial_state = torch.zeros(batch, d_inner, d_state, dtype=dtype, device=x.device)
    keep = add = None
    if arguments.edits is not None:
        keep, add = arguments.edits.keep.to(dtype), arguments.edits.add.to(dtype)
    return _Tensors(x, delta, arguments.A.to(dtype), B, C, initial_state.to(dtype), keep, add)


def _chunk_length(length: int) -> int:
    """Long enough to batch the work, short enough that a chunk's states stay few beside those at the boundaries."""
    return min(length, max(32, math.isqrt(length)))


def _forward(
    plan: _Plan, tensors: _Tensors, save: bool
) -> tuple[
    Float[Tensor, "pos batch d_inner"],
    Float[Tensor, "n_positions batch d_inner d_state"],
    Float[Tensor, "batch d_inner d_state"],
    Float[Tensor, "n_chunks batch d_inner d_state"] | None,
]:
    """y without D and z, the recorded states, the final state and, if `save`, the state before each chunk."""
    x, delta, A, B, C, initial_state, keep, add = tensors
    y = torch.empty_like(x)
    recorded = x.new_empty(len(plan.recorded), *initial_state.shape, dtype=plan.dtype)
    in_place = plan.record_all and plan.dtype == x.dtype
    boundaries = x.new_empty(len(plan.slices()), *initial_state.shape) if save else None
    carried = initial_state
    for k, here in enumerate(plan.slices()):
        if boundaries is not None:
            boundaries[k] = carried
        decay = chunks.decays(delta[here], A)
        states = recorded[here] if in_place else torch.empty_like(decay)
        chunks.write_inputs(states, delta[here] * x[here], B[here])
        chunks.run_forward(states, decay, carried, here.start, plan.edits, keep, add)
        y[here] = chunks.contract_state(states, C[here])
        if plan.record_all and not in_place:
            recorded[here] = states
        elif not in_place:
            for i, t in plan.recorded_in(here):
                recorded[i] = states[t]
        carried = states[-1]
    return y, recorded, carried.clone(), boundaries


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Any) -> Any:
        y, recorded, final_state, boundaries = _forward(plan, _Tensors(*tensors), save=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(boundaries, *tensors)
        return y, recorded, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_states: Tensor | None, grad_final: Tensor | None) -> Any:
        boundaries, *saved = ctx.saved_tensors
        tensors = _Tensors(*saved)
        gradients = [
            torch.zeros_like(tensor) if wanted and tensor is not None else None
            for tensor, wanted in zip(tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        carried = torch.zeros_like(tensors.initial_state) if grad_final is None else grad_final
        for k, here in reversed(list(enumerate(ctx.plan.slices()))):
            carried = _backward_chunk(
                ctx.plan, tensors, _Gradients(*gradients), here, boundaries[k], carried, grad_y, grad_states
            )
        if gradients[5] is not None:
            gradients[5] = carried
        return None, *gradients


class _Gradients(NamedTuple):
    """Gradients of `_Tensors`, None for those that no one wants."""

    x: Tensor | None
    delta: Tensor | None
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    initial_state: Tensor | None
    keep: Tensor | None
    add: Tensor | None


def _backward_chunk(
    plan: _Plan,
    tensors: _Tensors,
    gradients: _Gradients,
    here: slice,
    before: Float[Tensor, "batch d_inner d_state"],
    carried: Float[Tensor, "batch d_inner d_state"],
    grad_y: Tensor | None,
    grad_states: Tensor | None,
) -> Float[Tensor, "batch d_inner d_state"]:
    """Add one chunk's share to `gradients`; returns the gradient of the state before the chunk.

    before: the state before the chunk. carried: the gradient of its last state from later chunks.
    """
    A, keep, add = tensors.A, tensors.keep, tensors.add
    x, delta, B, C = (tensor[here] for tensor in (tensors.x, tensors.delta, tensors.B, tensors.C))
    delta_x = delta * x
    unedited: chunks.Unedited = {}
    decay = chunks.decays(delta, A)
    states = torch.empty_like(decay)
    chunks.write_inputs(states, delta_x, B)
    chunks.run_forward(states, decay, before, here.start, plan.edits, keep, add, unedited)

    adjoints = torch.empty_like(states)
    if grad_y is None:
        adjoints.zero_()
    else:
        channels = grad_y[here].contiguous()
        chunks.write_inputs(adjoints, channels, C)
        if gradients.C is not None:
            gradients.C[here] = chunks.contract_channels(states, channels, C.shape[2])
    if grad_states is not None:
        for i, t in plan.recorded_in(here):
            adjoints[t] += grad_states[i]
    carried = chunks.run_backward(
        adjoints, decay, carried, here.start, plan.edits, keep, unedited, gradients.keep, gradients.add
    )

    if gradients.B is not None:
        gradients.B[here] = chunks.contract_channels(adjoints, delta_x, B.shape[2])
    if gradients.x is not None or gradients.delta is not None:
        grad_delta_x = chunks.contract_state(adjoints, B)
        if gradients.x is not None:
            gradients.x[here] = grad_delta_x * delta
        if gradients.delta is not None:
            gradients.delta[here] = grad_delta_x * x
    if gradients.delta is not None or gradients.A is not None:
        grad_exponent = decay.mul_(adjoints)
        grad_exponent[0] *= before
        grad_exponent[1:] *= states[:-1]
        if gradients.delta is not None:
            gradients.delta[here] += torch.einsum("tbcn,cn->tbc", grad_exponent, A)
        if gradients.A is not None:
            gradients.A.add_(torch.einsum("tbcn,tbc->cn", grad_exponent, delta))
    return carried
