"""The selective scan for float32 on the CPU: what surrounds the compiled loops of `numba_kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssminterp_kernels.selective_scan import numba_kernels as kernels
from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.cpu_threads import run_on_threads
from ssminterp_kernels.selective_scan.torch_scan import read_out, step_size

# Updates of one state coordinate, about 0.15 ms of them: what a thread must find to do to be worth waking.
_WORK_PER_THREAD = 500_000


class _Plan(NamedTuple):
    """What the scan does besides arithmetic on its tensors."""

    record_at: kernels.Array
    n_recorded: int
    edit_at: kernels.Array


class _Tensors(NamedTuple):
    """The differentiable inputs, float32."""

    x: Float[Tensor, "batch pos d_inner"]
    delta: Float[Tensor, "batch pos d_inner"]
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos n_groups d_state"]
    C: Float[Tensor, "batch pos n_groups d_state"]
    initial_state: Float[Tensor, "batch d_inner d_state"]
    keep: Float[Tensor, "batch n_edits d_inner d_state"]
    add: Float[Tensor, "batch n_edits d_inner d_state"]


class _Around(NamedTuple):
    """What the forward pass takes along when no graph is needed, and leaves to torch when one is."""

    delta_bias: Float[Tensor, " d_inner"] | None = None
    delta_softplus: bool = False
    D: Float[Tensor, " d_inner"] | None = None
    z: Float[Tensor, "batch pos d_inner"] | None = None


def numba_scan(
    arguments: ScanArguments,
) -> tuple[
    Float[Tensor, "batch pos d_inner"],
    Float[Tensor, "batch n_positions d_inner d_state"] | None,
    Float[Tensor, "batch d_inner d_state"],
]:
    """y, the states asked for (None if none are) and the final state; takes arguments from `check_arguments`.

    x must be float32 on the CPU. Every output is differentiable, once, with respect to every tensor argument. Uses
    up to `torch.get_num_threads()` threads. Recorded states are stored with the channels innermost, so `states` is a
    view with strides of its own; to bfloat16 they are rounded once all are recorded.
    """
    plan = _plan(arguments)
    if arguments.needs_graph:
        y, states, final_state = _Scan.apply(plan, *_tensors(arguments, step_size(arguments)))
        y = read_out(y, arguments)
    else:
        around = _Around(arguments.delta_bias, arguments.delta_softplus, arguments.D, arguments.z)
        y, states, final_state, _ = _run_forward(plan, _tensors(arguments, arguments.delta), around, save=False)
    if arguments.states is None:
        return y, None, final_state
    return y, states.transpose(2, 3).to(arguments.recorded_dtype), final_state


def _plan(arguments: ScanArguments) -> _Plan:
    batch, length, _, _ = arguments.sizes
    positions = arguments.recorded_positions
    record_at, edit_at = np.full(length, -1, np.int32), np.full((batch, length), -1, np.int32)
    if positions:
        record_at[list(positions)] = np.arange(len(positions))
    if arguments.edits is not None:
        edited = np.asarray(arguments.edits.positions, np.int64)  # [n_edits] or [batch, n_edits]
        edit_at[np.arange(batch)[:, None], edited] = np.arange(arguments.edits.n_edits)
    return _Plan(record_at, len(positions), edit_at)


def _tensors(arguments: ScanArguments, delta: Tensor) -> _Tensors:
    batch, _, d_inner, d_state = arguments.sizes
    zero = torch.zeros(())
    initial_state = arguments.initial_state
    if initial_state is None:
        initial_state = zero.expand(batch, d_inner, d_state)
    keep = add = zero.expand(batch, 1, d_inner, d_state)
    if arguments.edits is not None:
        shape = (batch, arguments.edits.n_edits, d_inner, d_state)
        keep, add = arguments.edits.keep.float().expand(shape), arguments.edits.add.float().expand(shape)
    A, B, C = arguments.A.float(), arguments.B.float(), arguments.C.float()
    return _Tensors(arguments.x, delta.float().contiguous(), A, B, C, initial_state, keep, add)


def _run_forward(
    plan: _Plan, tensors: _Tensors, around: _Around, save: bool
) -> tuple[
    Float[Tensor, "batch pos d_inner"],
    Float[Tensor, "batch n_positions d_state d_inner"],
    Float[Tensor, "batch d_inner d_state"],
    Float[Tensor, "n_chunks batch d_state d_inner"],
]:
    x, delta, A, B, C, initial_state, keep, add = tensors
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    y = torch.empty(batch, length, d_inner)
    recorded = torch.empty(batch, plan.n_recorded, d_state, d_inner)
    final_state = torch.empty(batch, d_inner, d_state)
    boundaries = torch.empty(-(-length // kernels.REPLAY) if save else 0, batch, d_state, d_inner)
    bias, D = (
        torch.zeros(d_inner) if per_channel is None else per_channel.float().contiguous()
        for per_channel in (around.delta_bias, around.D)
    )
    gated = around.z is not None
    gate = x if around.z is None else around.z.float()
    inputs = (*_arrays(x, delta, A, B, C, bias), around.delta_softplus, *_arrays(D, gate), gated)
    state_inputs = (*_arrays(initial_state), plan.edit_at, *_arrays(keep, add), plan.record_at)
    _run(kernels.forward_kernel(), tensors, *inputs, *state_inputs, *_arrays(y, recorded, final_state, boundaries))
    return y, recorded, final_state, boundaries


def _run_backward(
    plan: _Plan,
    tensors: _Tensors,
    boundaries: Tensor,
    grad_y: Tensor | None,
    grad_recorded: Tensor | None,
    grad_final: Tensor | None,
) -> _Tensors:
    x, delta, A, B, C, initial_state, keep, add = tensors
    (batch, length, d_inner), d_state, n_groups = x.shape, A.shape[1], B.shape[2]
    n_blocks = kernels.n_blocks(d_inner, n_groups)
    zero = torch.zeros(())
    incoming = (
        zero.expand_as(x) if grad_y is None else grad_y,
        zero.expand(batch, plan.n_recorded, d_state, d_inner) if grad_recorded is None else grad_recorded,
        zero.expand_as(initial_state) if grad_final is None else grad_final,
    )
    grad_x, grad_delta = torch.empty(2, batch, length, d_inner)
    grad_A, grad_initial = torch.empty(2, batch, d_inner, d_state)
    grad_B, grad_C = torch.empty(2, n_blocks, batch, length, d_state)
    grad_keep, grad_add = torch.empty(2, *keep.shape)
    outgoing = (grad_x, grad_delta, grad_A, grad_B, grad_C, grad_initial, grad_keep, grad_add)
    inputs = (*_arrays(x, delta, A, B, C), plan.edit_at, *_arrays(keep, add), plan.record_at, *_arrays(boundaries))
    _run(kernels.backward_kernel(), tensors, *inputs, *_arrays(*incoming), *_arrays(*outgoing))

    def of_groups(blocks: Tensor) -> Tensor:
        return blocks.unflatten(0, (n_groups, -1)).sum(1).permute(1, 2, 0, 3)

    return _Tensors(
        grad_x, grad_delta, grad_A.sum(0), of_groups(grad_B), of_groups(grad_C), grad_initial, grad_keep, grad_add
    )


def _arrays(*tensors: Tensor) -> list[kernels.Array]:
    return [tensor.detach().numpy() for tensor in tensors]


def _run(kernel: Callable[..., None], tensors: _Tensors, *arrays: Any) -> None:
    """Run all tasks of a kernel, on torch's number of threads if there is enough to do for all of them."""
    (batch, length, d_inner), d_state = tensors.x.shape, tensors.A.shape[1]
    n_tasks = batch * kernels.n_blocks(d_inner, tensors.B.shape[2])
    # All or one: libgomp ends threads when a team is smaller than the one before, and torch would start them again.
    n_threads = torch.get_num_threads()
    if n_tasks == 1 or batch * length * d_inner * d_state < _WORK_PER_THREAD * n_threads:
        n_threads = 1
    counter = np.zeros(1, np.int64)
    run_on_threads(lambda: kernel(counter, n_tasks, *arrays), n_threads)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Any) -> Any:
        y, recorded, final_state, boundaries = _run_forward(plan, _Tensors(*tensors), _Around(), save=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(boundaries, *tensors)
        return y, recorded, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_recorded: Tensor | None, grad_final: Tensor | None) -> Any:
        boundaries, *tensors = ctx.saved_tensors
        gradients = _run_backward(ctx.plan, _Tensors(*tensors), boundaries, grad_y, grad_recorded, grad_final)
        wanted = ctx.needs_input_grad[1:]
        return None, *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
