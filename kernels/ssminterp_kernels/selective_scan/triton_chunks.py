"""What chunks of time do to the state before them, and the state with which every chunk then begins.

A chunk maps the state h before it to the state after it by an affine map `decay · h + local`. All chunks of one launch
work out theirs at the same time; then the state is handed on from program to program ("decoupled look-back", Merrill
and Garland 2016), in an order that does not depend on scheduling.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan.triton_layouts import (
    full_row,
    full_tile,
    hold,
    jit,
    put,
    take_column,
    take_row,
)
from ssminterp_kernels.selective_scan.triton_loads import load_tile, tile_at
from ssminterp_kernels.selective_scan.triton_math import step_size
from ssminterp_kernels.selective_scan.triton_rows import (
    events_before,
    load_edit,
    load_weights,
    position,
    position_at,
    read_position,
    rows_ahead,
)

GROUP = tl.constexpr(4)  # chunks that work out together what they do, so that fewer wait for one another


@jit
@no_type_check
def _position(
    state,
    elapsed,
    A2,
    bias_row,
    rows,
    B_shared,
    shared,
    u: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state and the sum of steps [BLOCK_D, 1] after the u-th position of a tile."""
    if RECORD_ALL:
        step = take_column(shared[0], u, TILE)
        dx = take_column(shared[1], u, TILE)
    else:
        step_row = step_size(rows[1][u], bias_row, SOFTPLUS)
        step = step_row[:, None]
        dx = (step_row * rows[0][u].to(tl.float32))[:, None]
    return tl.exp2(step * A2) * state + dx * take_row(B_shared, u, TILE), elapsed + step


