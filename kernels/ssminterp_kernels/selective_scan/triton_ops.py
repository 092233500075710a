"""The Triton scan as torch.library operators, so that `torch.compile` takes it as it is.

Eager calls go to the kernels directly, which spares them the dispatcher's microseconds. Operators return tensors only:
where the scan has nothing to return, they return an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssminterp_kernels.selective_scan.triton_gradients import backward_plan, scan_backward
from ssminterp_kernels.selective_scan.triton_scan import scan_forward
from ssminterp_kernels.selective_scan.triton_tensors import ScanTensors, new_states

_INPUTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? initial_state, "
    "Tensor? edits, Tensor? keep, Tensor? add, Tensor? recorded, bool softplus, bool record_all, "
    "ScalarType states_dtype"
)
_FORWARD_SCHEMA = f"({_INPUTS}, bool save) -> (Tensor y, Tensor states, Tensor final_state, Tensor boundaries)"
_BACKWARD_SCHEMA = f"({_INPUTS}, Tensor boundaries, Tensor? dy, Tensor? dstates, Tensor? dfinal) -> Tensor[]"


@torch.library.custom_op("ssminterp::selective_scan", mutates_args=(), schema=_FORWARD_SCHEMA)
def scan_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, states, final_state and the states before segments; see `triton_scan.scan_forward`."""
    *fields, save = arguments
    s = ScanTensors(*fields)
    y, states, final_state, boundaries = scan_forward(s, save)
    return y, _or_empty(states, s), final_state, _or_empty(boundaries, s)


@scan_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, save = arguments
    s = ScanTensors(*fields)
    batch, length, _ = s.x.shape
    states = boundaries = None
    if s.record_all or s.recorded is not None:
        n_recorded = length if s.recorded is None else s.recorded.shape[0]
        states = new_states(s, batch, n_recorded, dtype=s.states_dtype)
    n_boundaries = backward_plan(s).boundaries if save else 0
    if n_boundaries:
        boundaries = new_states(s, batch, n_boundaries)
    final_state = new_states(s, batch)
    return torch.empty_like(s.x), _or_empty(states, s), final_state, _or_empty(boundaries, s)


@torch.library.custom_op("ssminterp::selective_scan_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def scan_backward_op(*arguments: Any) -> list[Tensor]:
    """The gradients of all tensors of the scan, in the order of `ScanTensors`; see `triton_gradients.scan_backward`."""
    *fields, boundaries, dy, dstates, dfinal = arguments
    s = ScanTensors(*fields)
    gradients = scan_backward(s, boundaries if boundaries.numel() else None, dy, dstates, dfinal)
    # Outputs of an operator may not share memory, and those of A, B, C, D and bias are parts of sums made together.
    apart = {
        name: g.clone() if name in ("A", "B", "C", "D", "bias") and g is not None else g
        for name, g in gradients.items()
    }
    return [_or_empty(apart.get(name), s) for name in s._fields[:13]]


@scan_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    s = ScanTensors(*arguments[:16])
    batch = s.x.shape[0]
    like = {
        name: torch.empty_like(t) for name, t in s._asdict().items() if name in ("x", "delta", "z") and t is not None
    }
    like |= {
        name: t.new_empty(t.shape)
        for name, t in s._asdict().items()
        if name in ("A", "B", "C", "D", "bias") and t is not None
    }
    if s.initial_state is not None:
        like["initial_state"] = new_states(s, batch)
    if s.edits is not None:
        like |= {name: new_states(s, batch, s.edits.shape[1]) for name in ("keep", "add")}
    return [_or_empty(like.get(name), s) for name in s._fields[:13]]


def _or_empty(tensor: Tensor | None, s: ScanTensors) -> Tensor:
    return s.x.new_empty(0) if tensor is None else tensor


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:13], output[3])
    ctx.flags = inputs[13:16]
    ctx.records = output[1].numel() > 0


def _backward(ctx: Any, dy: Tensor, dstates: Tensor, dfinal: Tensor, _dboundaries: Tensor) -> tuple[Tensor | None, ...]:
    *saved, boundaries = ctx.saved_tensors
    gradients = scan_backward_op(*saved, *ctx.flags, boundaries, dy, dstates if ctx.records else None, dfinal)
    given = (None if tensor is None or g.numel() == 0 else g for tensor, g in zip(saved, gradients, strict=True))
    return (*given, None, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup_context)
