"""State differences times adjoints, summed over d_state at every position: attribution without storing states.

To first order, Σ (state_a − state_b) ⊙ dLoss_b/dstate_b is what the loss of run b would change by if run a's state were
patched in at that position (attribution patching, Nanda 2023; Syed et al. 2023, arXiv:2310.10348).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.backends import on_device_of
from ssminterp_kernels.checks import once_per_layout
from ssminterp_kernels.launching import can_be_repeated, repeated, zeros
from ssminterp_kernels.selective_scan.adjoint import adjoint_states
from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments, with_groups_axis
from ssminterp_kernels.selective_scan.interface import Backend, choose_backend, selective_scan

_CHUNK = 64  # positions whose states and adjoints the torch path holds at once


class ScanRun(NamedTuple):
    """The inputs of one run of a scan that its states depend on, beside A and delta's bias and softplus."""

    x: Float[Tensor, "batch pos d_inner"]
    delta: Float[Tensor, "batch pos d_inner"]
    B: Float[Tensor, "batch pos *n_groups d_state"]
    initial_state: Float[Tensor, "batch d_inner d_state"] | None = None


@torch.no_grad()
def contract_with_adjoint(
    a: ScanRun,
    b: ScanRun,
    dy: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    C: Float[Tensor, "batch pos *n_groups d_state"],
    z: Float[Tensor, "batch pos d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    dfinal_state: Float[Tensor, "batch d_inner d_state"] | None = None,
    sum_d_inner: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "batch pos *d_inner"]:
    """Σ over d_state of (state_a − state_b) ⊙ adjoint_b at every position, [batch, pos, d_inner].

    The adjoint is that of run b, whose output's gradient is dy and whose final state's is dfinal_state; C and z are
    b's, while A, delta_bias and delta_softplus are those of both. With `sum_d_inner` the sum runs over d_inner as well
    and the result is [batch, pos], with no [batch, pos, d_inner] in memory. Neither trajectory is ever in memory.
    Float32, or float64 for float64 runs.

    Raises ValueError as `selective_scan` does.
    """
    if dfinal_state is None:
        dfinal_state = zeros((dy.shape[0], *A.shape), torch.promote_types(dy.dtype, torch.float32), dy.device)
    arguments = (*a, *b, dy, A, C, z, delta_bias, dfinal_state, delta_softplus, sum_d_inner, backend)
    return _contract_again(*arguments) if can_be_repeated(dy) else _contract(*arguments)


def _contract(*arguments: Any) -> Tensor:
    *tensors, delta_softplus, sum_d_inner, backend = arguments
    _check(*tensors)
    a, b = ScanRun(*tensors[:4]), ScanRun(*tensors[4:8])
    dy, A, C, z, delta_bias, dfinal_state = tensors[8:]
    run_a, run_b = (
        with_groups_axis(
            ScanArguments(run.x, run.delta, A, run.B, C, None, z, delta_bias, delta_softplus, run.initial_state)
        )
        for run in (a, b)
    )
    if choose_backend(run_b, backend) == "triton":
        from ssminterp_kernels.selective_scan.triton_contract import triton_contract

        with on_device_of(dy):
            return triton_contract(run_a, run_b, dy, dfinal_state, sum_d_inner)
    return _torch_contract(run_a, run_b, dy, dfinal_state, sum_d_inner)


_contract_again = repeated(_contract)


@once_per_layout
def _check(*tensors: Any) -> None:
    a, b = ScanRun(*tensors[:4]), ScanRun(*tensors[4:8])
    dy, A, C, z, delta_bias, dfinal_state = tensors[8:]
    for run in (a, b):
        check_arguments(ScanArguments(run.x, run.delta, A, run.B, C, None, z, delta_bias, False, run.initial_state))
    check_arguments(ScanArguments(dy, b.delta, A, C, C, initial_state=dfinal_state))


def _torch_contract(
    a: ScanArguments, b: ScanArguments, dy: Tensor, dfinal_state: Tensor, sum_d_inner: bool
) -> Float[Tensor, "batch pos *d_inner"]:
    """Stretch by stretch of positions: states forwards from the state before it, adjoints backwards from after it."""
    length = dy.shape[1]
    cuts = [slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]
    before_a, before_b = (_states_before(run, cuts) for run in (a, b))
    out = torch.empty(dy.shape[: 2 if sum_d_inner else 3], dtype=b.state_dtype, device=dy.device)
    future = dfinal_state
    for i in reversed(range(len(cuts))):
        cut = cuts[i]
        difference = _states_in(a, cut, before_a[i]) - _states_in(b, cut, before_b[i])
        z = None if b.z is None else b.z[:, cut]
        adjoints = adjoint_states(
            *(dy[:, cut], b.delta[:, cut], b.A, b.C[:, cut], z, b.delta_bias, b.delta_softplus, future), backend="torch"
        )
        out[:, cut] = (difference * adjoints).sum((-2, -1) if sum_d_inner else -1)
        future = _step_back(b, adjoints[:, 0], cut.start)
    return out


def _states_before(run: ScanArguments, cuts: list[slice]) -> list[Tensor | None]:
    """The state before every stretch of positions."""
    states = [run.initial_state]
    for cut in cuts[:-1]:
        inputs = (run.x[:, cut], run.delta[:, cut], run.A, run.B[:, cut], run.C[:, cut], None, None, run.delta_bias)
        states.append(selective_scan(*inputs, run.delta_softplus, states[-1]).final_state)
    return states


def _states_in(run: ScanArguments, cut: slice, before: Tensor | None) -> Float[Tensor, "batch pos d_inner d_state"]:
    inputs = (run.x[:, cut], run.delta[:, cut], run.A, run.B[:, cut], run.C[:, cut], None, None, run.delta_bias)
    states = selective_scan(*inputs, run.delta_softplus, before, states="all").states
    assert states is not None
    return states


def _step_back(run: ScanArguments, adjoint: Tensor, t: int) -> Float[Tensor, "batch d_inner d_state"]:
    """The gradient of the state before position t, from the adjoint at t."""
    step = run.delta[:, t].to(adjoint.dtype)
    if run.delta_bias is not None:
        step = step + run.delta_bias.to(adjoint.dtype)
    step = F.softplus(step) if run.delta_softplus else step
    return torch.exp(step[..., None] * run.A.to(adjoint.dtype)) * adjoint