@jit
@no_type_check
def summarise(
    x,
    delta,
    B,
    edits,
    keep,
    add,
    A2,
    bias,
    B_shared,
    shared,
    held,
    numbers,
    t,
    stop,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """decay and local of a whole chunk, a multiple of UNROLL positions: it takes the state h to decay · h + local.

    Between edits the decay of all steps is exp(their sum · A). numbers: as `rows_ahead` takes its place and across,
    then what numbers a row of B (positions, d_state, which are there) and the channels. With RECORD_ALL lanes share the
    steps as in the pass that writes states, and x and delta are left in `held`, if it has places, for that pass.
    """
    place, across, of_rows, d = numbers
    row_u, row_n, row_there = of_rows
    batch, there, group, n, n_there = place[0], place[4], place[5], place[6], place[7]
    tile_there = there[:, None] & n_there[None, :]
    state = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    elapsed = full_row(0.0, BLOCK_D, TILE)[:, None]  # since the last edit
    decay = full_tile(1.0, BLOCK_D, BLOCK_N, TILE)  # up to the last edit
    if edits is not None:
        edits_here = edits[0] + batch * edits[1]
        edit = events_before(edits_here, edits[2], t)
        next_edit = position_at((edits_here, edits[2]), edit)
    first = t
    window = t
    ahead = rows_ahead(x, delta, None, batch, place, across, t, POS, RECORD_ALL, MASK_D, UNROLL, (), False, 0, None)
    B_next = load_weights(B, batch, group, t, row_u, row_n, row_there, POS[3], MASK_N)
    while t < stop:
        end = t + UNROLL
        if edits is not None:
            end = tl.minimum(tl.minimum(end, stop), next_edit + 1)
            edited = end == next_edit + 1
            edit_here = edit
            edit += edited.to(tl.int32)
            read_edit = read_position(edits_here, edit, edits[2])
        rows = ahead
        put(B_shared, B_next.to(tl.float32))
        window_next = tl.minimum(end, stop - UNROLL)
        ahead = rows_ahead(
            x, delta, None, batch, place, across, window_next, POS, RECORD_ALL, MASK_D, UNROLL, (), False, 0, None
        )
        B_next = load_weights(B, batch, group, window_next, row_u, row_n, row_there, POS[3], MASK_N)
        if len(held) > 0:
            hold(held[0], (t - first) // UNROLL, rows[0][0])
            hold(held[1], (t - first) // UNROLL, rows[1][0])
        if RECORD_ALL:
            step_block = step_size(rows[1][0], bias[1][None, :], SOFTPLUS)
            put(shared[0], step_block)
            put(shared[1], step_block * rows[0][0].to(tl.float32))
        if edits is None:
            for u in tl.static_range(UNROLL):
                state, elapsed = _position(
                    state, elapsed, A2, bias[0], rows, B_shared, shared, u, SOFTPLUS, RECORD_ALL, TILE
                )
        else:
            if end - t == UNROLL:
                for u in tl.static_range(UNROLL):
                    state, elapsed = _position(
                        state, elapsed, A2, bias[0], rows, B_shared, shared, u, SOFTPLUS, RECORD_ALL, TILE
                    )
            else:
                for u in tl.static_range(UNROLL):
                    if (window + u >= t) & (window + u < end):
                        state, elapsed = _position(
                            state, elapsed, A2, bias[0], rows, B_shared, shared, u, SOFTPLUS, RECORD_ALL, TILE
                        )
            if edited:
                kept = load_edit(keep, batch, edit_here, edits[2], d, n, tile_there, NUMBERS[0])
                added = load_edit(add, batch, edit_here, edits[2], d, n, tile_there, NUMBERS[1])
                state = state * kept + added
                decay = decay * tl.exp2(elapsed * A2) * kept
                elapsed = full_row(0.0, BLOCK_D, TILE)[:, None]
            next_edit = position(read_edit, edit, edits[2])
        window = window_next
        t = end
    return decay * tl.exp2(elapsed * A2), state


@jit
@no_type_check
def wait_for(flag):
    """Until `announce` was called with this flag, by a program of a lower number.

    Programs start in the order of their numbers (as CUB's scans also rely on), so the other one runs or has run.
    """
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass


@jit
@no_type_check
def announce(flag):
    """That what this program has stored may be read."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release")


@jit
@no_type_check
def state_before_chunk(
    x,
    delta,
    B,
    edits,
    keep,
    add,
    A2,
    bias,
    B_shared,
    shared,
    held,
    numbers,
    chunk,
    t,
    stop,
    n_chunks,
    effects,
    flags,
    per_chunk,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
):
    """The state before a chunk other than the first; leaves what later chunks need to know of this one.

    effects: decays, locals and ends, each [batch, n_chunks, d_inner, d_state]; per_chunk: programs of a chunk. GROUP
    chunks after the first are a group: each works out what those of its group before it do together, and applies that
    to the state at the end of the group before. So the way from the first chunk to the last has n_chunks / GROUP steps.
    """
    place, d = numbers[0], numbers[3]
    batch, there, n, n_there = place[0], place[4], place[6], place[7]
    tile_there = there[:, None] & n_there[None, :]
    decays, locals_, ends = effects
    pid = tl.program_id(0)
    end_flags = flags + tl.num_programs(0)
    first = chunk - (chunk - 1) % GROUP
    is_last = (chunk - first == GROUP - 1) & (chunk < n_chunks - 1)
    decay = full_tile(1.0, BLOCK_D, BLOCK_N, TILE)
    local = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    if chunk < n_chunks - 1:
        decay, local = summarise(
            *(x, delta, B, edits, keep, add, A2, bias, B_shared, shared, held, numbers, t, stop),
            *(POS, NUMBERS, SOFTPLUS, RECORD_ALL, MASK_D, MASK_N, BLOCK_N, BLOCK_D, UNROLL, TILE),
        )
        if not is_last:
            tl.store(tile_at(decays, batch, chunk, d, n), decay, mask=tile_there)
            tl.store(tile_at(locals_, batch, chunk, d, n), local, mask=tile_there)
            announce(flags + pid)
    decay_before = full_tile(1.0, BLOCK_D, BLOCK_N, TILE)
    local_before = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    for earlier in range(first, chunk):
        wait_for(flags + (pid - (chunk - earlier) * per_chunk))
        decay_there = load_tile(decays, batch, earlier, d, n, tile_there)
        decay_before *= decay_there
        local_before = decay_there * local_before + load_tile(locals_, batch, earlier, d, n, tile_there)
    wait_for(end_flags + (pid - (chunk - first + 1) * per_chunk))
    state = decay_before * load_tile(ends, batch, first - 1, d, n, tile_there) + local_before
    if is_last:
        tl.store(tile_at(ends, batch, chunk, d, n), decay * state + local, mask=tile_there)
        announce(end_flags + pid)
    return state


@triton.jit(do_not_specialize=["count"])
@no_type_check
def clear_kernel(numbers, count, BLOCK: tl.constexpr):
    """Zeros: nobody has announced anything yet, nothing has been added up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(numbers + i, tl.zeros((BLOCK,), numbers.dtype.element_ty), mask=i < count)
