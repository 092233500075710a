"""Gradient · difference, contracted as gradients arrive: the arithmetic of `attribution_patch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookPoint
from ssminterp.patching.effects import By, kept_of
from ssminterp.patching.gradients import Run
from ssminterp.patching.metrics import Metric
from ssminterp.patching.request import Sweep
from ssminterp.patching.state_scans import attributed_states


@dataclass(frozen=True, eq=False)
class AttributionTask:
    """What is asked for; the sweep's source and base run are those that values come from and would be put into."""

    sweep: Sweep
    metric_name: str
    metric: Metric
    steps: int | None
    reduce: Literal["mean"] | None
    by: By

    @cached_property
    def needed(self) -> list[int]:
        """The positions that some column has in some example."""
        return sorted({int(p) for column in self.sweep.columns for p in column.positions.unique()})

    def points(self, layers: Sequence[int]) -> list[HookPoint]:
        return [self.sweep.point(spec, layer) for spec in self.sweep.specs for layer in layers]


class _Indices(NamedTuple):
    """Where the columns' positions are, on one device, so that no gradient waits for a copy of indices.

    needed: positions that some column has. rows: which of them a column has in an example.
    """

    needed: Int[Tensor, " n_positions"]
    examples: Int[Tensor, " batch"]
    rows: Int[Tensor, "column batch"]

    @classmethod
    def of(cls, task: AttributionTask, device: torch.device) -> _Indices:
        needed = torch.tensor(task.needed)
        row_of = torch.zeros(task.sweep.length, dtype=torch.long)
        row_of[needed] = torch.arange(len(needed))
        rows = row_of[torch.stack([column.positions for column in task.sweep.columns])]
        return cls(needed.to(device), torch.arange(task.sweep.batch, device=device), rows.to(device))


class Contraction:
    """Gradient · difference, contracted as soon as a gradient arrives, so that no two gradients are held at once.

    What is small then waits for `finish`, in which all of it takes a handful of launches.
    """

    def __init__(self, task: AttributionTask, source: Run, base: Run, found: dict[str, Tensor]) -> None:
        self.task = task
        self.found = found
        self.scans = {name: (source.scans[name], base.scans[name]) for name in base.scans}
        self.waiting: dict[torch.device, dict[str, Float[Tensor, "batch n_positions"]]] = {}
        self.indices: dict[torch.device, _Indices] = {}
        # Popped one by one: two runs and their difference need not all be held.
        self.differences = {
            name: _subtracted(source.activations.pop(name), base.activations.pop(name))
            for name in list(base.activations)
        }

    def __call__(self, point: HookPoint, gradient: Tensor) -> None:
        """Take the gradient of a hook point, [batch, pos, …], of a state [batch, n_positions, …] or of its scan's y."""
        if point.name in self.scans:
            of_source, of_base = self.scans.pop(point.name)
            attributed = attributed_states(of_source, of_base, gradient, self.task.by == "position")
            self._take(point.name, self._at_needed(attributed))
        elif point.name in self.differences:
            difference = self.differences[point.name]
            here = gradient if point.spec.short == "state" else self._at_needed(gradient)
            kept = 2 + len(kept_of(point.spec, self.task.by))
            self._take(point.name, _sum_after(here.to(difference.dtype), difference, kept))

    def finish(self) -> None:
        """Put what was contracted since the last time into `found`."""
        for device, parts in self.waiting.items():
            _, examples, rows = self._on(device)
            chosen = self._reduced(torch.stack(list(parts.values()))[:, examples, rows], 2)
            for name, of_point in zip(parts, chosen.unbind(), strict=True):
                self._keep(name, of_point)
        self.waiting.clear()

    def _take(self, name: str, attributed: Float[Tensor, "batch n_positions *kept"]) -> None:
        if attributed.dim() == 2:
            self.waiting.setdefault(attributed.device, {})[name] = attributed
            return
        _, examples, rows = self._on(attributed.device)
        self._keep(name, self._reduced(attributed[examples, rows], 1))

    def _reduced(self, chosen: Float[Tensor, "*columns batch *kept"], examples_axis: int) -> Tensor:
        """The attributions of columns, of each example or on average, of one of the steps."""
        chosen = chosen / (self.task.steps or 1)
        mean = self.task.reduce == "mean"
        return chosen.mean(examples_axis) if mean else chosen.movedim(examples_axis, -1)

    def _at_needed(self, tensor: Float[Tensor, "batch pos *axes"]) -> Float[Tensor, "batch n_positions *axes"]:
        everywhere = len(self.task.needed) == tensor.shape[1]
        return tensor if everywhere else tensor.index_select(1, self._on(tensor.device).needed)

    def _on(self, device: torch.device) -> _Indices:
        if device not in self.indices:
            self.indices[device] = _Indices.of(self.task, device)
        return self.indices[device]

    def _keep(self, name: str, chosen: Float[Tensor, "column *kept"]) -> None:
        self.found[name] = self.found[name] + chosen if name in self.found else chosen


def _subtracted(source: Tensor, base: Tensor) -> Tensor:
    """The difference in float32 or better."""
    dtype = torch.promote_types(source.dtype, torch.float32)
    return source.to(dtype) - base.to(dtype)


def _sum_after(first: Tensor, second: Tensor, kept: int) -> Tensor:
    """first · second, summed over all axes after the first `kept`; the product is never held if there are any."""
    if kept == first.dim():
        return first * second
    names = "abcdefg"[: first.dim()]
    return torch.einsum(f"{names},{names}->{names[:kept]}", first, second)
