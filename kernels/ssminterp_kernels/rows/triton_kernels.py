"""The stages of `rows` in Triton; what they are given and give back is told in `triton_stages`.

A program works on one row and BLOCK_D channels in the scan, and on tokens × channels in the conv. Tensors [tiles,
tokens, channels] come as tuples (pointer, stride of the tile, stride of the token); channels are contiguous. Tiles that
share a tensor have stride 0 there.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_math import (
    LOG2E,
    advance,
    load_channels,
    load_wide,
    silu,
    step_size,
    store_wide,
    tile,
)


@triton.jit(do_not_specialize=["n_own", "n_out", "n_blocks"])
@no_type_check
def conv_rows_kernel(
    own,
    shared,
    window,
    taps,
    bias,
    y,
    starts,
    rows,
    positions,
    d_inner,
    n_own,
    n_out,
    n_blocks,
    D_CONV: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [tiles, n_out, d_inner]. own: of the first n_own tokens of a tile; shared: of the others."""
    pid = tl.program_id(0)
    d = (pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n_times = tl.cdiv(n_out, BLOCK_T)
    token = ((pid // n_blocks) % n_times) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile_ = (pid // n_blocks // n_times).to(tl.int64)
    there = (d < d_inner)[None, :]
    exists = token < n_out
    row = tl.load(rows + token, mask=exists, other=0)
    t = tl.load(positions + token, mask=exists, other=0)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + load_channels(bias, d, d < d_inner)[None, :]
    for j in tl.static_range(D_CONV):
        at = t - (D_CONV - 1) + j
        before = tl.load(starts + at, mask=exists & (at >= 0), other=0) + row
        is_own = (exists & (at >= 0) & (before < n_own))[:, None] & there
        is_shared = (exists & (at >= 0) & (before >= n_own))[:, None] & there
        place = before.to(tl.int64)[:, None]
        inputs = tl.load(own[0] + tile_ * own[1] + place * own[2] + d[None, :], mask=is_own, other=0.0).to(tl.float32)
        if shared is not None:
            inputs += tl.load(shared[0] + place * shared[2] + d[None, :], mask=is_shared, other=0.0).to(tl.float32)
        earlier = (exists & (at < 0))[:, None] & there
        place = row.to(tl.int64)[:, None] * window[1] + (D_CONV - 1 + at)[:, None] * window[2]
        inputs += tl.load(window[0] + place + d[None, :], mask=earlier, other=0.0).to(tl.float32)
        tap = tl.load(taps[0] + j * taps[1] + d * taps[2], mask=d < d_inner, other=0.0).to(tl.float32)
        total += tap[None, :] * inputs
    if SILU:
        total = total.to(y.dtype.element_ty).to(tl.float32)
        total = silu(total)
    place = (tile_ * n_out + token)[:, None] * d_inner + d[None, :]
    tl.store(y + place, total, mask=exists[:, None] & there)


@triton.jit(do_not_specialize=["n_tokens", "n_shared", "n_tile", "n_blocks"])
@no_type_check
def conv_tokens_kernel(
    inputs,
    taps,
    bias,
    y,
    earlier,
    d_inner,
    n_tokens,
    n_shared,
    n_tile,
    n_blocks,
    D_CONV: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y [n_tokens, d_inner]: of n_shared tokens, and behind them of tiles of n_tile tokens.

    inputs: (pointer, stride of the token). earlier: [n_shared + n_tile, D_CONV - 1], which tokens come before each,
    the oldest first: a shared one, -1 for none, or -2 - k for token k of its own tile.
    """
    pid = tl.program_id(0)
    d = (pid % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = (pid // n_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = (d < d_inner)[None, :]
    exists = token < n_tokens
    tile_ = tl.maximum(token - n_shared, 0) // n_tile
    begin = n_shared + tile_ * n_tile
    kind = token - tl.where(token < n_shared, 0, tile_ * n_tile)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + load_channels(bias, d, d < d_inner)[None, :]
    for j in tl.static_range(D_CONV):
        if j == D_CONV - 1:
            at = token
        else:
            at = tl.load(earlier + kind * (D_CONV - 1) + j, mask=exists, other=-1)
            at = tl.where(at < -1, begin - 2 - at, at)
        mask = (exists & (at >= 0))[:, None] & there
        before = tl.load(inputs[0] + at.to(tl.int64)[:, None] * inputs[1] + d[None, :], mask=mask, other=0.0)
        tap = tl.load(taps[0] + j * taps[1] + d * taps[2], mask=d < d_inner, other=0.0).to(tl.float32)
        total += tap[None, :] * before.to(tl.float32)
    if SILU:
        total = total.to(y.dtype.element_ty).to(tl.float32)
        total = silu(total)
    place = token.to(tl.int64)[:, None] * d_inner + d[None, :]
    tl.store(y + place, total, mask=exists[:, None] & there)


@triton.jit
@no_type_check
def _load_row(x, delta, B, C, tile_, token, d, n, there, n_there):
    """x, delta, B and C at one token of a tile."""
    at = token.to(tl.int64)
    return (
        tl.load(x[0] + tile_ * x[1] + at * x[2] + d, mask=there, other=0.0),
        tl.load(delta[0] + tile_ * delta[1] + at * delta[2] + d, mask=there, other=0.0),
        tl.load(B[0] + tile_ * B[1] + at * B[2] + n, mask=n_there, other=0.0).to(tl.float32),
        tl.load(C[0] + tile_ * C[1] + at * C[2] + n, mask=n_there, other=0.0).to(tl.float32),
    )


@triton.jit
@no_type_check
def load_state(at, d, d_state, n, there, tile_there, zero, WIDE: tl.constexpr):
    """Float32 [BLOCK_N, BLOCK_D] of a state, or of A; WIDE: a channel has BLOCK_N numbers, and at least 4."""
    if WIDE:
        state = load_wide(at, d, d_state, there, n.shape[0])
    else:
        state = tl.load(tile(at, d, d_state, n, 1, zero), mask=tile_there, other=0.0)
    return state


@triton.jit
@no_type_check
def store_state(states, slot, d, d_inner, d_state, n, state, there, tile_there, WIDE: tl.constexpr):
    """Write a state to its slot, if that is not negative."""
    if slot >= 0:
        state_at = states + tl.cast(slot, tl.int64) * d_inner * d_state
        if WIDE:
            store_wide(state_at, d, d_state, state, there)
        else:
            tl.store(state_at + d[None, :] * d_state + n[:, None], state, mask=tile_there)


@triton.jit
@no_type_check
def write_gated(state, x, C, D_row, z, out_at, there):
    """What is read from a state, with D and the gate."""
    y = tl.sum(state * C[:, None], 0) + D_row * x.to(tl.float32)
    tl.store(out_at, y * silu(z), mask=there)


@triton.jit
@no_type_check
def _advance_and_write(state, A2, row_values, step, D_row, k, z, out_at, d_inner, there):
    """One update, and where place k is not negative what is read from it."""
    x = row_values[0]
    state = advance(state, A2, step, x, row_values[2])
    if k >= 0:
        write_gated(state, x, row_values[3], D_row, z, out_at + tl.cast(k, tl.int64) * d_inner, there)
    return state


@triton.jit
@no_type_check
def _place_and_gate(kept, token, gates, stride, there):
    """The place of a token and its gate, which is loaded a token ahead: a scan has little else to wait for."""
    k = token if kept is None else tl.load(kept + token)
    return k, tl.load(gates + tl.cast(k, tl.int64) * stride, mask=there & (k >= 0), other=0.0)


@triton.jit(do_not_specialize=["tiles", "reach", "n_first_gates", "n_keep", "n_blocks", "zero"])
@no_type_check
def scan_rows_kernel(
    start,
    own_x,
    own_delta,
    own_B,
    own_C,
    base_x,
    base_delta,
    base_B,
    base_C,
    A,
    D,
    bias,
    gate,
    first_gate,
    kept,
    slots,
    states,
    out,
    starts,
    lengths,
    d_inner,
    d_state,
    tiles,
    reach,
    n_first_gates,
    n_keep,
    n_blocks,
    zero,
    OWN_RAW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [tiles, n_keep, d_inner]; one program per row and BLOCK_D channels.

    own_…: x, delta, B and C at the first `reach` positions; None if `start` is the state after the first one. base_…:
    the same at all others, raw; None if there are none. start: the state before each row, (pointer, stride of tile,
    stride of row). gate: of the tokens that are kept; first_gate: at position 0 in the first n_first_gates tiles. kept:
    the place of every token, negative where it is not wanted; None means all. slots: the place among `states` of the
    state after every token of `own`, of a single tile, negative where it is not wanted; None means nowhere.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    one = ((pid // n_blocks) % tiles).to(tl.int64)
    row = pid // n_blocks // tiles  # the longest rows first
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    there = d < d_inner
    n_there = n < d_state
    tile_there = n_there[:, None] & there[None, :]
    first_state = start[0] + one * start[1] + row.to(tl.int64) * start[2]
    A2 = load_state(A, d, d_state, n, there, tile_there, zero, WIDE) * LOG2E
    state = load_state(first_state, d, d_state, n, there, tile_there, zero, WIDE)
    bias_row = load_channels(bias, d, there)
    D_row = load_channels(D, d, there)
    length = tl.load(lengths + row)
    gates = gate[0] + one * gate[1] + d
    outs = out + one * n_keep * d_inner + d
    token = row
    if own_x is None:
        values = _load_row(base_x, base_delta, base_B, base_C, 0, token, d, n, there, n_there)
        k, z = _place_and_gate(kept, token, gates, gate[2], there)
        if k >= 0:
            write_gated(state, values[0], values[3], D_row, z, outs + tl.cast(k, tl.int64) * d_inner, there)
        forked = 1
    else:
        forked = tl.minimum(reach, length)
        upcoming = _load_row(own_x, own_delta, own_B, own_C, one, token, d, n, there, n_there)
        next_k, next_z = _place_and_gate(kept, token, gates, gate[2], there)
        if first_gate is not None:
            if one < n_first_gates:
                first_at = first_gate[0] + one * first_gate[1] + row.to(tl.int64) * first_gate[2]
                next_z = tl.load(first_at + d, mask=there, other=0.0)
        for t in tl.range(0, forked):
            values = upcoming
            k, z = next_k, next_z
            slot = -1 if slots is None else tl.load(slots + token)
            token = tl.load(starts + tl.minimum(t + 1, forked - 1)) + row
            upcoming = _load_row(own_x, own_delta, own_B, own_C, one, token, d, n, there, n_there)
            next_k, next_z = _place_and_gate(kept, token, gates, gate[2], there)
            if OWN_RAW:
                step = step_size(values[1], bias_row, True)
            else:
                step = values[1].to(tl.float32)
            state = _advance_and_write(state, A2, values, step, D_row, k, z, outs, d_inner, there)
            if slots is not None:
                store_state(states, slot, d, d_inner, d_state, n, state, there, tile_there, WIDE)
    if base_x is not None:
        token = tl.load(starts + tl.minimum(forked, length - 1)) + row
        upcoming = _load_row(base_x, base_delta, base_B, base_C, 0, token, d, n, there, n_there)
        next_k, next_z = _place_and_gate(kept, token, gates, gate[2], there)
        for t in tl.range(forked, length):
            values = upcoming
            k, z = next_k, next_z
            token = tl.load(starts + tl.minimum(t + 1, length - 1)) + row
            upcoming = _load_row(base_x, base_delta, base_B, base_C, 0, token, d, n, there, n_there)
            next_k, next_z = _place_and_gate(kept, token, gates, gate[2], there)
            step = step_size(values[1], bias_row, True)
            state = _advance_and_write(state, A2, values, step, D_row, k, z, outs, d_inner, there)
