"""The forward scan in Gluon: one pass over time, or chunks of time in parallel where batch × d_inner is small.

A program of a chunk works out what the chunk does to the state before it, waits for that state and goes through the
chunk once more (`triton_chunks`). So the exponentials are paid twice, where one pass would not fill the GPU. What it
reads is paid once: where all states are written, they drive the inputs out of the cache, so that shared memory holds
these; elsewhere the cache does.

Positions are taken in tiles of UNROLL, which the compiler overlaps as long as no branch is between them. An edit
therefore begins a tile: where less than a tile is left before the next of them, or before the end, positions are taken
one by one, and the next tile begins after these. Only of more edits than tiles, any of a tile's positions may be edited
(`triton_edited_tile`). A tile in which one position is recorded is of another kind, which writes the state after any
position if that is the one; if several are, its positions are taken one by one.
"""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl

from ssminterp_kernels.selective_scan.triton_chunks import announce, state_before_chunk
from ssminterp_kernels.selective_scan.triton_edited_tile import queue_from, scan_edited_tile
from ssminterp_kernels.selective_scan.triton_edits import (
    edits_after,
    edits_from,
    load_values,
    only_number,
    prefetch_values,
    put_values,
    read_first_edits,
    value_places,
)
from ssminterp_kernels.selective_scan.triton_layouts import (
    channel_numbers,
    full_tile,
    held_blocks,
    jit,
    position_numbers,
    put,
    row_state_numbers,
    shared_parts,
    shared_rows,
    state_numbers,
)
from ssminterp_kernels.selective_scan.triton_loads import load_row, load_tile
from ssminterp_kernels.selective_scan.triton_math import LOG2E
from ssminterp_kernels.selective_scan.triton_rows import (
    events_before,
    load_per_channel,
    load_weights,
    position,
    position_at,
    prefetch_rows,
    read_position,
    rows_ahead,
    store_spread,
)
from ssminterp_kernels.selective_scan.triton_tiles import scan_tile, terms_of


