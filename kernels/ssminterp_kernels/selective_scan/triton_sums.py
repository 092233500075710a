"""Partial sums that programs leave in memory, added up in an order that does not depend on scheduling."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssminterp_kernels.launching import launch
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2, processor_count


@triton.jit(do_not_specialize=["parts"])
@no_type_check
def sum_parts_kernel(parts_at, out, parts, width, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr):
    """out [rows, width] = the sum over the middle axis of [rows, parts, width], always in the same order.

    BLOCK_P parts are in flight at once: one after the other, each would cost the latency of the memory.
    """
    row = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for part in tl.range(0, parts, BLOCK_P):
        inside = (part + p < parts)[:, None] & (w < width)[None, :]
        total += tl.load(parts_at + (row * parts + part + p[:, None]) * width + w[None, :], mask=inside, other=0.0)
    tl.store(out + row * width + w, tl.sum(total, 0), mask=w < width)


def sum_parts(parts: Tensor, rows: int, n_parts: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, n_parts, width], contiguous, summed over its middle axis in a fixed order."""
    out = torch.empty(rows, width, dtype=dtype, device=parts.device)
    block_w = min(128, next_power_of_2(width))
    # Few programs with long rows would each wait for memory many times over.
    while block_w > 32 and rows * -(-width // block_w) < 8 * processor_count(parts.device):
        block_w //= 2
    block_p = min(2048 // block_w, next_power_of_2(n_parts))
    launch(
        sum_parts_kernel,
        (rows, -(-width // block_w)),
        *(parts, out, n_parts, width),
        BLOCK_P=block_p,
        BLOCK_W=block_w,
        num_warps=1 if block_p * block_w < 1024 else 4,
    )
    return out
