"""The simple engine: one forward of the base prompts per cell, batched over prompts. The oracle of the other one.

It also runs under hooks and interventions that are attached to the model: they then act in every forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.interventions import patch
from ssminterp.models import FwdHook, HookPoint
from ssminterp.models.hook_points import HookSpec
from ssminterp.patching.columns import Column
from ssminterp.patching.metrics import Metrics, checked
from ssminterp.patching.moved import MovedEdit
from ssminterp.patching.request import Sweep
from ssminterp.patching.selections import Selection
from ssminterp.patching.storage import Results


class NaiveEngine:
    """Runs the whole model for every cell."""

    def __init__(self, sweep: Sweep, metrics: Metrics) -> None:
        self.sweep = sweep
        self.metrics = metrics

    def baselines(self) -> dict[str, tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]]:
        """Every metric's value in the source and in the base run. Raises ValueError as `checked` does."""
        source, base = (self._measure(self.sweep.model(tokens)) for tokens in (self.sweep.source, self.sweep.base))
        return {name: (source[name], base[name]) for name in self.metrics}

    def fill(self, results: Results, advance: Callable[[int], object]) -> None:
        """Run every cell that `results` does not hold yet."""
        hooks, layers, columns, selections = self.sweep.grid
        cells = torch.arange(hooks * layers * selections).view(hooks, layers, selections)
        for i, j in itertools.product(range(hooks), range(layers)):
            own = cells[i, j].tolist()
            if not results.done[own].all():
                with results.part(self.sweep.cell_name(own[0])):
                    values = self._layer(i, self.sweep.layers[j], advance)
                    results.put(own, range(columns), values)

    def _layer(
        self, hook: int, layer: int, advance: Callable[[int], object]
    ) -> dict[str, Float[Tensor, "selection column batch"]]:
        """One hook of one layer."""
        sweep, spec = self.sweep, self.sweep.specs[hook]
        point = sweep.point(spec, layer)
        sources = _source_values(sweep, point)
        values = {name: torch.empty(len(sweep.selections), len(sweep.columns), sweep.batch) for name in self.metrics}
        for k, column in enumerate(sweep.columns):
            for m, selection in enumerate(sweep.selections):
                hooks = _hooks(sweep, spec, point, column, selection, sources[k])
                for name, value in self._measure(sweep.model.run_with_hooks(sweep.base, hooks)).items():
                    values[name][m, k] = value
                advance(1)
        return values

    def logits(self, layer: int) -> Float[Tensor, "batch pos vocab"]:
        """The logits of the changed run for the sweep's first hook, column and selection."""
        sweep = self.sweep
        point = sweep.point(sweep.specs[0], layer)
        source = _source_values(sweep, point)[0]
        hooks = _hooks(sweep, sweep.specs[0], point, sweep.columns[0], sweep.selections[0], source)
        return sweep.model.run_with_hooks(sweep.base, hooks)

    def values(self, layer: int) -> tuple[Float[Tensor, "batch *features"], Float[Tensor, "batch *features"]]:
        """What stands at the sweep's first hook and column in the base and in the source run."""
        point = self.sweep.point(self.sweep.specs[0], layer)
        base = replace(self.sweep, source=self.sweep.base, intervention="patch")
        return _source_values(base, point)[0], _source_values(self.sweep, point)[0]

    def _measure(self, logits: Float[Tensor, "batch pos vocab"]) -> dict[str, Float[Tensor, " batch"]]:
        batch = self.sweep.batch
        return {name: checked(name, metric(logits), batch).cpu() for name, metric in self.metrics.items()}


def _source_values(sweep: Sweep, point: HookPoint) -> list[Float[Tensor, "batch *features"]]:
    """The source run's values at each column. Only the positions that the columns need are recorded."""
    needed = sorted({int(p) for column in sweep.columns for p in column.positions.unique()})
    recorded = sweep.model.run_with_cache(sweep.source, point.name, positions=needed)[1][point.name]
    row_of = torch.zeros(sweep.length, dtype=torch.long)
    row_of[needed] = torch.arange(len(needed))
    values = [recorded[torch.arange(sweep.batch), row_of[column.positions]] for column in sweep.columns]
    if sweep.intervention == "mean":
        values = [value.float().mean(0, keepdim=True).to(value).expand_as(value) for value in values]
    return values


def _hooks(
    sweep: Sweep, spec: HookSpec, point: HookPoint, column: Column, selection: Selection, source: Tensor
) -> list[FwdHook]:
    if selection.is_everything and sweep.intervention in ("patch", "mean"):
        return list(patch(point.name, source[:, None], column.positions[:, None]).fwd_hooks(sweep.model))
    if selection.is_everything and isinstance(sweep.intervention, MovedEdit):
        return sweep.intervention.fwd_hooks(point, column)
    mask = selection.mask(spec, source.device)
    number = next(k for k, other in enumerate(sweep.columns) if other is column)
    place = sweep.column_place(point, number)
    positions = column.positions.to(source.device)

    def changed(now: Tensor) -> Tensor:
        return torch.where(mask, sweep.new_value(now, source, place), now)

    def at_one_position(state: Tensor, hook: HookPoint) -> Tensor:
        here = torch.eq(positions, hook.position or 0)[:, None, None]
        return torch.where(here, changed(state), state)

    def everywhere(tensor: Tensor, hook: HookPoint) -> Tensor:
        rows = torch.arange(sweep.batch, device=tensor.device)
        tensor[rows, positions] = changed(tensor[rows, positions])
        return tensor

    if spec.short == "state":
        return [(point.name, at_one_position, column.positions.unique().tolist())]
    return [(point.name, everywhere)]
