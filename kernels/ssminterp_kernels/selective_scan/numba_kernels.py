"""The loops of the CPU scan, compiled by numba on first use and cached on disk.

A task is one batch element and one block of up to `BLOCK` channels. Its state lives in the first-level cache as
[d_state, BLOCK], so that the inner loop runs over channels and needs no sums across vector lanes. Threads take tasks
from a shared counter: one that the system does not schedule in time leaves its share to the others.

Everything compiled is in this one file because numba's cache only notices changes of a function's own file, and is
marked `no_type_check` because checkers of annotations wrap functions in ways that numba cannot compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import boolean, float32, int32, int64, njit, types
from numba.extending import intrinsic

BLOCK = 128
"""Channels per task."""

TILE = 4
"""Positions that the forward pass takes at once, so that the state is read and written once for all of them."""

REPLAY = 32
"""Positions between the states that a forward pass with a graph saves; a multiple of `TILE`."""

Array = np.ndarray[Any, np.dtype[Any]]

# 2^f on [-1/2, 1/2] to 2e-9: least squares at Chebyshev nodes. The constant term is exactly 1, so that decays near 1,
# which are multiplied thousands of times, stay accurate.
_P1, _P2, _P3 = np.float32(0.693147206), np.float32(0.240226485), np.float32(0.0555032904)
_P4, _P5, _P6 = np.float32(0.00961837325), np.float32(0.00133998483), np.float32(0.000153707048)
_ZERO, _ONE, _LOG2_E = np.float32(0), np.float32(1), np.float32(1.4426950408889634)
_ROUND = np.float32(12582912.0)  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_TO_EXPONENT = np.int32(127 - 0x4B400000)  # from the bits of (integer + _ROUND) to a biased exponent
_MANTISSA = np.int32(23)
_LOWEST, _HIGHEST = np.float32(-126), np.float32(128)
# log(1 + e) / e on [0, 1] to 5e-9, by interpolation at Chebyshev nodes
_L1, _L2, _L3 = np.float32(-0.49999905), np.float32(0.33330005), np.float32(-0.24954559)
_L4, _L5, _L6 = np.float32(0.19678117), np.float32(-0.15311863), np.float32(0.10614265)
_L7, _L8, _L9 = np.float32(-0.0570642), np.float32(0.01990716), np.float32(-0.0032563785)


# "contract" allows fused multiply-adds; reassociation would undo the rounding trick.
@njit(fastmath={"contract"}, error_model="numpy")
@no_type_check
def exp2(u: float) -> float:
    """2^u to 1e-7 relative, by Cephes' range reduction without branches.

    0 instead of what would be subnormal, infinity above 2^127.5, and NaN stays NaN.
    """
    bounded = _HIGHEST if u > _HIGHEST else u
    shifted = bounded + _ROUND
    f = bounded - (shifted - _ROUND)
    p = _ONE + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * _P6)))))
    power = np.int32((np.float32(shifted).view(np.int32) + _TO_EXPONENT) << _MANTISSA).view(np.float32)
    return _ZERO if u < _LOWEST else p * power


@njit(fastmath={"contract"}, error_model="numpy")
@no_type_check
def softplus(v: float) -> float:
    """log(1 + exp(v)) to 3e-7 relative, without branches; NaN stays NaN."""
    e = exp2(-np.abs(v) * _LOG2_E)
    high = _L5 + e * (_L6 + e * (_L7 + e * (_L8 + e * _L9)))
    log1p = e * (_ONE + e * (_L1 + e * (_L2 + e * (_L3 + e * (_L4 + e * high)))))
    return (v if v > _ZERO else _ZERO) + log1p


@intrinsic
@no_type_check
def next_task(typing_context: Any, counter: Any) -> Any:
    """counter[0]++, atomically; returns the value before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), emit


