"""Device functions that the selective scan's Triton kernels share.

A program works on one batch element, one chunk of time and BLOCK_D channels. Its state is a tile [BLOCK_N, BLOCK_D]:
with the channels last, Triton spreads them over the lanes and keeps the d_state values of a channel in one thread's
registers, so sums over d_state need no exchange between lanes and every row of x, delta and z is read coalesced.

Tensors come as tuples (pointer, stride of each axis), absent ones as None. `zero` is 0, unknown to the compiler, see
`tile`. Device functions carry `no_type_check` because a checker that wraps annotated functions would hide their globals
from Triton's interpreter.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(1 << 62)  # a position that no sequence reaches


@triton.jit
@no_type_check
def softplus(v):
    """log(1 + e^v) to 3e-7 relative: max(v, 0) + log1p(e^-|v|), the latter by a degree-8 Chebyshev fit on [0, 1].

    The hardware's log2 is off by up to 2^-22 near 1, which would be 2e-4 of a step size of 1e-3.
    """
    e = tl.exp2(tl.abs(v) * -LOG2E)
    p = 0.0051261018961668015 * e - 0.029074065387248993
    p = p * e + 0.0775160863995552
    p = p * e - 0.13602247834205627
    p = p * e + 0.19076880812644958
    p = p * e - 0.2483539879322052
    p = p * e + 0.3331812024116516
    p = p * e - 0.4999944567680359
    p = p * e + 0.9999999403953552
    return tl.where(v > 0, v, 0.0) + e * p


@triton.jit
@no_type_check
def sigmoid(v):
    """1 / (1 + e^-v) to 3e-7 relative; a square of the hardware's rsqrt, because a division checks its range."""
    root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2E))
    return root * root


@triton.jit
@no_type_check
def silu(v):
    """v / (1 + e^-v), float32."""
    v = v.to(tl.float32)
    return v * sigmoid(v)


@triton.jit
@no_type_check
def gated(y, z_values, z):
    """y through the gate, or dLoss/dy back through it, float32; z_values: what the gate is made of, if there is a z."""
    y = y.to(tl.float32)
    if z is not None:
        y *= silu(z_values)
    return y


@triton.jit
@no_type_check
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """Δ in float32 from delta as given."""
    v = raw.to(tl.float32) + bias
    if SOFTPLUS:
        v = softplus(v)
    return v


@triton.jit
@no_type_check
def advance(state, A2, step, x, B):
    """state_t from state_{t-1}, [BLOCK_N, BLOCK_D]; A2 is A · log2(e)."""
    return tl.exp2(step[None, :] * A2) * state + (step * x.to(tl.float32))[None, :] * B[:, None]


