"""The adjoints of all states, dLoss/dstate_t at every position, backwards in one pass over time.

What it takes is the writing of the adjoints: the lanes of a channel lie side by side along d_state, so that stores fill
whole lines of memory, and share what is computed once for the channel. As in `triton_forward` positions are taken in
tiles without branches; a tile stops at an edit, which happens between tiles.
"""

from __future__ import annotations

from typing import Any, no_type_check

import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.launching import launch
from ssminterp_kernels.selective_scan.arguments import ScanArguments
from ssminterp_kernels.selective_scan.triton_adjoint import scan_adjoint_kernel
from ssminterp_kernels.selective_scan.triton_gradients import adjoint_options, futures_of_chunks
from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    forward_layouts_of,
    full_tile,
    jit,
    position_numbers,
    put,
    row_state_numbers,
    shared_rows,
    state_numbers,
    take_column,
    take_row,
)
from ssminterp_kernels.selective_scan.triton_loads import count_before, load_tile, tile_at
from ssminterp_kernels.selective_scan.triton_math import LOG2E, gated, step_size
from ssminterp_kernels.selective_scan.triton_plan import Plan, for_all_adjoints, plan_scan, processor_count
from ssminterp_kernels.selective_scan.triton_rows import (
    load_block,
    load_per_channel,
    load_weights,
    position_before,
    prefetch_rows,
)
from ssminterp_kernels.selective_scan.triton_tensors import (
    ScanTensors,
    edit_table,
    in_lines,
    new_states,
    placement,
    position_table,
    scan_tensors,
    strided,
    strided_state,
    strides_of_pos,
)


@jit
@no_type_check
def _loaded(delta, dy, z, C, batch, group, d0, t, across, of_weights, POS: tl.constexpr, MASK_N: tl.constexpr):
    """delta, dy and z [pos, channel] and C [pos, d_state] at the positions of the tile that begins at t.

    across, of_weights: what numbers such blocks: positions; channels or states; and which are there.
    """
    u, lane, there = across
    row_u, row_n, row_there = of_weights
    delta_block = load_block(delta, batch, d0, t, u, lane, there, POS[0])[0]
    dy_block = load_block(dy, batch, d0, t, u, lane, there, POS[1])[0]
    z_block = load_block(z, batch, d0, t, u, lane, there, POS[2])[0]
    return delta_block, dy_block, z_block, load_weights(C, batch, group, t, row_u, row_n, row_there, POS[3], MASK_N)


@jit
@no_type_check
def _prepared(blocks, z, bias_row, u, row_u, low, top, SOFTPLUS: tl.constexpr, PARTIAL: tl.constexpr):
    """Δ, dLoss/d(y before the gate) and C of a tile, float32; zeros, which change no adjoint, outside low..top."""
    steps = step_size(blocks[0], bias_row[None, :], SOFTPLUS)
    dy = gated(blocks[1], blocks[2], z)
    weights = blocks[3].to(tl.float32)
    if PARTIAL:
        inside = ((u >= low) & (u <= top))[:, None]
        steps = tl.where(inside, steps, 0.0)
        dy = tl.where(inside, dy, 0.0)
        weights = tl.where(((row_u >= low) & (row_u <= top))[:, None], weights, 0.0)
    return steps, dy, weights