@njit
@no_type_check
def _block_of(task: int, d_inner: int, n_groups: int) -> tuple[int, int, int, int, int]:
    """Batch element, group, block, first channel and number of channels of a task; no block straddles groups."""
    in_group = d_inner // n_groups
    blocks_in_group = (in_group + BLOCK - 1) // BLOCK
    element, block = divmod(task, blocks_in_group * n_groups)
    group, place = divmod(block, blocks_in_group)
    return element, group, block, group * in_group + place * BLOCK, min(BLOCK, in_group - place * BLOCK)


def n_blocks(d_inner: int, n_groups: int) -> int:
    """Blocks of channels per batch element."""
    return n_groups * -(-(d_inner // n_groups) // BLOCK)


@njit(fastmath={"contract"}, error_model="numpy")
@no_type_check
def _advance_tile(state: Array, exponent: Array, step: Array, inflow: Array, out: Array, B: Array, C: Array) -> None:
    """`TILE` positions without edits or records; B and C: pos, d_state; step, inflow, out: pos, channels."""
    step_0, step_1, step_2, step_3 = step[0], step[1], step[2], step[3]
    inflow_0, inflow_1, inflow_2, inflow_3 = inflow[0], inflow[1], inflow[2], inflow[3]
    out_0, out_1, out_2, out_3 = out[0], out[1], out[2], out[3]
    for n in range(state.shape[0]):
        state_n, exponent_n = state[n], exponent[n]
        B_0, B_1, B_2, B_3 = B[0, n], B[1, n], B[2, n], B[3, n]
        C_0, C_1, C_2, C_3 = C[0, n], C[1, n], C[2, n], C[3, n]
        # A constant trip count, past the block's width if need be: LLVM makes whole vectors of it.
        for c in range(BLOCK):
            rate, h = exponent_n[c], state_n[c]
            h = exp2(step_0[c] * rate) * h + inflow_0[c] * B_0
            out_0[c] += h * C_0
            h = exp2(step_1[c] * rate) * h + inflow_1[c] * B_1
            out_1[c] += h * C_1
            h = exp2(step_2[c] * rate) * h + inflow_2[c] * B_2
            out_2[c] += h * C_2
            h = exp2(step_3[c] * rate) * h + inflow_3[c] * B_3
            out_3[c] += h * C_3
            state_n[c] = h


@njit(fastmath={"contract"}, error_model="numpy")
@no_type_check
def _advance(
    state: Array,  # d_state BLOCK
    exponent: Array,  # d_state BLOCK
    step: Array,  # BLOCK, as are inflow and out
    inflow: Array,
    out: Array,
    B: Array,  # d_state
    C: Array,  # d_state
    edited: bool,
    keep: Array,  # channels d_state, read if edited
    add: Array,
) -> None:
    """One position."""
    for n in range(state.shape[0]):
        B_n, C_n, state_n, exponent_n = B[n], C[n], state[n], exponent[n]
        for c in range(BLOCK):
            state_n[c] = exp2(step[c] * exponent_n[c]) * state_n[c] + inflow[c] * B_n
        if edited:
            for c in range(keep.shape[0]):
                state_n[c] = keep[c, n] * state_n[c] + add[c, n]
        for c in range(BLOCK):
            out[c] += state_n[c] * C_n


@no_type_check
def _forward(
    counter: Array,
    n_tasks: int,
    x: Array,  # batch pos d_inner
    delta: Array,  # batch pos d_inner
    A: Array,  # d_inner d_state
    B: Array,  # batch pos n_groups d_state
    C: Array,  # batch pos n_groups d_state
    delta_bias: Array,  # d_inner
    through_softplus: bool,
    D: Array,  # d_inner
    z: Array,  # batch pos d_inner, read if gated
    gated: bool,
    initial_state: Array,  # batch d_inner d_state
    edit_at: Array,  # batch pos: the index of the edit there, or -1
    keep: Array,  # batch n_edits d_inner d_state
    add: Array,  # batch n_edits d_inner d_state
    record_at: Array,  # pos: the place among the recorded states, or -1
    y: Array,  # batch pos d_inner
    recorded: Array,  # batch n_positions d_state d_inner
    final_state: Array,  # batch d_inner d_state
    boundaries: Array,  # n_chunks batch d_state d_inner, written unless empty
) -> None:
    _, length, d_inner = x.shape
    d_state, n_groups = A.shape[1], B.shape[2]
    save = boundaries.shape[0] > 0
    state, exponent = np.zeros((d_state, BLOCK), np.float32), np.zeros((d_state, BLOCK), np.float32)
    step, inflow = np.zeros((TILE, BLOCK), np.float32), np.zeros((TILE, BLOCK), np.float32)
    out = np.zeros((TILE, BLOCK), np.float32)
    # x and z, whose strides the compiler does not know, are copied before any arithmetic, which it then vectorises.
    row = np.zeros(BLOCK, np.float32)
    loaded = -1
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        # Blocks outermost: a thread that goes on to another element mostly keeps the exponents that it has.
        block, b = divmod(task, x.shape[0])
        _, group, _, first, width = _block_of(block, d_inner, n_groups)
        last = first + width
        if block != loaded:
            step[:], inflow[:], out[:], state[:], exponent[:] = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
            for n in range(d_state):
                for c in range(width):
                    exponent[n, c] = A[first + c, n] * _LOG2_E
            loaded = block
        for n in range(d_state):
            state_n, initial_n = state[n], initial_state[b, first:last, n]
            for c in range(width):
                state_n[c] = initial_n[c]
        skip, bias = D[first:last], delta_bias[first:last]
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            if save and start % REPLAY == 0:
                for n in range(d_state):
                    for c in range(width):
                        boundaries[start // REPLAY, b, n, first + c] = state[n, c]
            plain = stop - start == TILE
            for t in range(start, stop):
                plain = plain and edit_at[b, t] < 0 and record_at[t] < 0
                x_t, delta_t = x[b, t, first:last], delta[b, t, first:last]
                step_t, inflow_t, out_t = step[t - start], inflow[t - start], out[t - start]
                for c in range(width):
                    step_t[c] = delta_t[c] + bias[c]
                if through_softplus:
                    for c in range(width):
                        step_t[c] = softplus(step_t[c])
                for c in range(width):
                    row[c] = x_t[c]
                for c in range(width):
                    inflow_t[c] = step_t[c] * row[c]
                    out_t[c] = skip[c] * row[c]
            if plain:
                _advance_tile(state, exponent, step, inflow, out, B[b, start:stop, group], C[b, start:stop, group])
            else:
                for t in range(start, stop):
                    i, edit, record = t - start, edit_at[b, t], record_at[t]
                    keep_t, add_t = keep[b, max(edit, 0), first:last], add[b, max(edit, 0), first:last]
                    _advance(
                        state, exponent, step[i], inflow[i], out[i], B[b, t, group], C[b, t, group],
                        edit >= 0, keep_t, add_t,
                    )  # fmt: skip
                    if record >= 0:
                        for n in range(d_state):
                            recorded_n, state_n = recorded[b, record, n, first:last], state[n]
                            for c in range(width):
                                recorded_n[c] = state_n[c]
            for t in range(start, stop):
                y_t, out_t, z_t = y[b, t, first:last], out[t - start], z[b, t, first:last]
                if gated:
                    for c in range(width):
                        row[c] = z_t[c]
                    for c in range(width):
                        y_t[c] = out_t[c] * row[c] / (_ONE + exp2(-row[c] * _LOG2_E))
                else:
                    for c in range(width):
                        y_t[c] = out_t[c]
        for n in range(d_state):
            state_n, final_n = state[n], final_state[b, first:last, n]
            for c in range(width):
                final_n[c] = state_n[c]


@njit(fastmath={"contract"}, error_model="numpy")
@no_type_check
def _replay(
    start: int,
    stop: int,
    b: int,
    group: int,
    first: int,
    x: Array,  # pos, channels of the block
    delta: Array,  # pos, channels of the block
    B: Array,
    edit_at: Array,
    keep: Array,
    add: Array,
    exponent: Array,  # d_state BLOCK
    step: Array,  # BLOCK, as is inflow: scratch, zero past the width
    inflow: Array,
    decays: Array,  # REPLAY d_state BLOCK
    states: Array,  # REPLAY + 1, d_state BLOCK; the first is the state before the chunk
) -> None:
    """Fill decays and states for the positions of one chunk."""
    width = x.shape[1]
    for t in range(start, stop):
        i = t - start
        edit = edit_at[b, t]
        x_t, delta_t = x[t], delta[t]
        for c in range(width):
            step[c] = delta_t[c]
            inflow[c] = delta_t[c] * x_t[c]
        for n in range(exponent.shape[0]):
            B_n = B[b, t, group, n]
            exponent_n, decays_n, before, after = exponent[n], decays[i, n], states[i, n], states[i + 1, n]
            for c in range(BLOCK):
                decay = exp2(step[c] * exponent_n[c])
                decays_n[c] = decay
                after[c] = decay * before[c] + inflow[c] * B_n
            if edit >= 0:
                for c in range(width):
                    after[c] = keep[b, edit, first + c, n] * after[c] + add[b, edit, first + c, n]


@no_type_check
def _backward(
    counter: Array,
    n_tasks: int,
    x: Array,  # these and the next up to boundaries: as in the forward pass
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    edit_at: Array,
    keep: Array,
    add: Array,
    record_at: Array,
    boundaries: Array,
    grad_y: Array,  # incoming gradients: batch pos d_inner,
    grad_recorded: Array,  # batch n_positions d_state d_inner,
    grad_final: Array,  # batch d_inner d_state
    grad_x: Array,  # batch pos d_inner
    grad_delta: Array,  # batch pos d_inner
    grad_A: Array,  # batch d_inner d_state: to be summed over batch
    grad_B: Array,  # block batch pos d_state: to be summed over the blocks of each group, as grad_C
    grad_C: Array,
    grad_initial: Array,  # batch d_inner d_state
    grad_keep: Array,  # batch n_edits d_inner d_state
    grad_add: Array,  # batch n_edits d_inner d_state
) -> None:
    _, length, d_inner = x.shape
    d_state, n_groups = A.shape[1], B.shape[2]
    shape = (d_state, BLOCK)
    exponent, rate = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    adjoint, sum_A = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    decays = np.zeros((REPLAY, d_state, BLOCK), np.float32)
    states = np.zeros((REPLAY + 1, d_state, BLOCK), np.float32)
    step, inflow, out = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    to_inflow, to_step = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    while True:
        task = next_task(counter)
        if task >= n_tasks:
            break
        b, group, block, first, width = _block_of(task, d_inner, n_groups)
        last = first + width
        for c in range(BLOCK):
            step[c] = inflow[c] = out[c] = _ZERO
            for n in range(d_state):
                rate[n, c] = A[first + c, n] if c < width else _ZERO
                exponent[n, c] = rate[n, c] * _LOG2_E
                adjoint[n, c] = grad_final[b, first + c, n] if c < width else _ZERO
                sum_A[n, c] = states[0, n, c] = _ZERO
        for chunk in range((length + REPLAY - 1) // REPLAY - 1, -1, -1):
            start = chunk * REPLAY
            stop = min(start + REPLAY, length)
            for n in range(d_state):
                for c in range(width):
                    states[0, n, c] = boundaries[chunk, b, n, first + c]
            x_b, delta_b = x[b, :, first:last], delta[b, :, first:last]
            edits, scratch = (edit_at, keep, add), (exponent, step, inflow)
            _replay(start, stop, b, group, first, x_b, delta_b, B, *edits, *scratch, decays, states)
            for t in range(stop - 1, start - 1, -1):
                i = t - start
                edit, record = edit_at[b, t], record_at[t]
                x_t, delta_t, grad_y_t = x_b[t], delta_b[t], grad_y[b, t, first:last]
                for c in range(BLOCK):
                    to_inflow[c] = to_step[c] = _ZERO
                for c in range(width):
                    step[c] = delta_t[c]
                    inflow[c] = delta_t[c] * x_t[c]
                    out[c] = grad_y_t[c]
                for n in range(d_state):
                    B_n, C_n, rate_n = B[b, t, group, n], C[b, t, group, n], rate[n]
                    adjoint_n, sum_A_n = adjoint[n], sum_A[n]
                    decay, before, after = decays[i, n], states[i, n], states[i + 1, n]
                    if record >= 0:
                        for c in range(width):
                            adjoint_n[c] += grad_recorded[b, record, n, first + c]
                    sum_C = _ZERO
                    for c in range(BLOCK):
                        sum_C += out[c] * after[c]
                        adjoint_n[c] += out[c] * C_n
                    if edit >= 0:
                        for c in range(width):
                            g = adjoint_n[c]
                            grad_add[b, edit, first + c, n] = g
                            grad_keep[b, edit, first + c, n] = g * (decay[c] * before[c] + inflow[c] * B_n)
                            adjoint_n[c] = g * keep[b, edit, first + c, n]
                    sum_B = _ZERO
                    for c in range(BLOCK):
                        g = adjoint_n[c]
                        carried = g * decay[c]
                        to_exponent = carried * before[c]
                        sum_B += g * inflow[c]
                        to_inflow[c] += g * B_n
                        to_step[c] += to_exponent * rate_n[c]
                        sum_A_n[c] += to_exponent * step[c]
                        adjoint_n[c] = carried
                    grad_B[block, b, t, n] = sum_B
                    grad_C[block, b, t, n] = sum_C
                grad_x_t, grad_delta_t = grad_x[b, t, first:last], grad_delta[b, t, first:last]
                for c in range(width):
                    grad_x_t[c] = to_inflow[c] * delta_t[c]
                    grad_delta_t[c] = to_inflow[c] * x_t[c] + to_step[c]
        for c in range(width):
            for n in range(d_state):
                grad_A[b, first + c, n] = sum_A[n, c]
                grad_initial[b, first + c, n] = adjoint[n, c]


_TABLE_1D, _TABLE_2D, _DENSE_1D = int32[::1], int32[:, ::1], float32[::1]
_DENSE_3D, _DENSE_4D = float32[:, :, ::1], float32[:, :, :, ::1]
_STRIDED_2D, _STRIDED_3D, _STRIDED_4D = float32[:, :], float32[:, :, :], float32[:, :, :, :]
_INPUTS = (int64[::1], int64, _STRIDED_3D, _DENSE_3D, _STRIDED_2D, _STRIDED_4D, _STRIDED_4D)
_EDITS = (_TABLE_2D, _STRIDED_4D, _STRIDED_4D)


# Explicit signatures: one compilation each, whatever the strides of the arrays.
@functools.cache
def forward_kernel() -> Callable[..., None]:
    """`_forward`, compiled."""
    gate = (_DENSE_1D, boolean, _DENSE_1D, _STRIDED_3D, boolean, _STRIDED_3D)
    signature = types.void(*_INPUTS, *gate, *_EDITS, _TABLE_1D, _DENSE_3D, _DENSE_4D, _DENSE_3D, _DENSE_4D)
    return njit(signature, nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")(_forward)


@functools.cache
def backward_kernel() -> Callable[..., None]:
    """`_backward`, compiled; its sums over channels may be reassociated, exp2 keeps its own rules."""
    incoming = (_TABLE_1D, _DENSE_4D, _STRIDED_3D, _STRIDED_4D, _STRIDED_3D)
    outgoing = (*(_DENSE_3D,) * 3, *(_DENSE_4D,) * 2, _DENSE_3D, *(_DENSE_4D,) * 2)
    signature = types.void(*_INPUTS, *_EDITS, *incoming, *outgoing)
    return njit(signature, nogil=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")(_backward)