@triton.jit
@no_type_check
def program_place(n_blocks, n_chunks, group_size, BLOCK_D: tl.constexpr):
    """batch, chunk, block and group of this program, its channels d, and which of them exist."""
    pid = tl.program_id(0)
    block = pid % n_blocks
    chunk = (pid // n_blocks) % n_chunks
    batch = (pid // n_blocks // n_chunks).to(tl.int64)
    blocks_per_group = tl.cdiv(group_size, BLOCK_D)
    group = block // blocks_per_group
    in_group = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = (group * group_size + in_group).to(tl.int64)
    return batch, chunk.to(tl.int64), block, group, d, in_group < group_size


@triton.jit
@no_type_check
def channel_rows(tensor, batch, d):
    """Pointers [BLOCK_D] to position 0 of a tensor [batch, pos, d_inner]."""
    return tensor[0] + batch * tensor[1] + d * tensor[3]


@triton.jit
@no_type_check
def weight_rows(tensor, batch, group, n):
    """Pointers [BLOCK_N] to position 0 of B or C [batch, pos, n_groups, d_state]."""
    return tensor[0] + batch * tensor[1] + group * tensor[3] + n * tensor[4]


@triton.jit
@no_type_check
def tile(pointer, d, d_stride, n, n_stride, zero):
    """Pointers [BLOCK_N, BLOCK_D] that make the compiler keep the d_state values of a channel in one thread.

    It lays a tile out for the widest loads that it can prove, and the state inherits that layout. Left alone it would
    spread d_state over the lanes, and every sum over d_state would cost shuffles. So the channels are declared to be
    contiguous, which only orders the lanes, because no load is wider than one number; and adding `zero` hides the
    alignment that would allow wider loads.
    """
    return tl.max_contiguous(pointer + (d[None, :] * d_stride + n[:, None] * n_stride + zero), [1, d.shape[0]])


@triton.jit
@no_type_check
def item(tensor, batch, i):
    """Pointer to item i of a tensor [batch, i, d_inner, d_state]; a trajectory has more than 2^31 numbers."""
    return tensor[0] + batch * tensor[1] + tl.cast(i, tl.int64) * tensor[2]


@triton.jit
@no_type_check
def state_tile(tensor, batch, i, d, n, zero):
    """Pointers [BLOCK_N, BLOCK_D] to item i of a tensor [batch, i, d_inner, d_state]."""
    return tile(item(tensor, batch, i), d, tensor[3], n, tensor[4], zero)


@triton.jit
@no_type_check
def _wide(pointer, d, d_stride, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_D, BLOCK_N / W, W] to what `tile` points to if d_state is contiguous; W numbers are 16 bytes.

    The compiler lays this out with 16 bytes in a row for a thread and neighbouring channels in neighbouring threads, so
    a thread has the same numbers as in a `tile`, by a quarter of the instructions.
    """
    W: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    many = tl.arange(0, BLOCK_N // W) * W
    return pointer + (d[:, None, None] * d_stride + many[None, :, None] + tl.arange(0, W)[None, None, :])


@triton.jit
@no_type_check
def load_wide(pointer, d, d_stride, there, BLOCK_N: tl.constexpr):
    """Float32 [BLOCK_N, BLOCK_D] from memory in which the d_state = BLOCK_N numbers of a channel are contiguous."""
    BLOCK_D: tl.constexpr = d.shape[0]
    values = tl.load(_wide(pointer, d, d_stride, BLOCK_N), mask=there[:, None, None], other=0.0)
    return tl.reshape(tl.permute(values.to(tl.float32), (1, 2, 0)), (BLOCK_N, BLOCK_D))


@triton.jit
@no_type_check
def store_wide(pointer, d, d_stride, value, there):
    """Write [BLOCK_N, BLOCK_D] to memory in which the d_state = BLOCK_N numbers of a channel are contiguous."""
    BLOCK_N: tl.constexpr = value.shape[0]
    W: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    values = tl.permute(tl.reshape(value, (BLOCK_N // W, W, d.shape[0])), (2, 0, 1))
    tl.store(_wide(pointer, d, d_stride, BLOCK_N), values, mask=there[:, None, None])


@triton.jit
@no_type_check
def load_masked(pointers, mask, MASK: tl.constexpr):
    if MASK:
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.load(pointers)


@triton.jit
@no_type_check
def store_masked(pointers, values, mask, MASK: tl.constexpr):
    if MASK:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values)


@triton.jit
@no_type_check
def load_A2(A, d, n, mask, zero):
    """A · log2(e), float32 [BLOCK_N, BLOCK_D], so that exp(Δ A) is one exp2 of a product."""
    return tl.load(tile(A[0], d, A[1], n, A[2], zero), mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
@no_type_check
def load_tile(tensor, batch, i, d, n, mask, zero):
    """Item i of a tensor [batch, i, d_inner, d_state] as float32 [BLOCK_N, BLOCK_D], zero outside."""
    return tl.load(state_tile(tensor, batch, i, d, n, zero), mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def load_channels(tensor, d, there):
    """One float32 number per channel (D, the bias of delta), zeros if there is no such tensor."""
    if tensor is None:
        values = tl.zeros_like(d).to(tl.float32)
    else:
        values = tl.load(tensor[0] + d * tensor[1], mask=there, other=0.0).to(tl.float32)
    return values
