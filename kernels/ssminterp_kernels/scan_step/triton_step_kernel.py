"""One step of the selective scan in Triton."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import LOG2E, load_channels, silu, step_size


@triton.jit
@no_type_check
def _row(tensor, batch, d, there):
    """A tensor [batch, d_inner] at one batch element, float32 [BLOCK_D]."""
    return tl.load(tensor[0] + batch * tensor[1] + d * tensor[2], mask=there, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _weights(tensor, batch, group, n, mask, n_there, ONE_GROUP: tl.constexpr):
    """B or C [batch, n_groups, d_state] as a tile that broadcasts to [BLOCK_D, BLOCK_N]."""
    if ONE_GROUP:
        weights = tl.load(tensor[0] + batch * tensor[1] + n * tensor[3], mask=n_there, other=0.0)[None, :]
    else:
        rows = tensor[0] + batch * tensor[1] + group[:, None] * tensor[2] + n[None, :] * tensor[3]
        weights = tl.load(rows, mask=mask, other=0.0)
    return weights.to(tl.float32)


@triton.jit(do_not_specialize=["group_size", "n_blocks"])
@no_type_check
def scan_step_kernel(
    state,
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    y,
    after,
    d_inner,
    group_size,
    d_state,
    n_blocks,
    SOFTPLUS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [batch, d_inner], and `after`, the new state; may be `state` itself.

    One program per batch element and BLOCK_D channels. With one position the state is read and written once, so
    neighbouring threads take neighbouring numbers of d_state, and sums over d_state go through the warp.
    """
    pid = tl.program_id(0)
    d = ((pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    batch = (pid // n_blocks).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    there = d < d_inner
    n_there = n < d_state
    mask = there[:, None] & n_there[None, :]
    u = _row(x, batch, d, there)
    step = step_size(_row(delta, batch, d, there), load_channels(bias, d, there), SOFTPLUS)
    weights = tl.load(A[0] + d[:, None] * A[1] + n[None, :] * A[2], mask=mask, other=0.0).to(tl.float32)
    before = tl.load(state[0] + batch * state[1] + d[:, None] * state[2] + n[None, :] * state[3], mask=mask, other=0.0)
    group = d // group_size
    written = (step * u)[:, None] * _weights(B, batch, group, n, mask, n_there, ONE_GROUP)
    new = tl.exp2(step[:, None] * (weights * LOG2E)) * before + written
    out = tl.sum(new * _weights(C, batch, group, n, mask, n_there, ONE_GROUP), 1) + load_channels(D, d, there) * u
    if z is not None:
        out *= silu(_row(z, batch, d, there))
    tl.store(y[0] + batch * y[1] + d * y[2], out, mask=there)
    # Other threads may read what is about to be overwritten.
    tl.debug_barrier()
    tl.store(after[0] + batch * after[1] + d[:, None] * after[2] + n[None, :] * after[3], new, mask=mask)
