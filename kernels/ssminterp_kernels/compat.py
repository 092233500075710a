"""Drop-in replacements for functions of other packages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.selective_scan import selective_scan


def selective_scan_fn(
    u: Float[Tensor, "batch d_inner pos"],
    delta: Float[Tensor, "batch d_inner pos"],
    A: Float[Tensor, "d_inner d_state"],
    B: Tensor,
    C: Tensor,
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch d_inner pos"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> (
    Float[Tensor, "batch d_inner pos"]
    | tuple[Float[Tensor, "batch d_inner pos"], Float[Tensor, "batch d_inner d_state"]]
):
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, with its signature, layout and dtypes.

    B, C: [d_inner, d_state] (the same at every position), [batch, d_state, pos], or [batch, n_groups, d_state, pos].
    Returns the output in the dtype of u, gated by SiLU(z) if z is given, and with `return_last_state` also the float32
    state after the last position. Unlike the original, the last state is differentiable. No tensor is copied to change
    its layout.

    Raises ValueError for complex A (S4's, which Mamba does not use) and for shapes that do not agree.

    >>> u, delta = torch.randn(2, 4, 7), torch.rand(2, 4, 7)
    >>> A, B, C = -torch.rand(4, 3), torch.randn(2, 3, 7), torch.randn(4, 3)
    >>> selective_scan_fn(u, delta, A, B, C).shape
    torch.Size([2, 4, 7])
    """
    if A.is_complex():
        raise ValueError(f"A must be real, got {A.dtype} of shape {list(A.shape)}")
    if u.dim() != 3:
        raise ValueError(f"u must have the axes [batch, d_inner, pos], got shape {list(u.shape)}")
    B, C = _per_channel_or_group("B", B, u, A), _per_channel_or_group("C", C, u, A)
    n_groups = max(B.shape[2], C.shape[2])
    B, C = (_with_groups(weights, n_groups) for weights in (B, C))
    out = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
    )
    y = out.y.transpose(1, 2)
    return (y, out.final_state) if return_last_state else y


def _per_channel_or_group(
    name: str, weights: Tensor, u: Tensor, A: Tensor
) -> Float[Tensor, "batch pos n_groups d_state"]:
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    if weights.shape == (d_inner, d_state):
        return weights.expand(batch, length, d_inner, d_state)
    if weights.shape == (batch, d_state, length):
        return weights.transpose(1, 2).unsqueeze(2)
    if weights.dim() == 4 and weights.shape[0] == batch and weights.shape[2:] == (d_state, length):
        return weights.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name} must have the axes [d_inner, d_state] = {[d_inner, d_state]}, [batch, d_state, pos] = "
        f"{[batch, d_state, length]} or [batch, n_groups, d_state, pos] to go with u of shape {list(u.shape)}, "
        f"got shape {list(weights.shape)}"
    )


def _with_groups(weights: Tensor, n_groups: int) -> Float[Tensor, "batch pos n_groups d_state"]:
    """Weights of fewer groups, spread over n_groups."""
    if weights.shape[2] == n_groups:
        return weights
    return torch.repeat_interleave(weights, n_groups // weights.shape[2], dim=2)
