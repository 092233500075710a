"""The Triton step as torch.library operators, so that `torch.compile` takes it as it is.

Eager calls go to the kernel directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.scan_step import triton_step

_INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool softplus"
)


@torch.library.custom_op(
    "ssminterp::selective_scan_step",
    mutates_args=(),
    schema=f"(Tensor state, {_INPUTS}) -> (Tensor y, Tensor after)",
)
def step_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y and the new state; see `triton_step.scan_step`."""
    after = torch.empty_like(arguments[0])
    return triton_step.scan_step(*(*arguments, after)), after


@step_op.register_fake
def _(state: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(state)


@torch.library.custom_op(
    "ssminterp::selective_scan_step_", mutates_args=("state",), schema=f"(Tensor(a!) state, {_INPUTS}) -> Tensor"
)
def step_in_place_op(*arguments: Any) -> Tensor:
    """y; the new state goes over the old one."""
    return triton_step.scan_step(*(*arguments, arguments[0]))


@step_in_place_op.register_fake
def _(state: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)
