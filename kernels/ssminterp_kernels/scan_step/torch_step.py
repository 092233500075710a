"""The one-step scan in plain torch, for any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.scan_step.tensors import StepTensors


def torch_step(
    s: StepTensors, softplus: bool, in_place: bool
) -> tuple[Float[Tensor, "batch d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """y and the new state; see `selective_scan_step`. Not differentiable."""
    wide = s.state.dtype
    step, x = s.delta.to(wide), s.x.to(wide)
    if s.delta_bias is not None:
        step = step + s.delta_bias.to(wide)
    if softplus:
        step = F.softplus(step)
    groups = (s.B.shape[1], -1)
    new = torch.exp(step[..., None] * s.A.to(wide)).mul_(s.state)
    # [batch, n_groups, channels of a group, d_state]
    written = (step * x).unflatten(1, groups)[..., None]
    new.unflatten(1, groups).addcmul_(written, s.B.to(wide)[:, :, None])
    y = torch.matmul(new.unflatten(1, groups), s.C.to(wide)[..., None]).reshape(x.shape)
    if s.D is not None:
        y = torch.addcmul(y, s.D.to(wide), x)
    if s.z is not None:
        y = y * F.silu(s.z.to(wide))
    return y.to(s.x.dtype), s.state.copy_(new) if in_place else new
