"""States at places of their own in each run, from what a layer's scan takes in, in float32 on the CPU.

A recorder of states keeps the same positions of every run: where runs have their sites at different positions, nearly
all of it is thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.hook_points import Recorder
from ssminterp_kernels import rows


class PlacedStates(Recorder):
    """Scans along with one layer of a run and keeps the states wanted.

    runs, positions: [m] each. A negative position stands for zeros, the state before the text.
    """

    def __init__(
        self, model: HookedMamba, layer: int, n_runs: int, runs: Int[Tensor, " m"], positions: Int[Tensor, " m"]
    ) -> None:
        super().__init__({})
        block: Any = model.blocks[layer]
        self.A = block.mixer.A()
        self.points = [model.hook_points[f"blocks.{layer}.mixer.hook_{short}"] for short in ("x", "delta", "B")]
        self._n_runs = n_runs
        self._before = rows.blocks(torch.zeros(n_runs, *self.A.shape))
        self._start = 0
        self._runs, self._positions = runs, positions
        self._states = torch.zeros(len(runs), *self.A.shape)
        self._seen: dict[str, Tensor] = {}

    @staticmethod
    def suit(model: HookedMamba, layer: int) -> bool:
        """Whether the compiled scan takes what this layer computes with."""
        mixer: Any = model.blocks[layer].mixer
        return rows.suits(mixer.A_log, mixer.conv1d.weight, d_inner=mixer.d_inner)

    def states(self) -> Float[Tensor, "m d_inner d_state"]:
        """After the run, in the order of the places."""
        return self._states

    def record(self, hook: HookPoint, tensor: Tensor) -> None:
        self._seen[hook.spec.short] = tensor
        if len(self._seen) < len(self.points):
            return
        x, delta, B = (self._seen.pop(point.spec.short) for point in self.points)
        length = x.shape[1]
        here = ((self._positions >= self._start) & (self._positions < self._start + length)).nonzero()[:, 0]
        places = self._runs[here], self._positions[here] - self._start
        slots = torch.full((self._n_runs, length), -1)
        slots[places] = here
        rows.recorded_states(self.A, x, delta, B, self._before, slots, self._states)
        again = slots[places] != here  # a place that is wanted more than once
        self._states[here[again]] = self._states[slots[places][again]]
        self._start += length
