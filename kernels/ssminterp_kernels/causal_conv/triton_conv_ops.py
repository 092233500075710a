"""The Triton convolution as torch.library operators, so that `torch.compile` takes it as it is.

Eager calls go to the kernels directly. Operators return tensors only: where there is nothing to return, an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.causal_conv import triton_conv

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? window, bool silu"
_STEP_INPUTS = "Tensor weight, Tensor? bias, bool silu"


@torch.library.custom_op("ssminterp::causal_conv", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
    """y; see `triton_conv.conv_forward`."""
    return triton_conv.conv_forward(x, weight, bias, window, silu)


@conv_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "ssminterp::causal_conv_backward", mutates_args=(), schema=f"({_INPUTS}, Tensor dy) -> Tensor[]"
)
def conv_backward_op(*arguments: Any) -> list[Tensor]:
    """The gradients of x, weight, bias and window; see `triton_conv.conv_backward`."""
    dx, dweight, dbias, dwindow = triton_conv.conv_backward(*arguments)
    # Outputs of an operator may not share memory, and those of weight and bias are parts of sums made together.
    return [dx, *(dx.new_empty(0) if g is None else g.clone() for g in (dweight, dbias, dwindow))]


@conv_backward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool, dy: Tensor) -> list[Tensor]:
    dweight = weight.new_empty(weight.shape[::-1]).t()
    return [
        x.new_empty(x.shape),
        dweight,
        *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, window)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = conv_backward_op(*saved, ctx.silu, dy)
    return (*(None if t is None else g for t, g in zip(saved, gradients, strict=True)), None)


conv_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "ssminterp::causal_conv_step",
    mutates_args=(),
    schema=f"(Tensor x, Tensor window, {_STEP_INPUTS}) -> (Tensor y, Tensor after)",
)
def conv_step_op(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the window after it; see `triton_conv.conv_step`."""
    after = triton_conv.new_window(window)
    return triton_conv.conv_step(x, window, weight, bias, silu, after), after


@conv_step_op.register_fake
def _(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), triton_conv.new_window(window)


@torch.library.custom_op(
    "ssminterp::causal_conv_step_",
    mutates_args=("window",),
    schema=f"(Tensor x, Tensor(a!) window, {_STEP_INPUTS}) -> Tensor",
)
def conv_step_in_place_op(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y; the window after it goes over the one before."""
    return triton_conv.conv_step(x, window, weight, bias, silu, window)


@conv_step_in_place_op.register_fake
def _(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)