@jit(
    do_not_specialize=["batches", "elements", "length", "chunk_length", "n_chunks", "n_blocks", "group_size"],
)
@no_type_check
def scan_forward_kernel(
    x,
    delta,
    z,
    A,
    B,
    C,
    D,
    bias,
    start,
    edits,
    keep,
    add,
    recorded,
    y,
    states,
    boundaries,
    final_state,
    decays,
    locals_,
    ends,
    flags,
    segments_chunk,
    batches,
    elements,
    length,
    chunk_length,
    n_chunks,
    n_blocks,
    group_size,
    d_state,
    POS: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    RECORD_ALL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTIAL: tl.constexpr,
    SEVERAL: tl.constexpr,
    MASK_D: tl.constexpr,
    MASK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    BEYOND: tl.constexpr,
    INSIDE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    TOGETHER: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One program: BLOCK_D channels of one group, one chunk, `elements` batch elements one after the other.

    start: the initial state [batch, 1, d_inner, d_state], or None for zeros. edits: (positions,
    stride of batch, n_edits); keep, add: [batch, n_edits, d_inner, d_state]. recorded: (positions, n_recorded).
    states: where recorded states go; boundaries: [batch, n_boundaries, d_inner, d_state], where the states before
    the segments of the backward pass go: of every `segments_chunk` positions SEGMENTS (head, segment), see
    `BackwardPlan`; final_state: [batch, 1, d_inner, d_state]. POS: the strides of the position axes of x, delta, z, B,
    C, y and states, as constants so that neighbouring positions cost no address arithmetic. NUMBERS: of keep and add,
    see `numbers_of`; CHANNELS: their strides of the channels, if AHEAD, that is if the values of an edit are loaded a
    tile before it; BEYOND: if the tile after that, and its edit, are brought to the L2 cache meanwhile; EARLY: if what
    the rows come to is worked out before the next tile's are loaded. PARTIAL: some tile may hold less than UNROLL
    positions. SEVERAL: elements may be more than one. TILE and what follows: see `ForwardLayouts`; STATES: how many of
    a channel's in a row a thread has; LANES: how many lanes have parts of a sum over d_state; TOGETHER: how many such
    sums are put into shared memory at once; HELD: how many tiles' x and delta stay there from a chunk's first reading
    to its second.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    per_chunk = n_blocks * ((batches + elements - 1) // elements)
    chunk = pid // per_chunk
    batch = ((pid % per_chunk) // n_blocks * elements).to(tl.int64)
    last_batch = tl.minimum(batch + elements, batches) - 1
    blocks_per_group = (group_size + BLOCK_D - 1) // BLOCK_D
    group = block // blocks_per_group
    lane = channel_numbers(BLOCK_D, TILE)
    d0 = (group * group_size + (block % blocks_per_group) * BLOCK_D).to(tl.int64)
    d_end = (group + 1) * group_size
    d = d0 + lane
    there = d < d_end
    n = state_numbers(BLOCK_N, TILE)
    n_there = n < d_state
    tile_there = there[:, None] & n_there[None, :]
    A2 = tl.load(A[0] + (d[:, None] * A[1] + n[None, :] * A[2]), mask=tile_there, other=0.0).to(tl.float32) * LOG2E
    bias_row = load_row(bias, d, there, BLOCK_D, TILE)
    D_row = load_row(D, d, there, BLOCK_D, TILE)
    row_u = position_numbers(UNROLL, ROWS)
    row_n = row_state_numbers(BLOCK_N, ROWS)
    row_there = (row_n < d_state)[None, :] & (row_u >= 0)[:, None]
    B_shared = shared_rows(UNROLL, BLOCK_N, PLAIN)
    C_shared = shared_rows(UNROLL, BLOCK_N, PLAIN)
    across = (lane, lane, there)
    bias_across = bias_row
    D_across = D_row
    shared = (B_shared, C_shared)
    if RECORD_ALL:
        lane_across = row_state_numbers(BLOCK_D, BLOCK)
        u_across = position_numbers(UNROLL, BLOCK)
        there_across = d0 + lane_across < d_end
        across = (u_across, lane_across, there_across[None, :] & (u_across >= 0)[:, None])
        bias_across = load_per_channel(bias, d0 + lane_across, there_across)
        D_across = load_per_channel(D, d0 + lane_across, there_across)
        shared = (
            shared_rows(UNROLL, BLOCK_D, PLAIN),
            shared_rows(UNROLL, BLOCK_D, PLAIN),
            shared_parts(UNROLL, BLOCK_D, LANES),
        )
    held = ()
    if HELD > 0:
        held = (
            held_blocks(HELD, UNROLL, BLOCK_D, x[0].dtype.element_ty),
            held_blocks(HELD, UNROLL, BLOCK_D, delta[0].dtype.element_ty),
        )
    if start is None:
        state = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
    else:
        state = load_tile(start, batch, 0, d, n, tile_there)

    first = chunk * chunk_length
    stop = tl.minimum(first + chunk_length, length)
    place = (batch, d0, d_end, lane, there, group, n, n_there)
    if flags is not None:
        if chunk > 0:
            numbers = (place, across, (row_u, row_n, row_there), d)
            state = state_before_chunk(
                *(x, delta, B, edits, keep, add, A2, (bias_row, bias_across), B_shared, shared, held, numbers),
                *(chunk, first, stop, n_chunks, (decays, locals_, ends), flags, per_chunk),
                *(POS, NUMBERS, SOFTPLUS, RECORD_ALL, MASK_D, MASK_N, BLOCK_N, BLOCK_D, UNROLL, TILE),
            )
    if recorded is not None:
        first_record = events_before(recorded[0], recorded[1], first)
        first_recorded = position_at(recorded, first_record)
        first_following = read_position(recorded[0], first_record + 1, recorded[1])
        record, next_record, read_following = first_record, first_recorded, first_following

    t = first
    window = tl.minimum(t, stop - UNROLL)  # rows are loaded from here on: near the end, rows that nobody uses
    are_held = (chunk > 0) & (chunk < n_chunks - 1)
    ahead = rows_ahead(
        x, delta, z, batch, place, across, window, POS, RECORD_ALL, MASK_D, UNROLL, held, are_held, 0, BLOCK
    )
    B_next = load_weights(B, batch, group, window, row_u, row_n, row_there, POS[3], MASK_N)
    C_next = load_weights(C, batch, group, window, row_u, row_n, row_there, POS[4], MASK_N)
    upcoming = ()
    firsts = ()
    places = ()
    values = ()
    CUT: tl.constexpr = edits is not None and not INSIDE  # tiles begin at edits
    # Lanes that lie side by side along d_state read whole lines and need not hand on what they read.
    LOADED: tl.constexpr = TILE if RECORD_ALL else SPREAD
    if INSIDE:
        places = value_places(NUMBERS, False, BLOCK_D, BLOCK_N, VALUES)
        source = (edits, keep, add, only_number(keep, NUMBERS[0]), places, d_state)
        queue = queue_from(source, place, first, NUMBERS, CHANNELS, MASK_D or MASK_N, BLOCK_D, BLOCK_N, LOADED)
    if CUT:
        upcoming = edits_from(edits, batch, first)
        if SEVERAL:
            firsts = read_first_edits(edits, tl.minimum(batch + 1, last_batch))
        if AHEAD:
            places = value_places(NUMBERS, RECORD_ALL, BLOCK_D, BLOCK_N, VALUES)
            only_kept = only_number(keep, NUMBERS[0])
            # Loaded before it is known whether they are wanted, which is waited for.
            kept, added = load_values(
                *(keep, add, (batch, upcoming[0], edits[2], d0, d_end, d_state), True, only_kept, NUMBERS, CHANNELS),
                *(MASK_D or MASK_N, BLOCK_D, BLOCK_N, LOADED),
            )
            values = (tl.where(upcoming[1], kept, 1.0), tl.where(upcoming[1], added, 0.0))
    element = batch
    while element <= last_batch:
        if SEVERAL:
            batch = element
        # A tile of UNROLL positions from t on, or the fewer that are left before the next edit or the end.
        end = tl.minimum(t + UNROLL, stop)
        if SEGMENTS is not None:
            lead: tl.constexpr = SEGMENTS[1] - SEGMENTS[0]
            t_led = t % segments_chunk + lead
            if (t_led % SEGMENTS[1] == 0) | (t_led == lead):
                boundary = t // segments_chunk * ((segments_chunk + lead + SEGMENTS[1] - 1) // SEGMENTS[1])
                boundary += t_led // SEGMENTS[1]
                store_spread(boundaries, batch, boundary, d0, d_end, d_state, state, SPREAD)
            if CUT:
                end = tl.minimum(end, t + SEGMENTS[1] - t_led % SEGMENTS[1])
                end = tl.minimum(end, t + segments_chunk + lead - t_led)
        if CUT:
            end = tl.minimum(end, upcoming[2])
        ends_element = end == stop
        rows = ahead
        if EARLY:
            rows = terms_of(ahead, bias_row, D_row, z, SOFTPLUS, UNROLL)
        put(B_shared, B_next.to(tl.float32))
        put(C_shared, C_next.to(tl.float32))
        if AHEAD:
            put_values(places, values)
        # The next tile's rows are under way while this one is computed, also across batch elements. So is all else that
        # is loaded here: loads elsewhere would be waited for before the next tile's begin.
        t_next = tl.where(ends_element, first, end)
        batch_next = batch
        if SEVERAL:
            batch_next = tl.minimum(batch + ends_element.to(tl.int64), last_batch)
        window_next = tl.minimum(t_next, stop - UNROLL)
        place = (batch, d0, d_end, lane, there, group, n, n_there)
        edit_here = (edits, keep, add)
        if INSIDE:
            batch_after = tl.minimum(batch + 1, last_batch)
            firsts_after = read_first_edits(edits, batch_after)
        if CUT:
            edit_here = (edits, keep, add, upcoming[1], upcoming[0], places, values)
            upcoming = edits_after(upcoming, edits, batch_next, t_next, ends_element, firsts, SEVERAL)
            if SEVERAL:
                firsts = read_first_edits(edits, tl.minimum(batch_next + 1, last_batch))
            if AHEAD:
                at = (batch_next, upcoming[0], edits[2], d0, d_end, d_state)
                values = load_values(
                    *(keep, add, at, upcoming[1], only_kept, NUMBERS, CHANNELS),
                    *(MASK_D or MASK_N, BLOCK_D, BLOCK_N, LOADED),
                )
        ahead = rows_ahead(
            *(x, delta, z, batch_next, place, across, window_next, POS, RECORD_ALL, MASK_D, UNROLL),
            *(held, are_held, (t_next - first) // UNROLL, BLOCK),
        )
        B_next = load_weights(B, batch_next, group, window_next, row_u, row_n, row_there, POS[3], MASK_N)
        C_next = load_weights(C, batch_next, group, window_next, row_u, row_n, row_there, POS[4], MASK_N)
        if BEYOND:
            window_beyond = tl.minimum(t_next + UNROLL, stop - UNROLL)
            prefetch_rows(x, delta, z, batch_next, place, window_beyond, POS, UNROLL, BLOCK_D, TILE)
            if AHEAD:
                at = (batch_next, upcoming[0] + 1, edits[2], d0, d_end, d_state)
                prefetch_values(keep, add, at, upcoming[1], NUMBERS, CHANNELS, BLOCK_D, BLOCK_N, TILE)
        records = ()
        if recorded is not None:
            records = (record, next_record, position(read_following, record + 1, recorded[1]), recorded)
        if INSIDE:
            state, queue = scan_edited_tile(
                *(state, queue, A2, bias_row, D_row, rows, (B_shared, C_shared), z, y, source, place),
                *(batch_after, (window, t, end), ends_element, firsts_after, POS, NUMBERS, CHANNELS, SOFTPLUS, BEYOND),
                *(PARTIAL, SEVERAL, MASK_D, MASK_N, BLOCK_D, BLOCK_N, UNROLL, TILE, LOADED),
            )
        else:
            state = scan_tile(
                *(state, A2, (bias_row, bias_across), (D_row, D_across), rows, (B_shared, C_shared), shared, z),
                *((y, states), place, across, edit_here, (window, t, end), records, POS, NUMBERS, AHEAD, SOFTPLUS),
                *(EARLY, RECORD_ALL, PARTIAL, MASK_D, MASK_N, UNROLL, TILE, BLOCK, STATES, LANES, TOGETHER),
            )
        if recorded is not None:
            while next_record < end:
                record += 1
                next_record = position(read_following, record, recorded[1])
                read_following = read_position(recorded[0], record + 1, recorded[1])
        t = t_next
        window = window_next
        if ends_element:
            if chunk == n_chunks - 1:
                store_spread(final_state, batch, 0, d0, d_end, d_state, state, SPREAD)
            if flags is not None:
                if chunk == 0:
                    store_spread(ends, batch, 0, d0, d_end, d_state, state, SPREAD)
                    announce(flags + tl.num_programs(0) + pid)
            element += 1
            if SEVERAL:
                if recorded is not None:
                    record, next_record, read_following = first_record, first_recorded, first_following
                if element <= last_batch:
                    if start is None:
                        state = full_tile(0.0, BLOCK_D, BLOCK_N, TILE)
                    else:
                        state = load_tile(start, element, 0, d, n, tile_there)
