"""The compiled loops of `rows`, over vectors of channels; what they are given and give back is told there.

Threads take tasks from a shared counter. State-like arrays lie as [.., blocks, d_state, LANES], blocks of channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import no_type_check

import numpy as np
from numba import boolean, float32, int32, int64, njit, types

from ssminterp_kernels.rows.layout import GROUP, LANES
from ssminterp_kernels.rows.vectors import exp2, lane_sum, load, maximum, splat, store
from ssminterp_kernels.selective_scan.numba_kernels import next_task

SPAN = 16
"""Positions whose Δ is computed before they are scanned, and whose output is gated after: none waits for the other."""

_ZERO, _ONE, _LOG2_E = np.float32(0), np.float32(1), np.float32(1.4426950408889634)
# log(1 + e) / e on [0, 1] to 5e-9, as in `selective_scan.numba_kernels`
_L1, _L2, _L3 = np.float32(-0.49999905), np.float32(0.33330005), np.float32(-0.24954559)
_L4, _L5, _L6 = np.float32(0.19678117), np.float32(-0.15311863), np.float32(0.10614265)
_L7, _L8, _L9 = np.float32(-0.0570642), np.float32(0.01990716), np.float32(-0.0032563785)

# Calls with arrays as arguments cost more than most of these bodies.
_compiled = functools.partial(njit, error_model="numpy", forceinline=True)


@_compiled
@no_type_check
def _scratch(n):
    """[n, LANES], each line of it in one line of the cache."""
    held = np.zeros((n + 1) * LANES, np.float32)
    first = (-(held.ctypes.data // 4)) % LANES
    return held[first : first + n * LANES].reshape(n, LANES)


@_compiled
@no_type_check
def _states(n_blocks, d_state):
    return _scratch(n_blocks * d_state).reshape(n_blocks, d_state, LANES)


@_compiled
@no_type_check
def _silu(v):
    return v / (splat(_ONE) + exp2(v * splat(-_LOG2_E)))


@_compiled
@no_type_check
def _softplus(v):
    zero = splat(_ZERO)
    e = exp2(maximum(v, zero - v) * splat(-_LOG2_E))
    high = splat(_L5) + e * (splat(_L6) + e * (splat(_L7) + e * (splat(_L8) + e * splat(_L9))))
    low = splat(_L1) + e * (splat(_L2) + e * (splat(_L3) + e * (splat(_L4) + e * high)))
    return maximum(v, zero) + e * (splat(_ONE) + e * low)


@_compiled
@no_type_check
def _step(delta, row, t, c, raw, weight, bias):
    """Δ of one block: as it is given, or from its low rank."""
    if not raw:
        return load(delta, (row, t, c))
    v = load(bias, (c,))
    for r in range(weight.shape[0]):
        v = v + load(weight, (r, c)) * splat(delta[row, t, r])
    return _softplus(v)


@_compiled
@no_type_check
def _put_step(steps, inflows, place, step, x, row, t, c):
    store(steps, (place, 0), step)
    store(inflows, (place, 0), step * load(x, (row, t, c)))


@_compiled
@no_type_check
def _steps(steps, inflows, place, first, width, x, delta, raw, weight, bias, row, t):
    """Δ and Δ x of some blocks, from a place on, before any is used: none waits for the other."""
    whole = width - width % 4 if raw else 0
    for i in range(0, whole, 4):  # one reading of the low rank for four
        c_1 = (first + i) * LANES
        c_2, c_3, c_4 = c_1 + LANES, c_1 + 2 * LANES, c_1 + 3 * LANES
        v_1, v_2, v_3, v_4 = load(bias, (c_1,)), load(bias, (c_2,)), load(bias, (c_3,)), load(bias, (c_4,))
        for r in range(weight.shape[0]):
            low = splat(delta[row, t, r])
            v_1 = v_1 + load(weight, (r, c_1)) * low
            v_2 = v_2 + load(weight, (r, c_2)) * low
            v_3 = v_3 + load(weight, (r, c_3)) * low
            v_4 = v_4 + load(weight, (r, c_4)) * low
        _put_step(steps, inflows, place + i, _softplus(v_1), x, row, t, c_1)
        _put_step(steps, inflows, place + i + 1, _softplus(v_2), x, row, t, c_2)
        _put_step(steps, inflows, place + i + 2, _softplus(v_3), x, row, t, c_3)
        _put_step(steps, inflows, place + i + 3, _softplus(v_4), x, row, t, c_4)
    for i in range(whole, width):
        c = (first + i) * LANES
        _put_step(steps, inflows, place + i, _step(delta, row, t, c, raw, weight, bias), x, row, t, c)


@_compiled
@no_type_check
def _advance(h, rate, q, step, inflow, B, row, t):
    """One update of the states of block q, in place; h: d_state, LANES."""
    for n in range(h.shape[0]):
        at = (n, 0)
        store(h, at, exp2(step * load(rate, (q, n, 0))) * load(h, at) + inflow * splat(B[row, t, n]))


@_compiled
@no_type_check
def _read(h, C, row, t):
    """Σ over d_state of C · h."""
    y = splat(_ZERO)
    for n in range(h.shape[0]):
        y = y + load(h, (n, 0)) * splat(C[row, t, n])
    return y


@_compiled
@no_type_check
def _advance_and_read(h, rate, q, step, inflow, B, C, row, t):
    """Both in one."""
    y = splat(_ZERO)
    for n in range(h.shape[0]):
        at = (n, 0)
        now = exp2(step * load(rate, (q, n, 0))) * load(h, at) + inflow * splat(B[row, t, n])
        store(h, at, now)
        y = y + now * splat(C[row, t, n])
    return y


@_compiled
@no_type_check
def _copy_block(source, i, q, h):
    for n in range(h.shape[0]):
        store(h, (n, 0), load(source, (i, q, n, 0)))


@no_type_check
def _conv_silu(counter, n_tasks, starts, lengths, in_x, window, taps, bias, x):
    d_inner = in_x.shape[2]
    n, last = window.shape[0], taps.shape[0] - 1
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        tile, site = divmod(task, n)
        for t in range(lengths[site]):
            here = starts[t] + site
            if here >= in_x.shape[1]:
                break
            if t >= last == 3:  # nearly every conv has four taps
                first, second, third = starts[t - 3] + site, starts[t - 2] + site, starts[t - 1] + site
                for c in range(0, d_inner, LANES):
                    early = load(in_x, (tile, first, c)) * load(taps, (0, c)) + load(bias, (c,))
                    late = load(in_x, (tile, third, c)) * load(taps, (2, c))
                    early = early + load(in_x, (tile, second, c)) * load(taps, (1, c))
                    late = late + load(in_x, (tile, here, c)) * load(taps, (3, c))
                    store(x, (tile, here, c), _silu(early + late))
            else:
                for c in range(0, d_inner, LANES):
                    conv = load(bias, (c,))
                    for tap in range(last + 1):
                        at = t - last + tap
                        if at >= 0:
                            before = load(in_x, (tile, starts[at] + site, c))
                        else:
                            before = load(window, (site, last + at, c))
                        conv = conv + before * load(taps, (tap, c))
                    store(x, (tile, here, c), _silu(conv))


@no_type_check
def _scanned_rows(
    counter, n_tasks, starts, lengths, x, delta, raw, dt_weight, bias, B, C, rate, D, gate, past, kept, slots, recorded,
    gated,
):  # fmt: skip
    n, n_blocks, d_state = past.shape[:3]
    states = _states(n_blocks, d_state)
    steps, inflows, outs = _scratch(SPAN * n_blocks), _scratch(SPAN * n_blocks), _scratch(SPAN * n_blocks)
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        tile, site = divmod(task, n)
        length = lengths[site]
        for q in range(n_blocks):
            _copy_block(past, site, q, states[q])
        for start in range(0, length, SPAN):
            stop = min(start + SPAN, length)
            for t in range(start, stop):
                first = (t - start) * n_blocks
                _steps(steps, inflows, first, 0, n_blocks, x, delta, raw, dt_weight, bias, tile, starts[t] + site)
            for q in range(n_blocks):
                h = states[q]
                for t in range(start, stop):
                    at = ((t - start) * n_blocks + q, 0)
                    step, inflow, token = load(steps, at), load(inflows, at), starts[t] + site
                    if kept[token] < 0:
                        _advance(h, rate, q, step, inflow, B, tile, token)
                    else:
                        store(outs, at, _advance_and_read(h, rate, q, step, inflow, B, C, tile, token))
                    if token < slots.shape[0] and slots[token] >= 0:
                        for lane in range(LANES):
                            for m in range(d_state):
                                recorded[slots[token], q * LANES + lane, m] = h[m, lane]
            for t in range(start, stop):
                token = starts[t] + site
                k = kept[token]
                if k >= 0:
                    for q in range(n_blocks):
                        at, c = ((t - start) * n_blocks + q, 0), q * LANES
                        ssm_out = load(outs, at) + load(x, (tile, token, c)) * load(D, (c,))
                        store(gated, (tile, k, c), ssm_out * _silu(load(gate, (tile, k, c))))


@no_type_check
def _forked_rows(
    counter, n_tasks, starts, lengths, early_x, early_delta, early_raw, early_B, early_C, states,
    x, delta, dt_weight, bias, B, C, rate, D, gate, first_gate, past, kept, gated,
):  # fmt: skip
    n, d_inner = past.shape[0], x.shape[2]
    d_state, tiles = past.shape[2], gated.shape[0]
    early_tokens = max(early_x.shape[1], n)  # what starts from a state takes in nothing at position 0
    n_groups, n_blocks = n_tasks // n, d_inner // LANES
    h, base = _states(GROUP, d_state), _states(GROUP, d_state)
    decay, weight = _states(GROUP, d_state), _states(GROUP, d_state)
    differs = _states(tiles * GROUP, d_state)
    steps, inflows, outs, open_gate = _scratch(GROUP), _scratch(GROUP), _scratch(GROUP), _scratch(GROUP)
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        site, group = divmod(task, n_groups)
        length, reach = lengths[site], 0
        while reach < length and starts[reach] < early_tokens:
            reach += 1
        first, width = group * GROUP, min(GROUP, n_blocks - group * GROUP)
        for i in range(width):
            _copy_block(past, site, first + i, base[i])
        for t in range(reach):
            token = starts[t] + site
            _steps(steps, inflows, 0, first, width, x, delta, True, dt_weight, bias, 0, token)
            for i in range(width):
                _advance(base[i], rate, first + i, load(steps, (i, 0)), load(inflows, (i, 0)), B, 0, token)
        for tile in range(tiles):
            given = tile - early_x.shape[0]  # those with states come last
            for i in range(width):
                if given >= 0:
                    for m in range(d_state):
                        for lane in range(LANES):
                            h[i, m, lane] = states[given, site, (first + i) * LANES + lane, m]
                else:
                    _copy_block(past, site, first + i, h[i])
            for t in range(reach):
                token = starts[t] + site
                k = kept[token]
                if given >= 0:
                    for i in range(width):
                        here = load(x, (0, token, (first + i) * LANES))
                        store(outs, (i, 0), _read(h[i], C, 0, token) + here * load(D, ((first + i) * LANES,)))
                else:
                    _steps(
                        steps, inflows, 0, first, width, early_x, early_delta, early_raw, dt_weight, bias, tile, token
                    )
                    for i in range(width):
                        step, inflow = load(steps, (i, 0)), load(inflows, (i, 0))
                        y = _advance_and_read(h[i], rate, first + i, step, inflow, early_B, early_C, tile, token)
                        here = load(early_x, (tile, token, (first + i) * LANES))
                        store(outs, (i, 0), y + here * load(D, ((first + i) * LANES,)))
                if k >= 0:
                    for i in range(width):
                        c = (first + i) * LANES
                        own = t == 0 and tile < first_gate.shape[0]
                        z = load(first_gate, (tile, site, c)) if own else load(gate, (0, k, c))
                        store(gated, (tile, k, c), load(outs, (i, 0)) * _silu(z))
            for i in range(width):
                for m in range(d_state):
                    store(differs, (tile * GROUP + i, m, 0), load(h, (i, m, 0)) - load(base, (i, m, 0)))
        for i in range(width):
            for m in range(d_state):
                store(decay, (i, m, 0), splat(_ONE))
        for t in range(reach, length):
            token = starts[t] + site
            k = kept[token]
            _steps(steps, inflows, 0, first, width, x, delta, True, dt_weight, bias, 0, token)
            for i in range(width):
                c = (first + i) * LANES
                step, inflow, y = load(steps, (i, 0)), load(inflows, (i, 0)), load(x, (0, token, c)) * load(D, (c,))
                for m in range(d_state):
                    at = (i, m, 0)
                    a, read = exp2(step * load(rate, (first + i, m, 0))), splat(C[0, token, m])
                    now, total = a * load(base, at) + inflow * splat(B[0, token, m]), a * load(decay, at)
                    store(base, at, now)
                    store(decay, at, total)
                    store(weight, at, total * read)
                    y = y + now * read
                store(outs, (i, 0), y)
            if k >= 0:
                for i in range(width):
                    store(open_gate, (i, 0), _silu(load(gate, (0, k, (first + i) * LANES))))
            if k < 0:
                continue
            for tile in range(0, tiles - 3, 4):  # four sums at once: none waits for the other
                for i in range(width):
                    c, at, z = (first + i) * LANES, tile * GROUP + i, load(open_gate, (i, 0))
                    y_1 = y_2 = y_3 = y_4 = load(outs, (i, 0))
                    for m in range(d_state):
                        w = load(weight, (i, m, 0))
                        y_1 = y_1 + load(differs, (at, m, 0)) * w
                        y_2 = y_2 + load(differs, (at + GROUP, m, 0)) * w
                        y_3 = y_3 + load(differs, (at + 2 * GROUP, m, 0)) * w
                        y_4 = y_4 + load(differs, (at + 3 * GROUP, m, 0)) * w
                    store(gated, (tile, k, c), y_1 * z)
                    store(gated, (tile + 1, k, c), y_2 * z)
                    store(gated, (tile + 2, k, c), y_3 * z)
                    store(gated, (tile + 3, k, c), y_4 * z)
            for tile in range(tiles - tiles % 4, tiles):
                for i in range(width):
                    moved = load(outs, (i, 0))
                    for m in range(d_state):
                        moved = moved + load(differs, (tile * GROUP + i, m, 0)) * load(weight, (i, m, 0))
                    store(gated, (tile, k, (first + i) * LANES), moved * load(open_gate, (i, 0)))


@no_type_check
def _normed(counter, n_tasks, rows_per_task, resid, weight, epsilon, normed):
    rows, width = resid.shape
    whole = width - width % LANES
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        for row in range(task * rows_per_task, min((task + 1) * rows_per_task, rows)):
            squares = splat(_ZERO)
            for c in range(0, whole, LANES):
                v = load(resid, (row, c))
                squares = squares + v * v
            total = lane_sum(squares)
            for c in range(whole, width):
                total += resid[row, c] * resid[row, c]
            scale = _ONE / np.sqrt(total / np.float32(width) + epsilon)
            for c in range(0, whole, LANES):
                store(normed, (row, c), load(resid, (row, c)) * splat(scale) * load(weight, (c,)))
            for c in range(whole, width):
                normed[row, c] = resid[row, c] * scale * weight[c]


_TASKS = (int64[::1], int64)
_1D, _2D, _3D, _4D = float32[::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, :, ::1]
_VIEW_3D = float32[:, :, :]
_TABLE = int32[::1]


_PACKING = (_TABLE, _TABLE)
_INPUTS = (_VIEW_3D, _VIEW_3D, boolean, _2D, _1D, _VIEW_3D, _VIEW_3D)
_EARLY = (_VIEW_3D, _VIEW_3D, boolean, _VIEW_3D, _VIEW_3D, float32[:, :, :, :])
_BASE = (_VIEW_3D, _VIEW_3D, _2D, _1D, _VIEW_3D, _VIEW_3D, _3D, _1D, _VIEW_3D)
_KERNELS = {
    "conv_silu": (_conv_silu, (*_PACKING, _VIEW_3D, _VIEW_3D, _2D, _1D, _3D)),
    "scanned_rows": (_scanned_rows, (*_PACKING, *_INPUTS, _3D, _1D, _VIEW_3D, _4D, _TABLE, _TABLE, _3D, _3D)),
    "forked_rows": (_forked_rows, (*_PACKING, *_EARLY, *_BASE, _VIEW_3D, _4D, _TABLE, _3D)),
    "normed": (_normed, (int64, _2D, _1D, float32, _2D)),
}


@functools.cache
def compiled(name: str) -> Callable[..., None]:
    """The loop behind a public function. Explicit signatures: one compilation each, whatever the strides."""
    function, arguments = _KERNELS[name]
    return njit(types.void(*_TASKS, *arguments), nogil=True, cache=True, error_model="numpy")(function)
