"""What an nnsight trace that runs now asks of a module. Needs no nnsight: a module that it wraps carries its mark."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Where nnsight ≥ 0.8 keeps, on every module that one of its envoys wraps, which traces reach it and by what names.
MARK = "__nnsight__"


def is_requested(module: nn.Module, *, by_name: bool = False) -> bool:
    """Whether the code of a running trace waits for the module's input or output, or a cache of it records them.

    The code of a trace waits at one place at a time and in the model's order, so at the moment a module is about to be
    called this is known for sure. by_name: of caches, only those that name the module, not those of all modules.
    """
    interleaver, locations = _running(module)
    if interleaver is None:
        return False
    if not interleaver.parked.isdisjoint(locations):
        return True
    if not interleaver.observers:
        return False
    caches = (cache for location in locations for _, cache, _ in interleaver.observers.get(location, ()))
    return any(cache.targets is not None or not by_name for cache in caches)


def is_in_a_trace(module: nn.Module) -> bool:
    """Whether a trace runs now that may still ask for the module's input or output."""
    return _running(module)[0] is not None


def for_a_reader(tensor: Tensor) -> Tensor:
    """A copy for who reads from outside: he may edit it in place, and nobody else holds its storage.

    nnsight takes an invoke's part of a gradient by the strides of its part of the tensor, so that both must be laid out
    alike: they are contiguous.
    """
    copy = tensor.clone(memory_format=torch.contiguous_format)
    if copy.requires_grad:
        copy.register_hook(_contiguous)
    return copy


def _contiguous(gradient: Tensor) -> Tensor:
    whole = gradient.is_contiguous() and gradient.storage_offset() == 0
    return gradient if whole else gradient.clone(memory_format=torch.contiguous_format)


def pass_by(module: nn.Module) -> None:
    """Count a visit of a module that is not called in this pass, so that `tracer.iter` counts passes everywhere."""
    interleaver, locations = _running(module)
    if interleaver is not None:
        for location in locations:
            interleaver.counts[location] = interleaver.counts.get(location, 0) + 1


def _running(module: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """The interleaver of the trace that runs now and the module's locations in it; None if there is none."""
    mark: Any = module.__dict__.get(MARK)
    if mark is None:
        return None, ()
    interleaver, _, locations = mark.active()
    return interleaver, locations