@jit
@no_type_check
def _write_tile(
    carry,
    A2,
    shared,
    target,
    there,
    low,
    top,
    STRIDE: tl.constexpr,
    PARTIAL: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """What goes on from a tile's positions low..top, whose adjoints are written."""
    for u in tl.static_range(UNROLL - 1, -1, -1):
        adjoint = carry + take_row(shared[2], u, TILE) * take_column(shared[1], u, TILE)
        mask = there
        if PARTIAL:
            mask = there & (u >= low) & (u <= top)
        tl.store(target + u * STRIDE, adjoint, mask=mask, cache_modifier=".cs")
        carry = tl.exp2(take_column(shared[0], u, TILE) * A2) * adjoint
    return carry


@jit(do_not_specialize=["batches", "elements", "length", "chunk_length", "n_chunks", "n_blocks", "group_size"])
@no_type_check
def adjoint_trajectory_kernel(
    delta,
    z,
    A,
    C,
    bias,
    edits,
    keep,
    dy,
    future,
    adjoints,
    batches,
    elements,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    POS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BEYOND: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One program: BLOCK_D channels of one group, one chunk, `elements` batch elements one after the other.

    future: the gradient of the state after each chunk [batch, n_chunks, d_inner, d_state], None for zeros; adjoints:
    [batch, pos, d_inner, d_state]. POS: the strides of the position axes of delta, dy, z, C and adjoints, as constants
    so that neighbouring positions cost no address arithmetic. PARTIAL: some tile may hold less than UNROLL positions.
    BEYOND: the tile after the next is brought to the L2 cache meanwhile.

    A tile lies in shared memory while its adjoints are written, and the next one is on its way.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    chunk = (pid // n_blocks) % n_chunks
    batch = (pid // n_blocks // n_chunks * elements).to(tl.int64)
    last_batch = tl.minimum(batch + elements, batches) - 1
    blocks_per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group = block // blocks_per_group
    d0 = (group * group_size + (block % blocks_per_group) * BLOCK_D).to(tl.int64)
    d_end = (group + 1) * group_size
    d = d0 + channel_numbers(BLOCK_D, TILE)
    n = state_numbers(BLOCK_N, TILE)
    there = (d < d_end)[:, None] & (n < d_state)[None, :]
    A2 = tl.load(A[0] + (d[:, None] * A[1] + n[None, :] * A[2]), mask=there, other=0.0).to(tl.float32) * LOG2E
    u = position_numbers(UNROLL, BLOCK)
    lane = row_state_numbers(BLOCK_D, BLOCK)
    lane_there = d0 + lane < d_end
    bias_row = load_per_channel(bias, d0 + lane, lane_there)
    across = (u, lane, lane_there[None, :] & (u >= 0)[:, None])
    row_u = position_numbers(UNROLL, ROWS)
    row_n = row_state_numbers(BLOCK_N, ROWS)
    of_weights = (row_u, row_n, (row_n < d_state)[None, :] & (row_u >= 0)[:, None])
    shared = (
        shared_rows(UNROLL, BLOCK_D, PLAIN),
        shared_rows(UNROLL, BLOCK_D, PLAIN),
        shared_rows(UNROLL, BLOCK_N, PLAIN),
    )
    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)

    top = stop - 1
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = count_before(edits_here, edits[2], stop) - 1
        next_edit = position_before(edits_here, edit)
    if future is None:
        carry = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    else:
        carry = load_tile(future, batch, chunk, d, n, there)
    window = tl.maximum(stop - UNROLL, 0)
    ahead = _loaded(delta, dy, z, C, batch, group, d0, window, across, of_weights, POS, MASK_N)
    while batch <= last_batch:
        # Positions low..top of the UNROLL that begin at window.
        window = tl.maximum(top + 1 - UNROLL, 0)
        low = tl.maximum(top + 1 - UNROLL, first)
        if edits is not None:
            low = tl.maximum(low, next_edit)
        steps, inputs, weights = _prepared(ahead, z, bias_row, u, row_u, low - window, top - window, SOFTPLUS, PARTIAL)
        put(shared[0], steps)
        put(shared[1], inputs)
        put(shared[2], weights)
        # The next tile is under way while this one is written, also across batch elements.
        ends = low == first
        batch_next = tl.minimum(batch + ends.to(tl.int64), last_batch)
        top_next = tl.where(ends, stop, low) - 1
        window_next = tl.maximum(top_next + 1 - UNROLL, 0)
        ahead = _loaded(delta, dy, z, C, batch_next, group, d0, window_next, across, of_weights, POS, MASK_N)
        if BEYOND:
            window_beyond = tl.maximum(window_next - UNROLL, 0)
            prefetch_rows(
                *(delta, dy, z, batch_next, (batch_next, d0, d_end), window_beyond, POS, UNROLL, BLOCK_D, TILE)
            )
        target = tile_at(adjoints, batch, window, d, n)
        carry = _write_tile(
            *(carry, A2, shared, target, there, low - window, top - window),
            *(POS[4], PARTIAL, UNROLL, TILE),
        )
        if edits is not None:
            if low == next_edit:
                carry *= load_tile(keep, batch, edit, d, n, there)
                edit -= 1
                next_edit = position_before(edits_here, edit)
        top = top_next
        if ends:
            batch += 1
            if future is None:
                carry = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
            else:
                carry = load_tile(future, batch_next, chunk, d, n, there)
            if edits is not None:
                edits_here = edits[0] + batch_next * edits[1]
                edit = count_before(edits_here, edits[2], stop) - 1
                next_edit = position_before(edits_here, edit)


def triton_adjoints(arguments: ScanArguments) -> Float[Tensor, "batch n_positions d_inner d_state"]:
    """dLoss/dstate at the positions in `arguments.states`; dy is `arguments.x`, dfinal_state `arguments.initial_state`.

    Where batch × d_inner is too small, time is cut in chunks, which are summarised, combined and replayed.
    """
    s = scan_tensors(arguments)
    batch, length, _ = s.x.shape
    n_emitted = length if s.recorded is None else s.recorded.shape[0]
    adjoints = new_states(s, batch, n_emitted, dtype=s.states_dtype)
    if s.recorded is None:
        _write_all(s, adjoints)
    elif n_emitted:
        _write_some(s, adjoints)
    return adjoints


def adjoint_plan(s: ScanTensors) -> Plan:
    """How the scan of adjoints alone covers s."""
    batch, length, d_inner = s.x.shape
    sizes = (batch, length, d_inner, s.A.shape[1], s.B.shape[2], processor_count(s.x.device))
    return plan_scan(*sizes, unroll=8, enough_warps=3, warps_wanted=12, widest_block=64)


def _future(s: ScanTensors, plan: Plan, is_chunked: bool) -> tuple[Any, ...] | None:
    """The gradient of the state after each chunk, from what comes after it."""
    if is_chunked:
        return strided(futures_of_chunks(s, plan, s.x, None, s.initial_state))
    return strided_state(s.initial_state)


def _write_some(s: ScanTensors, adjoints: Tensor) -> None:
    plan = adjoint_plan(s)
    launch(
        scan_adjoint_kernel,
        (plan.programs(s.x.shape[0]),),
        *(strided(s.delta), strided(s.z), strided(s.A), strided(s.C), strided(s.bias), edit_table(s.edits)),
        *(strided(s.keep), None, strided(s.x), None, _future(s, plan, plan.is_chunked), position_table(s.recorded)),
        *(strided(adjoints), None, None),
        **adjoint_options(s, plan, s.x, events=True),
    )


def _write_all(s: ScanTensors, adjoints: Tensor) -> None:
    batch, length, _ = s.x.shape
    d_state = s.A.shape[1]
    scanned = adjoint_plan(s)
    plan = for_all_adjoints(scanned, batch, length, processor_count(s.x.device), s.edits is not None)
    layouts = forward_layouts_of(plan.block_d, plan.block_n, plan.unroll, plan.num_warps, plan.per_thread)
    launch(
        adjoint_trajectory_kernel,
        (plan.programs(-(-batch // plan.elements)),),
        *(strided(s.delta), strided(s.z), strided(s.A), strided(s.C), strided(s.bias), edit_table(s.edits)),
        *(strided(s.keep), strided(s.x), _future(s, scanned, plan.is_chunked), strided(adjoints)),
        *(batch, plan.elements, *placement(plan, length), d_state),
        POS=strides_of_pos(s.delta, s.x, s.z, s.C, adjoints),
        SOFTPLUS=s.softplus,
        PARTIAL=s.edits is not None or length % plan.unroll != 0,
        BEYOND=plan.beyond and in_lines(s.delta, s.x, s.z),
        MASK_N=plan.block_n != d_state,
        BLOCK_N=plan.block_n,
        BLOCK_D=plan.block_d,
        UNROLL=plan.unroll,
        TILE=layouts.tile,
        BLOCK=layouts.block,
        ROWS=layouts.rows,
        PLAIN=layouts.plain,
        num_warps=plan.num_warps,
        maxnreg=plan.max_registers,
    )
