"""Triton kernels of the residual stream; a program works on one token. All tensors are contiguous."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_fork", "first_whole"])
@no_type_check
def add_and_norm_kernel(
    resid,
    added,
    weight,
    into,
    normed,
    origins,
    width,
    first_fork,
    first_whole,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """into = resid + added, and its norm. Either of `added` and `into` may be None, as may `normed`.

    origins: of the tokens from first_fork on, the token whose residual stream they go on from; from first_whole on,
    what is added is that token's too.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    there = d < width
    from_ = token
    added_from = token
    if origins is not None:
        if token >= first_fork:
            from_ = tl.load(origins + token - first_fork).to(tl.int64)
            added_from = tl.where(token >= first_whole, from_, token)
    total = tl.load(resid + from_ * width + d, mask=there, other=0.0)
    if added is not None:
        more = tl.load(added + added_from * width + d, mask=there, other=0.0)
        total = (total.to(tl.float32) + more.to(tl.float32)).to(total.dtype)
    if into is not None:
        tl.store(into + token * width + d, total, mask=there)
    if normed is not None:
        dtype = normed.dtype.element_ty
        x = total.to(dtype).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x) / width + EPSILON)
        w = tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
        # In half precision the norm is rounded before the weight, as Hugging Face rounds it.
        tl.store(normed + token * width + d, (w * x.to(dtype).to(tl.float32)).to(dtype), mask=there)


@triton.jit
@no_type_check
def norm_backward_kernel(
    later,
    dnormed,
    resid,
    weight,
    gradient,
    rounded,
    width,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient = later + the gradient of the norm's input, and the same in another dtype unless `rounded` is None."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    there = d < width
    at = token * width + d
    x = tl.load(resid + at, mask=there, other=0.0).to(weight.dtype.element_ty).to(tl.float32)
    scaled = tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    scaled *= tl.load(dnormed + at, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + EPSILON)
    along = tl.sum(scaled * x) / width * scale * scale
    total = tl.load(later + at, mask=there, other=0.0) + scale * (scaled - along * x)
    tl.store(gradient + at, total, mask=there)
    if rounded is not None:
        tl.store(rounded + at, total.to(rounded.dtype.element_ty), mask=there)
