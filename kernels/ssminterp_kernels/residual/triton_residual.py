"""Launches the Triton kernels of the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp_kernels.backends import on_device_of
from ssminterp_kernels.launching import Sized
from ssminterp_kernels.residual.triton_residual_kernels import add_and_norm_kernel, norm_backward_kernel

_add_and_norm, _norm_backward = Sized(add_and_norm_kernel), Sized(norm_backward_kernel)


class Forks(NamedTuple):
    """Tokens behind the others that go on from the residual stream of some of these.

    origins: theirs, int32. whole: how many of them, the last ones, have what is added to that token added too; to the
    first ones their own is.
    """

    origins: Int[Tensor, " forks"]
    whole: int


def norm(
    resid: Float[Tensor, "tokens d_model"], weight: Float[Tensor, " d_model"], epsilon: float
) -> Float[Tensor, "tokens d_model"]:
    """weight · x / sqrt(mean of x² + epsilon) in the dtype of weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    normed = torch.empty(resid.shape, dtype=weight.dtype, device=resid.device)
    _launch(resid, None, weight, None, normed, None, epsilon)
    return normed


def add_and_norm(
    resid: Float[Tensor, "old d_model"],
    added: Float[Tensor, "given d_model"],
    weight: Float[Tensor, " d_model"],
    epsilon: float,
    into: Float[Tensor, "tokens d_model"],
    forks: Forks | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Writes resid + added to `into`, which is not resid if there are forks; their norm as `norm` gives it.

    Tokens without forks are as many as resid has; `added` has no rows for the forks that are whole.
    """
    normed = torch.empty(into.shape, dtype=weight.dtype, device=resid.device)
    _launch(resid, added, weight, into, normed, forks, epsilon)
    return normed


def _launch(
    resid: Tensor,
    added: Tensor | None,
    weight: Tensor,
    into: Tensor | None,
    normed: Tensor,
    forks: Forks | None,
    epsilon: float,
) -> None:
    tokens, width = normed.shape
    origins, whole = (None, 0) if forks is None else forks
    with on_device_of(resid):
        _add_and_norm(
            tokens,
            (resid, added, weight, into, normed, origins),
            (width,),
            (tokens if origins is None else tokens - len(origins), tokens - whole),
            (epsilon, _power_of_2(width)),
            num_warps=4,
        )


def norm_backward(
    later: Float[Tensor, "tokens d_model"],
    dnormed: Float[Tensor, "tokens d_model"],
    resid: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, " d_model"],
    epsilon: float,
) -> tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]:
    """The gradient of the residual stream before a layer, in float32 and in the dtype of weight.

    later: that after the layer, float32. dnormed: the gradient of the norm of `resid`, which the layer begins with.
    """
    gradient = torch.empty_like(later)
    is_float32 = weight.dtype == torch.float32
    rounded = None if is_float32 else torch.empty(later.shape, dtype=weight.dtype, device=later.device)
    tokens, width = later.shape
    with on_device_of(later):
        _norm_backward(
            tokens,
            (later, dnormed, resid, weight, gradient, rounded),
            (width,),
            (),
            (epsilon, _power_of_2(width)),
            num_warps=4,
        )
    return gradient, gradient if rounded is None else rounded


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
