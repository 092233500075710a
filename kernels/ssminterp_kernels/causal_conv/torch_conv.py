"""The causal convolution as sums of shifted inputs: in the [batch, pos, d_inner] layout each is one pass over rows.

On the CPU this takes a half to an eighth of the time of `torch.nn.functional.conv1d` with `groups=d_inner`, which wants
the positions innermost (benchmarks/causal_conv.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers that are summed and passed through SiLU at a time: few enough to stay in a core's cache.
_PIECE = 750_000


def torch_conv(
    x: Float[Tensor, "batch pos d_inner"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None,
    window: Float[Tensor, "batch d_inner width"] | None,
    silu: bool,
) -> Float[Tensor, "batch pos d_inner"]:
    """See `causal_conv`. Differentiable, once, with respect to every tensor."""
    tensors = (x, weight, bias, window)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Conv.apply(*tensors, silu)
    return _forward(*tensors, silu)


def torch_conv_step(
    x: Float[Tensor, "batch d_inner"],
    window: Float[Tensor, "batch d_inner width"],
    weight: Float[Tensor, "d_inner d_conv"],
    bias: Float[Tensor, " d_inner"] | None,
    silu: bool,
    in_place: bool,
) -> tuple[Float[Tensor, "batch d_inner"], Float[Tensor, "batch d_inner width"]]:
    """See `causal_conv_step`; not differentiable."""
    wide = _wide(x)
    d_conv = weight.shape[1]
    after = next_window(x[:, None], window, window.shape[2])
    y = x.to(wide) * weight[:, -1].to(wide)
    for tap in range(d_conv - 1):
        y.addcmul_(window[..., window.shape[2] - d_conv + 1 + tap].to(wide), weight[:, tap].to(wide))
    if bias is not None:
        y += bias
    y = y.to(x.dtype)
    y = F.silu(y, inplace=True) if silu else y
    return y, window.copy_(after) if in_place else after


def next_window(
    x: Float[Tensor, "batch pos d_inner"], window: Float[Tensor, "batch d_inner _"] | None, width: int
) -> Float[Tensor, "batch d_inner {width}"]:
    """The last `width` inputs after x, which came after `window` (or after zeros), in a tensor of their own."""
    dtype = x.dtype if window is None else window.dtype
    latest = x[:, max(0, x.shape[1] - width) :].transpose(1, 2).to(dtype)
    missing = width - latest.shape[2]
    if window is None:
        return F.pad(latest, (missing, 0))
    return torch.cat([window[..., window.shape[2] - missing :], latest], dim=2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _source(x: Tensor, window: Tensor | None, d_conv: int) -> tuple[Tensor, int]:
    """The inputs with those of the window before them, and how many those are."""
    if window is None:
        return x, 0
    earlier = window[..., window.shape[2] - d_conv + 1 :].transpose(1, 2).to(x.dtype)
    return torch.cat([earlier, x], dim=1), d_conv - 1


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
    (batch, length, d_inner), d_conv, wide = x.shape, weight.shape[1], _wide(x)
    source, before = _source(x, window, d_conv)
    taps = weight.t().to(wide).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    piece = max(1, _PIECE // (batch * d_inner))
    for start in range(0, length, piece):
        stop = min(start + piece, length)
        first = max(0, start + before - d_conv + 1)
        here = source[:, first : stop + before].to(wide)
        target = y[:, start:stop] if x.dtype == wide else here.new_empty(batch, stop - start, d_inner)
        _sum_into(target, here, taps, bias)
        if x.dtype != wide:
            y[:, start:stop] = target
        if silu:
            # After rounding, as where SiLU is not fused: what is computed does not depend on who looks at the conv.
            F.silu(y[:, start:stop], inplace=True)
    return y


def _sum_into(target: Tensor, source: Tensor, taps: Float[Tensor, "d_conv d_inner"], bias: Tensor | None) -> None:
    """The convolution at the last positions of source, as many as target has; zeros come before source."""
    n, rows, d_conv = target.shape[1], source.shape[1], taps.shape[0]
    if bias is None:
        torch.mul(source[:, rows - n :], taps[-1], out=target)
    else:
        torch.addcmul(bias.to(target.dtype), source[:, rows - n :], taps[-1], out=target)
    for back in range(1, d_conv):
        missing = max(0, back - (rows - n))
        if missing < n:
            target[:, missing:].addcmul_(source[:, rows - n + missing - back : rows - back], taps[d_conv - 1 - back])


class _Conv(torch.autograd.Function):
    """Saves the inputs; the backward pass makes the sums before SiLU anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, window)
        ctx.silu = silu
        return _forward(x, weight, bias, window, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, window = ctx.saved_tensors
        length, d_conv, wide = x.shape[1], weight.shape[1], _wide(x)
        source, before = _source(x.to(wide), window, d_conv)
        dsum = dy.to(wide)
        if ctx.silu:
            sums = _forward(x, weight, bias, window, silu=False).to(wide)
            gate = torch.sigmoid(sums)
            dsum = dsum * gate * (1 + sums * (1 - gate))
        dsource = torch.zeros_like(source)
        dweight = torch.zeros(x.shape[2], d_conv, dtype=wide, device=x.device)
        for tap in range(d_conv):
            back = d_conv - 1 - tap
            missing = max(0, back - before)
            if missing < length:
                read = slice(before + missing - back, before + length - back)
                dsource[:, read].addcmul_(dsum[:, missing:], weight[:, tap].to(wide))
                dweight[:, tap] = (dsum[:, missing:] * source[:, read]).sum((0, 1))
        dwindow = None
        if window is not None:
            dwindow = torch.zeros_like(window)
            dwindow[..., window.shape[2] - before :] = dsource[:, :before].transpose(1, 2)
        dbias = None if bias is None else dsum.sum((0, 1)).to(bias.dtype)
        return dsource[:, before:].to(x.dtype), dweight.to(weight.dtype), dbias, dwindow, None
