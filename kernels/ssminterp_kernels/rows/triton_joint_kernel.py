"""The Triton kernel that scans whole runs, and in the same launch rows that go on from their states.

What it is given is told in `triton_joint`. Tensors of tokens come as tuples (pointer, stride of the token); channels
are contiguous.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.rows.triton_kernels import load_state, store_state, write_gated
from ssminterp_kernels.selective_scan.triton_math import LOG2E, advance, load_channels, step_size

# What a fork takes from the source run at its site; `triton_joint` gives them names.
STATE, DELTA, B_ROW = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
@no_type_check
def _channels_at(tensor, token, d, there):
    return tl.load(tensor[0] + token.to(tl.int64) * tensor[1] + d, mask=there, other=0.0)


@triton.jit
@no_type_check
def _states_at(tensor, token, n, n_there):
    return tl.load(tensor[0] + token.to(tl.int64) * tensor[1] + n, mask=n_there, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _inputs_at(x, delta, B, C, gate, token, d, n, there, n_there):
    return (
        _channels_at(x, token, d, there),
        _channels_at(delta, token, d, there),
        _states_at(B, token, n, n_there),
        _states_at(C, token, n, n_there),
        _channels_at(gate, token, d, there),
    )


@triton.jit(do_not_specialize=["n_runs", "length", "n_tiles", "n_units", "n_tile", "n_blocks", "n_finished", "zero"])
@no_type_check
def joint_scan_kernel(
    x,
    delta,
    B,
    C,
    gate,
    A,
    D,
    bias,
    out,
    slots,
    states,
    sites,
    kinds,
    starts,
    lengths,
    finished,
    d_inner,
    d_state,
    n_runs,
    length,
    n_tiles,
    n_units,
    n_tile,
    n_blocks,
    n_finished,
    zero,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per run and BLOCK_D channels, then one per row of n_units tiles and BLOCK_D channels.

    finished: of every block of channels how many runs have been scanned, n_finished of them when the rows may begin.
    Programs start in the order of their numbers, so that those which others wait for have started.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    unit = pid // n_blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    there = d < d_inner
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    A2 = load_state(A, d, d_state, n, there, tile_there, zero, WIDE) * LOG2E
    bias_row = load_channels(bias, d, there)
    D_row = load_channels(D, d, there)
    if unit < n_runs:
        state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        token = unit
        upcoming = _inputs_at(x, delta, B, C, gate, token, d, n, there, n_there)
        for t in tl.range(0, length):
            now_x, now_delta, now_B, now_C, z = upcoming
            slot = tl.load(slots + token)
            out_at = out + token.to(tl.int64) * d_inner + d
            token = tl.minimum(t + 1, length - 1) * n_runs + unit
            upcoming = _inputs_at(x, delta, B, C, gate, token, d, n, there, n_there)
            state = advance(state, A2, step_size(now_delta, bias_row, True), now_x, now_B)
            write_gated(state, now_x, now_C, D_row, z, out_at, there)
            store_state(states, slot, d, d_inner, d_state, n, state, there, tile_there, WIDE)
        tl.debug_barrier()
        tl.atomic_add(finished + block, 1, sem="release")
    else:
        place = unit - n_runs
        one = place % n_units
        row = place // n_units  # the longest rows first
        first = n_runs * length
        begin = first + one * n_tile
        origin = begin
        kind = 0
        if one >= n_tiles:
            kind = tl.load(kinds + one - n_tiles)
            origin = first
        site = tl.load(sites + row * 3 + (kind == STATE).to(tl.int32))
        source = tl.load(sites + row * 3 + 2)
        row_length = tl.load(lengths + row)
        token = origin + row
        x_row, delta_row, B_values, C_values, z_row = _inputs_at(x, delta, B, C, gate, token, d, n, there, n_there)
        if kind == DELTA:
            delta_row = _channels_at(delta, source, d, there)
        if kind == B_ROW:
            B_values = _states_at(B, source, n, n_there)
        while tl.atomic_add(finished + block, 0, sem="acquire") < n_finished:
            pass
        tl.debug_barrier()
        first_state = states + site.to(tl.int64) * d_inner * d_state
        state = load_state(first_state, d, d_state, n, there, tile_there, zero, WIDE)
        within = row
        for t in tl.range(0, row_length):
            now_x, now_delta, now_B, now_C, z = x_row, delta_row, B_values, C_values, z_row
            out_at = out + (begin + within).to(tl.int64) * d_inner + d
            within = tl.load(starts + tl.minimum(t + 1, row_length - 1)) + row
            token = origin + within
            x_row, delta_row, B_values, C_values, z_row = _inputs_at(x, delta, B, C, gate, token, d, n, there, n_there)
            if (t > 0) | (kind != STATE):
                state = advance(state, A2, step_size(now_delta, bias_row, True), now_x, now_B)
            write_gated(state, now_x, now_C, D_row, z, out_at, there)
