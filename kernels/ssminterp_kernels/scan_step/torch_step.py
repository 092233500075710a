"""The one-step scan in plain torch, for any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def torch_step(
    state: Float[Tensor, "batch d_inner d_state"],
    x: Float[Tensor, "batch d_inner"],
    delta: Float[Tensor, "batch d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch n_groups d_state"],
    C: Float[Tensor, "batch n_groups d_state"],
    D: Float[Tensor, " d_inner"] | None,
    z: Float[Tensor, "batch d_inner"] | None,
    delta_bias: Float[Tensor, " d_inner"] | None,
    delta_softplus: bool,
    in_place: bool,
) -> tuple[Float[Tensor, "batch d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """y and the new state; see `selective_scan_step`."""
    wide = state.dtype
    step, u = delta.to(wide), x.to(wide)
    if delta_bias is not None:
        step = step + delta_bias.to(wide)
    if delta_softplus:
        step = F.softplus(step)
    groups = (B.shape[1], -1)
    decayed = torch.exp(step[..., None] * A.to(wide)).mul_(state)
    # [batch, n_groups, channels of a group, d_state]
    written = (step * u).unflatten(1, groups)[..., None]
    decayed.unflatten(1, groups).addcmul_(written, B.to(wide)[:, :, None])
    y = torch.matmul(decayed.unflatten(1, groups), C.to(wide)[..., None]).reshape(x.shape)
    if D is not None:
        y = torch.addcmul(y, D.to(wide), u)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), state.copy_(decayed) if in_place else decayed
