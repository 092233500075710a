"""Launches the Triton kernels of the causal convolution and ties them into autograd."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssminterp_kernels.backends import on_device_of
from ssminterp_kernels.causal_conv.triton_conv_kernels import (
    conv_backward_kernel,
    conv_forward_kernel,
    conv_step_kernel,
)
from ssminterp_kernels.launching import launch, repeated
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2
from ssminterp_kernels.selective_scan.triton_sums import sum_parts

# Enough to fill a GPU several times over; of more, each goes through several tiles.
_PROGRAMS = 8192


def triton_conv(
    x: Float[Tensor, "batch pos d_inner"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None,
    window: Float[Tensor, "batch d_inner width"] | None,
    silu: bool,
) -> Float[Tensor, "batch pos d_inner"]:
    """See `causal_conv`. Differentiable, once, with respect to every tensor."""
    if torch.compiler.is_compiling():
        # Imported here because the operators are built on this module.
        from ssminterp_kernels.causal_conv.triton_conv_ops import conv_op

        return conv_op(x, weight, bias, window, silu)
    tensors = (x, weight, bias, window)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Conv.apply(*tensors, silu)
    return conv_forward(*tensors, silu)


def triton_conv_step(
    x: Float[Tensor, "batch d_inner"],
    window: Float[Tensor, "batch d_inner width"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None,
    silu: bool,
    in_place: bool,
) -> tuple[Float[Tensor, "batch d_inner"], Float[Tensor, "batch d_inner width"]]:
    """See `causal_conv_step`; not differentiable."""
    if torch.compiler.is_compiling():
        from ssminterp_kernels.causal_conv.triton_conv_ops import conv_step_in_place_op, conv_step_op

        if in_place:
            return conv_step_in_place_op(x, window, weight, bias, silu), window
        return conv_step_op(x, window, weight, bias, silu)
    after = window if in_place else new_window(window)
    return conv_step(x, window, weight, bias, silu, after), after


def new_window(window: Tensor) -> Tensor:
    """An empty tensor [batch, d_inner, width] for the window after this one."""
    return torch.empty(window.shape, dtype=window.dtype, device=window.device)


def _strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor as the kernels take it: pointer and strides."""
    return None if tensor is None else (tensor, *tensor.stride())


def _tiles(x: Tensor, longest: int) -> dict[str, int]:
    length, d_inner = x.shape[1:]
    return {"BLOCK_T": min(longest, next_power_of_2(length)), "BLOCK_D": min(64, max(32, next_power_of_2(d_inner)))}


@repeated
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
    """y, contiguous."""
    batch, length, d_inner = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = _tiles(x, longest=16)
    n_times, n_blocks = -(-length // tiles["BLOCK_T"]), -(-d_inner // tiles["BLOCK_D"])
    with on_device_of(x):
        launch(
            conv_forward_kernel,
            (batch * n_times * n_blocks,),
            *(_strided(x), _strided(weight), _strided(bias), _strided(window), _strided(y), length, d_inner),
            *(0 if window is None else window.shape[2], n_times, n_blocks),
            D_CONV=weight.shape[1],
            SILU=silu,
            **tiles,
        )
    return y


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    silu: bool,
    dy: Tensor,
    of_weights: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and window. Sums are made in a fixed order.

    of_weights: whether those of weight and bias are wanted, which are sums over batch and pos.
    """
    dwindow = None if window is None else torch.zeros(window.shape, dtype=window.dtype, device=x.device)
    dx, sums = _backward(x, weight, bias, window, silu, dy, dwindow, of_weights)
    if sums is None:
        return dx, None, None, dwindow
    dweight, dbias = sums.to(weight.dtype).split((weight.shape[1], 1))
    return dx, dweight.t(), None if bias is None else dbias[0].to(bias.dtype), dwindow


@repeated
def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    silu: bool,
    dy: Tensor,
    dwindow: Tensor | None,
    of_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx, and the gradients of the taps and the bias [d_conv + 1, d_inner] in float32; fills the end of dwindow."""
    (batch, length, d_inner), d_conv = x.shape, weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = _tiles(x, longest=8)
    before = 0 if window is None else d_conv - 1
    n_blocks, n_tiles = -(-d_inner // tiles["BLOCK_D"]), -(-(length + before) // tiles["BLOCK_T"])
    per_program = max(1, batch * n_tiles * n_blocks // _PROGRAMS)
    n_times = -(-n_tiles // per_program)
    parts = torch.empty(n_times * batch, (d_conv + 1) * d_inner, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            conv_backward_kernel,
            (batch * n_times * n_blocks,),
            *(_strided(x), _strided(weight), _strided(bias), _strided(window), _strided(dy), _strided(dx)),
            *(_strided(dwindow), parts, length, d_inner, 0 if window is None else window.shape[2], before),
            *(n_times, n_tiles, n_blocks, per_program),
            D_CONV=d_conv,
            SILU=silu,
            **tiles,
        )
    if not of_weights:
        return dx, None
    sums = sum_parts(parts, 1, n_times * batch, (d_conv + 1) * d_inner, torch.float32)
    return dx, sums.view(d_conv + 1, d_inner)


@repeated
def conv_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, after: Tensor) -> Tensor:
    """y of one position; writes the window after it into `after`, which may be `window`."""
    batch, d_inner = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = 128
    n_blocks = -(-d_inner // block)
    with on_device_of(x):
        launch(
            conv_step_kernel,
            (batch * n_blocks,),
            *(_strided(x), _strided(window), _strided(weight), _strided(bias), _strided(y), _strided(after)),
            *(d_inner, n_blocks),
            D_CONV=weight.shape[1],
            WIDTH=window.shape[2],
            SILU=silu,
            BLOCK_D=block,
        )
    return y


class _Conv(torch.autograd.Function):
    """Saves the inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, window)
        ctx.silu = silu
        return conv_forward(x, weight, bias, window, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, window = ctx.saved_tensors
        of_weights = any(ctx.needs_input_grad[1:3])
        return (*conv_backward(x, weight, bias, window, ctx.silu, dy, of_weights), None)
