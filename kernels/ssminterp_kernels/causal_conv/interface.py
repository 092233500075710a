"""The public causal convolution: checks its arguments, chooses a backend, and calls it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.backends import Backend, choose_backend
from ssminterp_kernels.causal_conv.torch_conv import next_window, torch_conv, torch_conv_step
from ssminterp_kernels.checks import once_per_layout
from ssminterp_kernels.launching import can_be_repeated, repeated

Activation: TypeAlias = Literal["silu"] | None


class ConvOutput(NamedTuple):
    """What a convolution returns.

    y: [batch, pos, d_inner], of a step [batch, d_inner], in the dtype of x.
    window: [batch, d_inner, width], the last inputs, newest last, to go on from; None if it was not asked for.
    """

    y: Tensor
    window: Tensor | None


def causal_conv(
    x: Float[Tensor, "batch pos d_inner"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: Activation = None,
    window: Float[Tensor, "batch d_inner width"] | None = None,
    return_window: bool = False,
    backend: Backend = "auto",
) -> ConvOutput:
    """y_t = bias + sum over j of weight_j · x_{t - (d_conv - 1) + j}, through SiLU if `activation` is "silu".

    Sums are made in float32 (float64 for float64 inputs) whatever the dtype of the inputs, and rounded to it before the
    activation. Strides may be any. y is differentiable, once, with respect to every tensor argument.

    weight: the newest input's tap is the last, as in `torch.nn.Conv1d`, whose weight is this with an axis of size 1.
    window: the inputs before position 0, newest last, at least d_conv - 1 of them; zeros if None.
    return_window: return the last inputs as well, as many as `window` holds (d_conv - 1 if it is None).
    backend: "torch" for any device and dtype, "triton" for float32, bfloat16 and float16 on CUDA (on the CPU only
        under TRITON_INTERPRET=1), or "auto" for triton where it can be had.

    Raises ValueError, naming the argument and both shapes, if shapes, devices or dtypes do not agree.

    >>> x, weight = torch.randn(2, 7, 4), torch.randn(4, 3)
    >>> whole = causal_conv(x, weight, activation="silu").y
    >>> first = causal_conv(x[:, :5], weight, activation="silu", return_window=True)
    >>> rest = causal_conv(x[:, 5:], weight, activation="silu", window=first.window)
    >>> torch.allclose(torch.cat([first.y, rest.y], dim=1), whole, atol=1e-6)
    True
    """
    if can_be_repeated(x, weight, bias, window):
        y = _conv_again(x, weight, bias, window, activation, backend)
    else:
        y = _conv(x, weight, bias, window, activation, backend)
    if not return_window:
        return ConvOutput(y, None)
    return ConvOutput(y, next_window(x, window, weight.shape[1] - 1 if window is None else window.shape[2]))


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, activation: Activation, backend: Backend
) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"x must have the axes [batch, pos, d_inner], got shape {list(x.shape)}")
    _check_activation(activation)
    _check(x, weight, bias, window)
    if choose_backend(x, backend) == "triton":
        # Imported on first use: Triton is not installed everywhere.
        from ssminterp_kernels.causal_conv.triton_conv import triton_conv

        return triton_conv(x, weight, bias, window, activation == "silu")
    return torch_conv(x, weight, bias, window, activation == "silu")


_conv_again = repeated(_conv)


def causal_conv_step(
    x: Float[Tensor, "batch d_inner"],
    window: Float[Tensor, "batch d_inner width"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None = None,
    *,
    activation: Activation = None,
    in_place: bool = False,
    backend: Backend = "auto",
) -> ConvOutput:
    """`causal_conv` of one position that comes after `window`, and the window after it: one kernel on a GPU.

    in_place: write the new window over the old one, which is then what is returned. Where autograd records, the step
    is `causal_conv` over a sequence of length 1.

    Raises ValueError as `causal_conv` does, and for in_place while autograd records what depends on the window.

    >>> weight, window = torch.randn(4, 3), torch.zeros(2, 4, 2)
    >>> out = causal_conv_step(torch.randn(2, 4), window, weight, activation="silu")
    >>> out.y.shape, out.window.shape
    (torch.Size([2, 4]), torch.Size([2, 4, 2]))
    """
    if can_be_repeated(x, window, weight, bias):
        y, after = _step_again(x, window, weight, bias, activation, in_place, backend)
        return ConvOutput(y, window if in_place else after)
    return _step(x, window, weight, bias, activation, in_place, backend)


def _step(
    x: Tensor,
    window: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    in_place: bool,
    backend: Backend,
) -> ConvOutput:
    if x.dim() != 2:
        raise ValueError(f"x must have the axes [batch, d_inner], got shape {list(x.shape)}")
    _check_activation(activation)
    _check(x, weight, bias, window)
    chosen = choose_backend(x, backend)
    silu = activation == "silu"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, window, weight, bias)):
        if in_place:
            raise ValueError("in_place overwrites a window that autograd needs: leave it out, or use torch.no_grad()")
        y, after = causal_conv(
            x[:, None], weight, bias, activation=activation, window=window, return_window=True, backend=backend
        )
        return ConvOutput(y[:, 0], after)
    if chosen == "triton":
        from ssminterp_kernels.causal_conv.triton_conv import triton_conv_step

        return ConvOutput(*triton_conv_step(x, window, weight, bias, silu, in_place))
    return ConvOutput(*torch_conv_step(x, window, weight, bias, silu, in_place))


@repeated
def _step_again(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """y, and the window after it unless it was put in the place of the old one."""
    y, window = _step(*arguments)
    return y, None if arguments[5] else window


def _check_activation(activation: object) -> None:
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")


@once_per_layout
def _check(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None) -> None:
    """Raises ValueError for arguments that do not go with x, [batch, (pos), d_inner]."""
    if 0 in x.shape:
        raise ValueError(f"no axis may be empty, got x of shape {list(x.shape)}")
    batch, d_inner = x.shape[0], x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != d_inner or weight.shape[1] == 0:
        raise ValueError(
            f"weight must have the axes [d_inner = {d_inner}, d_conv] to go with x of shape {list(x.shape)}, "
            f"got shape {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (d_inner,):
        raise ValueError(
            f"bias must have the axes [d_inner] = {[d_inner]} to go with x of shape {list(x.shape)}, "
            f"got shape {list(bias.shape)}"
        )
    needed = weight.shape[1] - 1
    if window is not None and (window.dim() != 3 or window.shape[:2] != (batch, d_inner) or window.shape[2] < needed):
        raise ValueError(
            f"window must have the axes [batch = {batch}, d_inner = {d_inner}, width ≥ d_conv - 1 = {needed}] to go "
            f"with x of shape {list(x.shape)}, got shape {list(window.shape)}"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("window", window)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be real floating point, got {tensor.dtype} of shape {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}: move one of them")
