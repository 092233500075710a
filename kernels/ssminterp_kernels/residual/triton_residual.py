"""Launches the Triton kernels of the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp_kernels.residual.triton_residual_kernels import add_and_norm_kernel, norm_backward_kernel
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2
from ssminterp_kernels.sized_launching import Sized

_add_and_norm, _norm_backward = Sized(add_and_norm_kernel), Sized(norm_backward_kernel)


class Forks(NamedTuple):
    """Tokens behind the others that go on from the residual stream of some of these.

    origins: those, int32. whole: how many, the last ones, get what is added to that token too; the others get their
    own.
    """

    origins: Int[Tensor, " forks"]
    whole: int


def norm(
    resid: Float[Tensor, "tokens d_model"], weight: Float[Tensor, " d_model"], epsilon: float
) -> Float[Tensor, "tokens d_model"]:
    """weight · x / sqrt(mean of x² + epsilon) in the dtype of weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    normed = torch.empty(resid.shape, dtype=weight.dtype, device=resid.device)
    _launch(resid, None, None, None, (weight, normed, epsilon))
    return normed


def add(
    resid: Float[Tensor, "old d_model"],
    added: Float[Tensor, "given d_model"],
    into: Float[Tensor, "tokens d_model"],
    forks: Forks | None = None,
) -> None:
    """Writes resid + added to `into`, which is not resid if there are forks.

    Tokens without forks are as many as resid has; `added` has no rows for the forks that are whole.
    """
    _launch(resid, added, into, forks, None)


def add_and_norm(
    resid: Float[Tensor, "old d_model"],
    added: Float[Tensor, "given d_model"],
    weight: Float[Tensor, " d_model"],
    epsilon: float,
    into: Float[Tensor, "tokens d_model"],
    forks: Forks | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """As `add`; what is written, as `norm` gives it."""
    normed = torch.empty(into.shape, dtype=weight.dtype, device=resid.device)
    _launch(resid, added, into, forks, (weight, normed, epsilon))
    return normed


def _launch(
    resid: Tensor,
    added: Tensor | None,
    into: Tensor | None,
    forks: Forks | None,
    norm: tuple[Tensor, Tensor, float] | None,
) -> None:
    """norm: weight, where to write, and epsilon."""
    tokens, width = resid.shape if into is None else into.shape
    origins, whole = (None, 0) if forks is None else forks
    weight, normed, epsilon = (None, None, 0.0) if norm is None else norm
    _add_and_norm(
        tokens,
        (resid, added, weight, into, normed, origins),
        (width,),
        (tokens if origins is None else tokens - len(origins), tokens - whole),
        (epsilon, next_power_of_2(width)),
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
    _norm_backward(
        tokens,
        (later, dnormed, resid, weight, gradient, rounded),
        (width,),
        (),
        (epsilon, next_power_of_2(width)),
        num_warps=4,
    )
    return gradient, gradient if rounded is None else rounded
