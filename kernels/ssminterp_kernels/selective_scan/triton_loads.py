"""How scans with layouts of their own read rows, tiles and lists of positions.

As in `triton_math`, tensors come as tuples (pointer, stride of each axis), absent ones as None. A tile is
[BLOCK_D, BLOCK_N] in a layout that its scan names (`triton_layouts`).
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import full_row, jit
from ssminterp_kernels.selective_scan.triton_math import NEVER, load_masked


@jit
@no_type_check
def tile_at(tensor, batch, i, d, n):
    """Pointers [BLOCK_D, BLOCK_N] to item i of a tensor [batch, i, d_inner, d_state]."""
    item = tensor[0] + batch * tensor[1] + tl.cast(i, tl.int64) * tensor[2]
    return item + (d[:, None] * tensor[3] + n[None, :] * tensor[4])


@jit
@no_type_check
def load_tile(tensor, batch, i, d, n, mask):
    return tl.load(tile_at(tensor, batch, i, d, n), mask=mask, other=0.0).to(tl.float32)


@jit
@no_type_check
def load_row(tensor, d, there, BLOCK_D: tl.constexpr, LINES: tl.constexpr):
    """One float32 number per channel (D, the bias of delta), zeros if there is no such tensor."""
    if tensor is None:
        values = full_row(0.0, BLOCK_D, LINES)
    else:
        values = tl.load(tensor[0] + d * tensor[1], mask=there, other=0.0).to(tl.float32)
    return values


@jit
@no_type_check
def load_rows(
    tensor, start, lane, t0, begin, end, there, stride: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr
):
    """[BLOCK_D] at COUNT positions from t0 on; before begin those of begin, from end on zeros. Zeros if None.

    start: this program's place in the tensor. A scalar and the lanes' offsets take fewer registers than pointers.
    """
    at = tl.maximum(t0, begin)
    if not MASK:
        at = tl.minimum(at, end - COUNT)
    rows = ()
    for u in tl.static_range(COUNT):
        if tensor is None:
            rows = rows + (0.0,)
        else:
            place = start + at.to(tl.int64) * stride
            rows = rows + (load_masked(place + (lane * tensor[3] + u * stride), there & (at + u < end), MASK),)
    return rows


@jit
@no_type_check
def start_of(tensor, batch, d0):
    """Pointer to position 0 and channel d0 of a tensor [batch, pos, d_inner]."""
    return tensor[0] + (batch * tensor[1] + d0 * tensor[3])


@jit
@no_type_check
def load_weights(rows_at, t0, begin, end, u, there, stride: tl.constexpr, COUNT: tl.constexpr, MASK: tl.constexpr):
    """B or C [COUNT, BLOCK_N] at positions from t0 on, as `load_rows`; u numbers them, MASK also: d_state is less."""
    at = tl.maximum(t0, begin)
    if not MASK:
        at = tl.minimum(at, end - COUNT)
    mask = there[None, :] & (at + u < end)[:, None]
    return load_masked(rows_at + (at + u).to(tl.int64)[:, None] * stride, mask, MASK)


@jit
@no_type_check
def count_before(positions, n_positions, t):
    """How many of the ascending positions come before t."""
    low = tl.cast(0, tl.int32)
    high = tl.cast(n_positions, tl.int32)
    while low < high:
        middle = (low + high) // 2
        if tl.load(positions + middle) < t:
            low = middle + 1
        else:
            high = middle
    return low


@jit
@no_type_check
def position_or_never(positions, i, n_positions):
    position = tl.cast(NEVER, tl.int64)
    if (i >= 0) & (i < n_positions):
        position = tl.load(positions + i)
    return position
