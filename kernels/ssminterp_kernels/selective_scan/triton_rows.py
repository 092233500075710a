"""What the scans in tiles of positions read and write: rows, lists of positions, edits, whole states.

As in `triton_math`, tensors come as tuples (pointer, stride of each axis), absent ones as None.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    jit,
    prefetch,
    spread,
    state_numbers,
    take_held,
)
from ssminterp_kernels.selective_scan.triton_loads import count_before, tile_at
from ssminterp_kernels.selective_scan.triton_math import load_masked

LINE_BYTES = tl.constexpr(128)  # of a line of the L2 cache
FAR = tl.constexpr((1 << 31) - 2)  # a position that no tile reaches, and one more does not overflow


@jit
@no_type_check
def row_start(tensor, batch, d0, t, stride: tl.constexpr):
    """Pointer to position t and channel d0 of a tensor [batch, pos, d_inner]."""
    return tensor[0] + (batch * tensor[1] + d0 * tensor[3] + tl.cast(t, tl.int64) * stride)


@jit
@no_type_check
def load_rows(tensor, batch, d0, lane, t, there, stride: tl.constexpr, MASK_D: tl.constexpr, COUNT: tl.constexpr):
    """[BLOCK_D] of a tensor [batch, pos, d_inner] at COUNT positions from t on; zeros if there is no such tensor.

    A scalar and the lanes' offsets take fewer registers than pointers.
    """
    rows = ()
    for u in tl.static_range(COUNT):
        if tensor is None:
            rows = rows + (0.0,)
        else:
            place = row_start(tensor, batch, d0, t, stride)
            rows = rows + (load_masked(place + (lane * tensor[3] + u * stride), there, MASK_D),)
    return rows


@jit
@no_type_check
def load_per_channel(tensor, d, there):
    """One float32 number for each of the channels d, in their layout; zeros if there is no such tensor."""
    if tensor is None:
        values = (d * 0).to(tl.float32)
    else:
        values = tl.load(tensor[0] + d * tensor[1], mask=there, other=0.0).to(tl.float32)
    return values


@jit
@no_type_check
def load_block(tensor, batch, d0, t, u, lane, there, stride: tl.constexpr):
    """[pos, channel] of a tensor [batch, pos, d_inner] at the positions t + u, in a tuple; zero if there is none."""
    if tensor is None:
        block = (0.0,)
    else:
        place = row_start(tensor, batch, d0, t, stride)
        block = (tl.load(place + (u[:, None] * stride + lane[None, :] * tensor[3]), mask=there, other=0.0),)
    return block


@jit
@no_type_check
def rows_ahead(
    x,
    delta,
    z,
    batch,
    place,
    across,
    t,
    POS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    held,
    are_held,
    i,
    BLOCK: tl.constexpr,
):
    """x, delta and z at UNROLL positions from t on: rows in a program's tile, or blocks with RECORD_ALL.

    place: batch, d0, d_end, lane, there, ...; across: what numbers blocks: positions, channels, which are there.
    held: places of blocks of x and delta, if there are any; they are number i of each if they are held.
    """
    d0, lane, there = place[1], place[3], place[4]
    if RECORD_ALL:
        u, lane, there = across
        if len(held) > 0:
            to_load = there & (are_held == 0)
            x_rows = load_block(x, batch, d0, t, u, lane, to_load, POS[0])
            delta_rows = load_block(delta, batch, d0, t, u, lane, to_load, POS[1])
            x_rows = (tl.where(are_held, take_held(held[0], i, BLOCK), x_rows[0]),)
            delta_rows = (tl.where(are_held, take_held(held[1], i, BLOCK), delta_rows[0]),)
        else:
            x_rows = load_block(x, batch, d0, t, u, lane, there, POS[0])
            delta_rows = load_block(delta, batch, d0, t, u, lane, there, POS[1])
        z_rows = load_block(z, batch, d0, t, u, lane, there, POS[2])
    else:
        x_rows = load_rows(x, batch, d0, lane, t, there, POS[0], MASK_D, UNROLL)
        delta_rows = load_rows(delta, batch, d0, lane, t, there, POS[1], MASK_D, UNROLL)
        z_rows = load_rows(z, batch, d0, lane, t, there, POS[2], MASK_D, UNROLL)
    return x_rows, delta_rows, z_rows


@jit
@no_type_check
def _prefetch_lines(
    tensor, batch, place, t, stride: tl.constexpr, COUNT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr
):
    """The L2 cache will have a tensor [batch, pos, d_inner] at COUNT positions from t on; channels lie side by side."""
    LINE: tl.constexpr = LINE_BYTES // (tensor[0].dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (BLOCK_D + LINE - 1) // LINE
    d0, d_end = place[1], place[2]
    i = channel_numbers(COUNT * LINES, TILE)
    lane = i % LINES * LINE
    start = row_start(tensor, batch, d0, t, stride)
    prefetch(start + (i // LINES * stride + lane * tensor[3]), d0 + lane < d_end)


@jit
@no_type_check
def prefetch_rows(
    x, delta, z, batch, place, t, POS: tl.constexpr, COUNT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr
):
    """Begin to bring x, delta and z at COUNT positions from t on to the L2 cache."""
    _prefetch_lines(x, batch, place, t, POS[0], COUNT, BLOCK_D, TILE)
    _prefetch_lines(delta, batch, place, t, POS[1], COUNT, BLOCK_D, TILE)
    if z is not None:
        _prefetch_lines(z, batch, place, t, POS[2], COUNT, BLOCK_D, TILE)


@jit
@no_type_check
def load_weights(tensor, batch, group, t, u, n, there, stride: tl.constexpr, MASK_N: tl.constexpr):
    """Rows [UNROLL, BLOCK_N] of B or C [batch, pos, n_groups, d_state] at the positions t + u."""
    place = tensor[0] + (batch * tensor[1] + group * tensor[3] + t.to(tl.int64) * stride)
    return load_masked(place + (u[:, None] * stride + n[None, :] * tensor[4]), there, MASK_N)


@jit
@no_type_check
def load_weight_row(tensor, batch, group, t, n, n_there, stride: tl.constexpr, MASK_N: tl.constexpr):
    """Row [1, BLOCK_N] of B or C at position t, float32."""
    place = tensor[0] + (batch * tensor[1] + group * tensor[3] + tl.cast(t, tl.int64) * stride)
    return load_masked(place + n * tensor[4], n_there, MASK_N).to(tl.float32)[None, :]


@jit
@no_type_check
def events_before(positions, n_positions, t):
    """How many of the ascending positions come before t; the search waits for memory again and again, and is spared
    where nothing can come before."""
    count = tl.cast(0, tl.int32)
    if t > 0:
        count = count_before(positions, n_positions, t)
    return count


@jit
@no_type_check
def position_before(positions, i):
    """The i-th of the positions, or -1 if i is -1, going backwards."""
    found = tl.load(positions + tl.maximum(i, 0)).to(tl.int32)
    return tl.where(i >= 0, found, -1)


@jit
@no_type_check
def read_position(positions, i, n_positions):
    """The i-th of the positions, or the last; `position` says which when it is needed, so that none waits before."""
    return tl.load(positions + tl.minimum(i, n_positions - 1)).to(tl.int32)


@jit
@no_type_check
def position(read, i, n_positions):
    """The i-th of the positions as `read_position` gave it, or one that no tile reaches; 32 bits are one register."""
    return tl.where(i < n_positions, read, FAR)


@jit
@no_type_check
def position_at(listed, i):
    """The i-th of the listed positions, waited for, or one that no tile reaches; listed: (positions, how many)."""
    return position(read_position(listed[0], i, listed[1]), i, listed[1])


@jit
@no_type_check
def load_edit(tensor, batch, edit, n_edits, d, n, tile_there, NUMBER: tl.constexpr):
    """keep or add of an edit: a tile, or the one number that fills it."""
    edit = tl.minimum(edit, n_edits - 1)
    if NUMBER:
        place = tensor[0] + batch * tensor[1] + edit.to(tl.int64) * tensor[2]
        loaded = tl.load(place).to(tl.float32)
    else:
        loaded = tl.load(tile_at(tensor, batch, edit, d, n), mask=tile_there, other=0.0).to(tl.float32)
    return loaded


@jit
@no_type_check
def store_spread(tensor, batch, i, d0, d_end, d_state, tile, SPREAD: tl.constexpr, STREAM: tl.constexpr = False):
    """Write item i of a tensor [batch, i, d_inner, d_state], lanes side by side along d_state.

    As a thread holds them, 16 numbers of a channel, its stores would reach half of the memory's bandwidth. STREAM: so
    much is written that it should not drive what will be read again out of the cache.
    """
    d = d0 + channel_numbers(tile.shape[0], SPREAD)
    n = state_numbers(tile.shape[1], SPREAD)
    place = tile_at(tensor, batch, i, d, n)
    mask = (d < d_end)[:, None] & (n < d_state)[None, :]
    if STREAM:
        tl.store(place, spread(tile, SPREAD), mask=mask, cache_modifier=".cs")
    else:
        tl.store(place, spread(tile, SPREAD), mask=mask)
