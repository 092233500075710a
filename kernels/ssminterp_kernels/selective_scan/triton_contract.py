"""Σ over d_state of (state_a − state_b) ⊙ adjoint_b in one kernel: both runs replayed from states before segments,
differences held in registers for a few positions, adjoints walked backwards past them. See `triton_backward`.

Summed over d_inner as well, each program leaves one number per position, and these are added in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.launching import launch, repeated
from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.triton_backward_plan import plan_chunks
from ssminterp_kernels.selective_scan.triton_gradients import futures_of_chunks
from ssminterp_kernels.selective_scan.triton_math import (
    advance,
    channel_rows,
    load_A2,
    load_channels,
    load_tile,
    program_place,
    silu,
    step_size,
    tile,
    weight_rows,
)
from ssminterp_kernels.selective_scan.triton_plan import processor_count
from ssminterp_kernels.selective_scan.triton_scan import scan_forward
from ssminterp_kernels.selective_scan.triton_sums import sum_parts
from ssminterp_kernels.selective_scan.triton_tensors import (
    ScanTensors,
    placement,
    scan_tensors,
    strided,
    strided_state,
    strides_of_pos,
)

SEGMENT = 32  # positions between the states that are saved
BLOCK_T = 2  # positions whose differences of states are held in registers; more of them spill


@triton.jit
@no_type_check
def _replay(
    state, A2, bias_row, x_rows, delta_rows, B_rows, t, there, n_there, POS: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """The state after position t from the one before it."""
    x_row = tl.load(x_rows + t * POS[0], mask=there, other=0.0)
    step = step_size(tl.load(delta_rows + t * POS[1], mask=there, other=0.0), bias_row, SOFTPLUS)
    B_row = tl.load(B_rows + t * POS[2], mask=n_there, other=0.0).to(tl.float32)
    return advance(state, A2, step, x_row, B_row)


@triton.jit(do_not_specialize=["length", "chunk_length", "n_chunks", "n_blocks", "group_size", "zero"])
@no_type_check
def contract_kernel(
    x_a,
    delta_a,
    B_a,
    boundaries_a,
    x_b,
    delta_b,
    B_b,
    boundaries_b,
    z,
    A,
    C,
    bias,
    dy,
    future,
    out,
    scratch,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    zero,
    POS_A: tl.constexpr,
    POS_B: tl.constexpr,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SUM_D: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: one batch element, one chunk, BLOCK_D channels of one group.

    boundaries: the states before every SEGMENT-th position [batch, n_segments, d_inner, d_state], None for zeros.
    future: the gradient of the state after each chunk. out: float32 [batch, pos, d_inner], with SUM_D
    [batch, pos, n_blocks]. scratch: (pointer to
    [programs, 2, SEGMENT / BLOCK_T, BLOCK_N, BLOCK_D],). POS_A, POS_B: the strides of the position axes of x, delta and
    B of each run; POS: those of C, dy, z and out.
    """
    batch, chunk, block, group, d, there = program_place(n_blocks, n_chunks, group_size, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_A2(A, d, n, tile_there, zero)
    bias_row = load_channels(bias, d, there)
    x_a_rows = channel_rows(x_a, batch, d)
    x_b_rows = channel_rows(x_b, batch, d)
    delta_a_rows = channel_rows(delta_a, batch, d)
    delta_b_rows = channel_rows(delta_b, batch, d)
    dy_rows = channel_rows(dy, batch, d)
    z_rows = dy_rows if z is None else channel_rows(z, batch, d)
    out_rows = channel_rows(out, batch, block if SUM_D else d)
    B_a_rows = weight_rows(B_a, batch, group, n)
    B_b_rows = weight_rows(B_b, batch, group, n)
    C_rows = weight_rows(C, batch, group, n)
    n_kept: tl.constexpr = SEGMENT // BLOCK_T
    own = scratch[0] + tl.program_id(0).to(tl.int64) * 2 * n_kept * BLOCK_N * BLOCK_D
    kept_a = tile(own, tl.arange(0, BLOCK_D), 1, n, BLOCK_D, zero)
    kept_b = kept_a + n_kept * BLOCK_N * BLOCK_D

    carry = load_tile(future, batch, chunk, d, n, tile_there, zero)
    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    for back in tl.range(0, tl.cdiv(stop - first, SEGMENT)):
        begin = first + (tl.cdiv(stop - first, SEGMENT) - 1 - back) * SEGMENT
        end = tl.minimum(begin + SEGMENT, stop)
        n_pieces = tl.cdiv(end - begin, BLOCK_T)
        state_a = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        state_b = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if boundaries_a is not None:
            state_a = load_tile(boundaries_a, batch, begin // SEGMENT, d, n, tile_there, zero)
        if boundaries_b is not None:
            state_b = load_tile(boundaries_b, batch, begin // SEGMENT, d, n, tile_there, zero)
        tl.store(kept_a, state_a)
        tl.store(kept_b, state_b)
        for piece in tl.range(1, n_pieces):
            for u in tl.static_range(BLOCK_T):
                t = begin + (piece - 1) * BLOCK_T + u
                state_a = _replay(
                    state_a, A2, bias_row, x_a_rows, delta_a_rows, B_a_rows, t, there, n_there, POS_A, SOFTPLUS
                )
                state_b = _replay(
                    state_b, A2, bias_row, x_b_rows, delta_b_rows, B_b_rows, t, there, n_there, POS_B, SOFTPLUS
                )
            tl.store(kept_a + piece * BLOCK_N * BLOCK_D, state_a)
            tl.store(kept_b + piece * BLOCK_N * BLOCK_D, state_b)
        tl.debug_barrier()

        for later in tl.range(0, n_pieces):
            t0 = begin + (n_pieces - 1 - later) * BLOCK_T
            state_a = tl.load(kept_a + (n_pieces - 1 - later) * BLOCK_N * BLOCK_D)
            state_b = tl.load(kept_b + (n_pieces - 1 - later) * BLOCK_N * BLOCK_D)
            differences = ()
            for u in tl.static_range(BLOCK_T):
                # Past the end nothing is stored, but nothing may be read either.
                t = tl.minimum(t0 + u, end - 1)
                state_a = _replay(
                    state_a, A2, bias_row, x_a_rows, delta_a_rows, B_a_rows, t, there, n_there, POS_A, SOFTPLUS
                )
                state_b = _replay(
                    state_b, A2, bias_row, x_b_rows, delta_b_rows, B_b_rows, t, there, n_there, POS_B, SOFTPLUS
                )
                differences = differences + (state_a - state_b,)
            for u in tl.static_range(BLOCK_T - 1, -1, -1):
                t = t0 + u
                mask = there & (t < end)
                dy_row = tl.load(dy_rows + t * POS[1], mask=mask, other=0.0).to(tl.float32)
                if z is not None:
                    dy_row *= silu(tl.load(z_rows + t * POS[2], mask=mask, other=0.0))
                C_row = tl.load(C_rows + t * POS[0], mask=n_there & (t < end), other=0.0).to(tl.float32)
                adjoint = carry + C_row[:, None] * dy_row[None, :]
                products = tl.sum(differences[u] * adjoint, 0)
                if SUM_D:
                    tl.store(out_rows + t * POS[3], tl.sum(tl.where(there, products, 0.0), 0), mask=t < end)
                else:
                    tl.store(out_rows + t * POS[3], products, mask=mask)
                raw = tl.load(delta_b_rows + t * POS_B[1], mask=mask, other=0.0)
                step = tl.where(t < end, step_size(raw, bias_row, SOFTPLUS), 0.0)
                carry = tl.exp2(step[None, :] * A2) * adjoint
        tl.debug_barrier()


def triton_contract(
    a: ScanArguments, b: ScanArguments, dy: Tensor, dfinal_state: Tensor, sum_d_inner: bool
) -> Float[Tensor, "batch pos *d_inner"]:
    """As `contract_with_adjoint`; takes arguments from `check_arguments`."""
    run_a, run_b = scan_tensors(a), scan_tensors(b)
    # A short sequence has one segment only, which begins with the initial state.
    begin_a, begin_b = (
        scan_forward(run._replace(z=None), save=True, every=SEGMENT)[3] if dy.shape[1] > SEGMENT else None
        for run in (run_a, run_b)
    )
    of_a = (run_a.x, run_a.delta, run_a.B, run_a.initial_state)
    return _contract(*of_a, begin_a, begin_b, dy, dfinal_state, sum_d_inner, *run_b)


@repeated
def _contract(
    x_a: Tensor,
    delta_a: Tensor,
    B_a: Tensor,
    initial_state_a: Tensor | None,
    boundaries_a: Tensor | None,
    boundaries_b: Tensor | None,
    dy: Tensor,
    dfinal_state: Tensor,
    sum_d_inner: bool,
    *of_b: Any,
) -> Tensor:
    run_b = ScanTensors(*of_b)
    batch, length, d_inner = dy.shape
    d_state = run_b.A.shape[1]
    sizes = (batch, length, d_inner, d_state, run_b.B.shape[2])
    plan = plan_chunks(*sizes, processor_count(dy.device), grain=SEGMENT)
    begin_a, begin_b = (
        strided_state(initial_state) if boundaries is None else strided(boundaries)
        for initial_state, boundaries in ((initial_state_a, boundaries_a), (run_b.initial_state, boundaries_b))
    )
    future = strided_state(dfinal_state)
    if plan.is_chunked:
        future = strided(futures_of_chunks(run_b, plan, dy, None, dfinal_state))
    new = functools.partial(torch.empty, dtype=torch.float32, device=dy.device)
    out = new(batch, plan.n_blocks, length).transpose(1, 2) if sum_d_inner else new(batch, length, d_inner)
    scratch = new(plan.programs(batch), 2, SEGMENT // BLOCK_T, plan.block_n, plan.block_d)
    launch(
        contract_kernel,
        (plan.programs(batch),),
        *(strided(x_a), strided(delta_a), strided(B_a), begin_a),
        *(strided(run_b.x), strided(run_b.delta), strided(run_b.B), begin_b),
        *(strided(run_b.z), strided(run_b.A), strided(run_b.C), strided(run_b.bias), strided(dy), future, strided(out)),
        *((scratch,), *placement(plan, length), d_state, 0),
        POS_A=strides_of_pos(x_a, delta_a, B_a),
        POS_B=strides_of_pos(run_b.x, run_b.delta, run_b.B),
        POS=strides_of_pos(run_b.C, dy, run_b.z, out),
        SOFTPLUS=run_b.softplus,
        SUM_D=sum_d_inner,
        SEGMENT=SEGMENT,
        BLOCK_N=plan.block_n,
        BLOCK_D=plan.block_d,
        BLOCK_T=BLOCK_T,
        num_warps=plan.num_warps,
    )
    return sum_parts(out.mT, batch, plan.n_blocks, length, torch.float32) if sum_d_inner else out
