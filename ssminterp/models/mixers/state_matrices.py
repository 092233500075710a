"""The state matrices of all layers of a run at once: for 48 layers it takes a GPU as many launches as for one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def state_matrix(A_log: Tensor) -> Float[Tensor, "*layer d_inner d_state"]:
    """-exp(A_log), in float32."""
    return -torch.exp(A_log.float())


class _OfThisRun(threading.local):
    """State matrices by their mixers, while a run of this thread goes on."""

    def __init__(self) -> None:
        self.by_mixer: dict[nn.Module, Tensor] = {}


_of_this_run = _OfThisRun()


def known_state_matrix(mixer: nn.Module) -> Float[Tensor, "d_inner d_state"] | None:
    """The state matrix of a mixer in the run that goes on, if it was made with all the others'."""
    return None if torch.compiler.is_compiling() else _of_this_run.by_mixer.get(mixer)


class StateMatricesBefore:
    """A torch forward pre-hook of the layers' parent that makes them, where that saves launches and needs no graph."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def __call__(self, backbone: Any, arguments: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            mixers = [mixer for mixer in (block.mixer for block in backbone.layers) if isinstance(mixer, self.kind)]
            _of_this_run.by_mixer = _together(mixers)


def _together(mixers: Iterable[Any]) -> dict[nn.Module, Tensor]:
    logs = {mixer: mixer.A_log for mixer in mixers}
    alike = {(A_log.device, A_log.dtype, A_log.shape) for A_log in logs.values()}
    if len(alike) != 1 or not _saves_launches(next(iter(alike))[0]):
        return {}
    if torch.is_grad_enabled() and any(A_log.requires_grad for A_log in logs.values()):
        return {}
    return dict(zip(logs, state_matrix(torch.stack(list(logs.values()))).unbind(), strict=True))


def _saves_launches(device: torch.device) -> bool:
    """Elsewhere launches cost nothing, and offloaded weights have no values here."""
    return device.type == "cuda"


def forget_state_matrices(backbone: Any, arguments: tuple[Any, ...], output: Any) -> None:
    """A torch forward hook: weights may change after the run."""
    if not torch.compiler.is_compiling():
        _of_this_run.by_mixer = {}
