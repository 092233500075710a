"""What every backend of the one-step scan receives, checked and in one canonical form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.checks import once_per_layout


class StepTensors(NamedTuple):
    """The tensors of a step in one canonical form: B and C are [batch, n_groups, d_state]."""

    state: Float[Tensor, "batch d_inner d_state"]
    x: Float[Tensor, "batch d_inner"]
    delta: Float[Tensor, "batch d_inner"]
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch n_groups d_state"]
    C: Float[Tensor, "batch n_groups d_state"]
    D: Float[Tensor, " d_inner"] | None
    z: Float[Tensor, "batch d_inner"] | None
    delta_bias: Float[Tensor, " d_inner"] | None


def check_tensors(s: StepTensors) -> StepTensors:
    """The tensors in their canonical form. Raises ValueError for those that do not go together."""
    _check(*s)
    B, C = (weights.unsqueeze(1) if weights.dim() == 2 else weights for weights in (s.B, s.C))
    return s._replace(B=B, C=C)


@once_per_layout
def _check(*tensors: Any) -> None:
    s = StepTensors(*tensors)
    if s.x.dim() != 2 or s.A.dim() != 2 or 0 in s.x.shape or 0 in s.A.shape:
        raise ValueError(
            f"x must have the axes [batch, d_inner] and A [d_inner, d_state], none of them empty, got shapes "
            f"{list(s.x.shape)} and {list(s.A.shape)}"
        )
    batch, d_inner = s.x.shape
    d_state = s.A.shape[1]
    per_channel, per_batch = ("[d_inner]", (d_inner,)), ("[batch, d_inner]", (batch, d_inner))
    for name, tensor, (axes, expected) in (
        ("state", s.state, ("[batch, d_inner, d_state]", (batch, d_inner, d_state))),
        ("A", s.A, ("[d_inner, d_state]", (d_inner, d_state))),
        ("delta", s.delta, per_batch),
        ("z", s.z, per_batch),
        ("D", s.D, per_channel),
        ("delta_bias", s.delta_bias, per_channel),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name} must have the axes {axes} = {list(expected)} to go with x of shape {list(s.x.shape)}, "
                f"got shape {list(tensor.shape)}"
            )
    for name, tensor in s._asdict().items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be real floating point, got {tensor.dtype} of shape {list(tensor.shape)}")
        if tensor.device != s.x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {s.x.device}: move one of them")
    wide = torch.float64 if s.x.dtype == torch.float64 else torch.float32
    if s.state.dtype != wide:
        raise ValueError(
            f"state must be {wide} when x is {s.x.dtype}, got {s.state.dtype} of shape {list(s.state.shape)}"
        )
    if _n_groups("B", s.B, s) != _n_groups("C", s.C, s):
        raise ValueError(
            f"B and C must have the same number of groups, got shapes {list(s.B.shape)} and {list(s.C.shape)}"
        )


def _n_groups(name: str, weights: Tensor, s: StepTensors) -> int:
    """How many groups B or C has."""
    (batch, d_inner), d_state = s.x.shape, s.A.shape[1]
    grouped = weights.unsqueeze(1) if weights.dim() == 2 else weights
    if (
        grouped.dim() != 3
        or (grouped.shape[0], grouped.shape[2]) != (batch, d_state)
        or grouped.shape[1] == 0
        or d_inner % grouped.shape[1]
    ):
        raise ValueError(
            f"{name} must have the axes [batch, d_state] = {[batch, d_state]} or [batch, n_groups, d_state], n_groups "
            f"a divisor of d_inner = {d_inner}, to go with x of shape {list(s.x.shape)} and A of shape "
            f"{list(s.A.shape)}, got shape {list(weights.shape)}"
        )
    return grouped.shape[1]
