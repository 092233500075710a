"""The public one-step scan: checks its arguments, chooses a backend, and calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.backends import Backend, choose_backend
from ssminterp_kernels.launching import can_be_repeated, repeated
from ssminterp_kernels.scan_step.tensors import StepTensors, check_tensors
from ssminterp_kernels.scan_step.torch_step import torch_step
from ssminterp_kernels.selective_scan import selective_scan


class StepOutput(NamedTuple):
    """What a step returns.

    y: [batch, d_inner], in the dtype of x.
    state: [batch, d_inner, d_state], the state after the position.
    """

    y: Tensor
    state: Tensor


def selective_scan_step(
    state: Float[Tensor, "batch d_inner d_state"],
    x: Float[Tensor, "batch d_inner"],
    delta: Float[Tensor, "batch d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch *n_groups d_state"],
    C: Float[Tensor, "batch *n_groups d_state"],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    *,
    in_place: bool = False,
    backend: Backend = "auto",
) -> StepOutput:
    """`selective_scan` of one position: h = exp(Δ A) · state + Δ B x, y = C · h + D · x (times SiLU(z)).

    The state is float32 whatever the dtype of the inputs, whose strides may be any; float64 when x is float64. On a
    GPU it is one kernel. Where autograd records, the step is `selective_scan` over a sequence of length 1, whose
    gradients and backends it then has.

    delta: before bias and softplus if `delta_bias` and `delta_softplus` are given, else the step size Δ itself.
    B, C: [batch, d_state], or [batch, n_groups, d_state] where n_groups divides d_inner.
    in_place: write the new state over the old one, which is then what is returned.
    backend: "torch" for any device and dtype, "triton" for float32, bfloat16 and float16 on CUDA (on the CPU only
        under TRITON_INTERPRET=1), or "auto" for triton where it can be had.

    Raises ValueError, naming the argument and both shapes, if shapes, devices or dtypes do not agree, and for in_place
    while autograd records what depends on the state.

    >>> state, A = torch.zeros(2, 4, 3), -torch.rand(4, 3)
    >>> x, delta, B, C = torch.randn(2, 4), torch.rand(2, 4), torch.randn(2, 3), torch.randn(2, 3)
    >>> out = selective_scan_step(state, x, delta, A, B, C)
    >>> out.y.shape, out.state.shape
    (torch.Size([2, 4]), torch.Size([2, 4, 3]))
    """
    tensors = (state, x, delta, A, B, C, D, z, delta_bias)
    if can_be_repeated(*tensors):
        y, after = _step_again(*tensors, delta_softplus, in_place, backend)
        return StepOutput(y, state if after is None else after)
    return _step(StepTensors(*tensors), delta_softplus, in_place, backend)


@repeated
def _step_again(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """y, and the state after it unless it was put in the place of the old one."""
    *tensors, delta_softplus, in_place, backend = arguments
    y, state = _step(StepTensors(*tensors), delta_softplus, in_place, backend)
    return y, None if in_place else state


def _step(tensors: StepTensors, delta_softplus: bool, in_place: bool, backend: Backend) -> StepOutput:
    tensors = check_tensors(tensors)
    chosen = choose_backend(tensors.x, backend)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        if in_place:
            raise ValueError("in_place overwrites a state that autograd needs: leave it out, or use torch.no_grad()")
        return _differentiable(tensors, delta_softplus, backend)
    if chosen == "triton":
        # Imported on first use: Triton is not installed everywhere.
        from ssminterp_kernels.scan_step.triton_step import triton_step

        return StepOutput(*triton_step(tensors, delta_softplus, in_place))
    return StepOutput(*torch_step(tensors, delta_softplus, in_place))


def _differentiable(s: StepTensors, softplus: bool, backend: Backend) -> StepOutput:
    x, delta, B, C = (tensor[:, None] for tensor in (s.x, s.delta, s.B, s.C))
    z = None if s.z is None else s.z[:, None]
    out = selective_scan(x, delta, s.A, B, C, s.D, z, s.delta_bias, softplus, initial_state=s.state, backend=backend)
    return StepOutput(out.y[:, 0], out.final_state)
