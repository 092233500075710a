"""The causal convolution in Triton: forward, backward, and one step.

A program works on a tile [BLOCK_T, BLOCK_D] of positions and channels. It loads one shifted tile per tap, of which all
but the first come out of the L1 cache. Tensors come as tuples (pointer, stride of each axis), absent ones as None;
`window` is [batch, d_inner, width], the inputs before position 0, newest last.

Sums are rounded before SiLU, as they are where it is not fused: what is computed does not depend on who looks at them.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import load_channels, sigmoid, silu


@triton.jit
@no_type_check
def _inputs_at(x, window, width, batch, i, d, there, length):
    """Inputs at positions i, float32 [BLOCK_T, BLOCK_D]: of the window where i < 0, zeros where there are none."""
    inside = (i >= 0) & (i < length)
    rows = x[0] + batch * x[1] + i[:, None] * x[2] + d[None, :] * x[3]
    values = tl.load(rows, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
    if window is not None:
        k = i + width
        earlier = (i < 0) & (k >= 0)
        rows = window[0] + batch * window[1] + k[:, None] * window[3] + d[None, :] * window[2]
        values += tl.load(rows, mask=earlier[:, None] & there[None, :], other=0.0).to(tl.float32)
    return values


@triton.jit
@no_type_check
def _tap(weight, j, d, there):
    return tl.load(weight[0] + d * weight[1] + j * weight[2], mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "width", "n_times", "n_blocks"])
@no_type_check
def conv_forward_kernel(
    x,
    weight,
    bias,
    window,
    y,
    length,
    d_inner,
    width,
    n_times,
    n_blocks,
    D_CONV: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [batch, pos, d_inner]; one program per batch element, BLOCK_T positions and BLOCK_D channels."""
    pid = tl.program_id(0)
    d = ((pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    t = ((pid // n_blocks) % n_times).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = (pid // n_blocks // n_times).to(tl.int64)
    there = d < d_inner
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + load_channels(bias, d, there)[None, :]
    for j in tl.static_range(D_CONV):
        inputs = _inputs_at(x, window, width, batch, t - (D_CONV - 1) + j, d, there, length)
        total += _tap(weight, j, d, there)[None, :] * inputs
    if SILU:
        total = total.to(y[0].dtype.element_ty).to(tl.float32)
        total = silu(total)
    rows = y[0] + batch * y[1] + t[:, None] * y[2] + d[None, :] * y[3]
    tl.store(rows, total, mask=(t < length)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["length", "width", "before", "n_times", "n_tiles", "n_blocks", "per_program"])
@no_type_check
def conv_backward_kernel(
    x,
    weight,
    bias,
    window,
    dy,
    dx,
    dwindow,
    parts,
    length,
    d_inner,
    width,
    before,
    n_times,
    n_tiles,
    n_blocks,
    per_program,
    D_CONV: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, dwindow, and parts [n_time_programs, batch, D_CONV + 1, d_inner]: sums for weight and bias, of one program
    each. A program goes through `per_program` tiles of positions; positions begin `before` places before 0.

    What a position's input did to the next D_CONV - 1 outputs takes their sums before SiLU, which every tile makes anew
    from the inputs around it: that costs exponentials, which are cheaper here than a tensor of gradients to and from
    memory.
    """
    pid = tl.program_id(0)
    d = ((pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    time_program = (pid // n_blocks) % n_times
    batch = (pid // n_blocks // n_times).to(tl.int64)
    there = d < d_inner
    bias_row = load_channels(bias, d, there)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dtaps = ()
    for _ in tl.static_range(D_CONV):
        dtaps = dtaps + (tl.zeros((BLOCK_D,), tl.float32),)
    first_tile = time_program * per_program
    for one in tl.range(first_tile, tl.minimum(first_tile + per_program, n_tiles)):
        i = tl.cast(one, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T) - before
        inputs = ()  # at i - (D_CONV - 1) to i + D_CONV - 1, of which the later ones serve SiLU alone
        for j in tl.static_range(2 * D_CONV - 1 if SILU else D_CONV):
            inputs = inputs + (_inputs_at(x, window, width, batch, i - (D_CONV - 1) + j, d, there, length),)
        dinput = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for s in tl.static_range(D_CONV):
            t = i + s
            counts = ((t >= 0) & (t < length))[:, None] & there[None, :]
            rows = dy[0] + batch * dy[1] + t[:, None] * dy[2] + d[None, :] * dy[3]
            dsum = tl.load(rows, mask=counts, other=0.0).to(tl.float32)
            if SILU:
                total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + bias_row[None, :]
                for j in tl.static_range(D_CONV):
                    total += _tap(weight, j, d, there)[None, :] * inputs[s + j]
                total = total.to(dy[0].dtype.element_ty).to(tl.float32)
                gate = sigmoid(total)
                dsum *= gate * (1.0 + total * (1.0 - gate))
                # Where nothing counts, an infinite input of a neighbour must not make 0 · inf of it.
                dsum = tl.where(counts, dsum, 0.0)
            dinput += _tap(weight, D_CONV - 1 - s, d, there)[None, :] * dsum
            if s == 0:
                dbias += tl.sum(dsum, 0)
                sums = ()
                for j in tl.static_range(D_CONV):
                    sums = sums + (dtaps[j] + tl.sum(tl.where(counts, dsum * inputs[j], 0.0), 0),)
                dtaps = sums
        rows = dx[0] + batch * dx[1] + i[:, None] * dx[2] + d[None, :] * dx[3]
        tl.store(rows, dinput, mask=((i >= 0) & (i < length))[:, None] & there[None, :])
        if dwindow is not None:
            rows = dwindow[0] + batch * dwindow[1] + (i + width)[:, None] * dwindow[3] + d[None, :] * dwindow[2]
            tl.store(rows, dinput, mask=(i < 0)[:, None] & there[None, :])
    place = parts + (time_program.to(tl.int64) * (tl.num_programs(0) // n_blocks // n_times) + batch) * (
        (D_CONV + 1) * d_inner
    )
    for j in tl.static_range(D_CONV):
        tl.store(place + j * d_inner + d, dtaps[j], mask=there)
    tl.store(place + D_CONV * d_inner + d, dbias, mask=there)


@triton.jit(do_not_specialize=["n_blocks"])
@no_type_check
def conv_step_kernel(
    x,
    window,
    weight,
    bias,
    y,
    after,
    d_inner,
    n_blocks,
    D_CONV: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [batch, d_inner] of one position, and `after`, the window that has it as its newest; may be `window` itself."""
    pid = tl.program_id(0)
    d = ((pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    batch = (pid // n_blocks).to(tl.int64)
    there = d < d_inner
    kept = ()
    for k in tl.static_range(WIDTH):
        kept = kept + (tl.load(window[0] + batch * window[1] + d * window[2] + k * window[3], mask=there, other=0.0),)
    newest = tl.load(x[0] + batch * x[1] + d * x[2], mask=there, other=0.0)
    total = load_channels(bias, d, there) + _tap(weight, D_CONV - 1, d, there) * newest.to(tl.float32)
    for j in tl.static_range(D_CONV - 1):
        total += _tap(weight, j, d, there) * kept[WIDTH - (D_CONV - 1) + j].to(tl.float32)
    if SILU:
        total = total.to(y[0].dtype.element_ty).to(tl.float32)
        total = silu(total)
    tl.store(y[0] + batch * y[1] + d * y[2], total, mask=there)
    # Other threads may read what is about to be overwritten.
    tl.debug_barrier()
    at = after[0] + batch * after[1] + d * after[2]
    for k in tl.static_range(1, WIDTH):
        tl.store(at + (k - 1) * after[3], kept[k], mask=there)
    if WIDTH > 0:
        tl.store(at + (WIDTH - 1) * after[3], newest, mask=there)
