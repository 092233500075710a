"""Launches the Triton kernel of one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.backends import on_device_of
from ssminterp_kernels.launching import launch, repeated
from ssminterp_kernels.scan_step.tensors import StepTensors
from ssminterp_kernels.scan_step.triton_step_kernel import scan_step_kernel
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2

_TILE = 512  # numbers of the state in one program


def triton_step(tensors: StepTensors, softplus: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """y and the new state; see `selective_scan_step`. Not differentiable."""
    if torch.compiler.is_compiling():
        # Imported here because the operators are built on this module.
        from ssminterp_kernels.scan_step.triton_step_ops import step_in_place_op, step_op

        if in_place:
            return step_in_place_op(*tensors, softplus), tensors.state
        return step_op(*tensors, softplus)
    after = tensors.state if in_place else torch.empty_like(tensors.state)
    return scan_step(*tensors, softplus, after), after


@repeated
def scan_step(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    after: Tensor,
) -> Tensor:
    """y of one position; writes the state after it into `after`, which may be `state`."""
    (batch, d_inner), d_state, n_groups = x.shape, A.shape[1], B.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = next_power_of_2(d_state)
    block_d = max(1, _TILE // block_n)
    n_blocks = -(-d_inner // block_d)
    with on_device_of(x):
        launch(
            scan_step_kernel,
            (batch * n_blocks,),
            *(_strided(state), _strided(x), _strided(delta), _strided(A), _strided(B), _strided(C), _strided(D)),
            *(_strided(z), _strided(bias), _strided(y), _strided(after)),
            *(d_inner, d_inner // n_groups, d_state, n_blocks),
            SOFTPLUS=softplus,
            ONE_GROUP=n_groups == 1,
            BLOCK_D=block_d,
            BLOCK_N=block_n,
        )
    return y


def _strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernel takes it: pointer and strides."""
    return None if tensor is None else (tensor, *tensor.stride())
