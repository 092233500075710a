"""A short name for exactly these weights, so that a state is not put into another model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SAMPLES = 64
# Weights are summed in parts of so many numbers: the sum needs 64-bit integers, which are not to fill the memory.
PART = 1 << 24


class Fingerprint:
    """The fingerprint of a model, computed again only when one of its weights has been replaced or changed in place.

    It hashes the architecture and, of every weight, its name, its shape, 64 of its numbers evenly spaced, and the sum
    of all its bit patterns, every number being rounded to bfloat16 first. So it does not depend on the folder the
    model was loaded from, on the device, or on loading in float32 or bfloat16; float16 cannot hold the same numbers
    and counts as another model. It reads every weight once: under a second for 130 million of them on one CPU core. An
    edit through `parameter.data`, which torch does not count, is seen only by a model made anew.
    """

    def __init__(self) -> None:
        self._weights: tuple[tuple[int, int], ...] | None = None
        self._value = ""

    def of(self, hf_model: PreTrainedModel) -> str:
        """The fingerprint, 16 hexadecimal digits."""
        weights = tuple(
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in hf_model.parameters()
        )
        if weights != self._weights:
            self._value, self._weights = fingerprint(hf_model), weights
        return self._value


@torch.no_grad()
def fingerprint(hf_model: PreTrainedModel) -> str:
    """The hash that `Fingerprint` describes, computed now."""
    digest = hashlib.sha256(type(hf_model).__name__.encode())
    for name, weight in _weights(hf_model):
        flat = weight.detach().flatten()
        at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{list(weight.shape)}{_bits(flat[at.to(flat.device)]).tolist()}{_sum(flat)}".encode())
    return digest.hexdigest()[:16]


def _bits(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).view(torch.int16)


def _sum(flat: Tensor) -> int:
    """Sum of integers: the same in whatever order a device adds."""
    return sum(int(_bits(part).sum(dtype=torch.int64)) for part in flat.split(PART))


def _weights(hf_model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, tied ones under both of theirs; those that accelerate keeps elsewhere are brought back one
    module at a time."""
    for prefix, module in hf_model.named_modules():
        with _at_hand(module):
            yield from module.named_parameters(prefix, recurse=False)


def _at_hand(module: nn.Module) -> AbstractContextManager[None]:
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    return sys.modules["accelerate.utils"].align_module_device(module)
