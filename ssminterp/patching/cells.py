"""One cell of a sweep by itself: its logits, which tokens gain and lose, and more ways to change what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.columns import Column, SweepPositions, sweep_columns
from ssminterp.patching.naive import NaiveEngine
from ssminterp.patching.request import (
    DIRECTIONS,
    Direction,
    Sweep,
    SweepIntervention,
    check_choice,
    check_intervention,
    on_grid,
    sweep_specs,
    sweep_tokens,
)
from ssminterp.patching.results import provenance
from ssminterp.patching.selections import Selection


@dataclass(frozen=True)
class Steered:
    """An intervention for sweeps: what is there, plus `strength` times the way to the other run (1 is a patch)."""

    strength: float

    @property
    def name(self) -> str:
        return f"steered {self.strength:g} of the way"

    def __call__(self, now: Tensor, source: Tensor) -> Tensor:
        """now, source: [n, *features]."""
        return now + self.strength * (source - now)


@torch.no_grad()
def cell_logits(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hook: str,
    layer: int,
    position: SweepPositions | Column,
    at: Int[Tensor, " batch"],
    *,
    direction: Direction = "clean_to_corrupted",
    intervention: SweepIntervention = "patch",
) -> xr.DataArray:
    """The logits of both runs and of the changed one for a cell of a sweep: dims (run, example, vocab).

    run is "clean", "corrupted" and "changed". position: of the cell, a position, a column, or {role: positions}; one
    of them. at: the position of each example whose logits are returned. The rest is as for `patch_sweep`.

    Raises ValueError for what `patch_sweep` refuses, and if `position` means more than one column.
    """
    sweep, sides = _one_cell(model, clean, corrupted, hook, layer, position, direction, intervention)
    changed = NaiveEngine(sweep, {}).logits(layer)
    runs = {"clean": model(sides[0]), "corrupted": model(sides[1]), "changed": changed}
    rows = torch.arange(sweep.batch, device=sweep.base.device)
    values = torch.stack([logits[rows, at.to(rows.device)].float() for logits in runs.values()])
    return xr.DataArray(
        values.cpu().numpy(),
        dims=("run", "example", "vocab"),
        coords={"run": list(runs), "hook": hook, "layer": layer, "position": sweep.columns[0].label},
        name="logits",
        attrs=provenance(sweep, direction, "naive"),
    )


def _one_cell(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hook: str,
    layer: int,
    position: SweepPositions | Column,
    direction: Direction,
    intervention: SweepIntervention,
) -> tuple[Sweep, tuple[Tensor, Tensor]]:
    """A sweep of one cell, and the clean and corrupted tokens."""
    check_choice("direction", direction, DIRECTIONS)
    check_intervention(intervention)
    sides = sweep_tokens(model, clean, corrupted)
    source, base = sides if direction == "clean_to_corrupted" else (sides[1], sides[0])
    specs = sweep_specs(model, [hook])
    model.check_layers([layer])
    columns = [position] if isinstance(position, Column) else sweep_columns(model, base, position)
    if len(columns) != 1:
        raise ValueError(f"a cell has one column, got {', '.join(column.label for column in columns)}")
    moved = on_grid(intervention, model, specs, [layer], columns)
    return Sweep(model, source, base, specs, [layer], columns, [Selection()], moved), sides


def changed_tokens(model: HookedMamba, logits: xr.DataArray, example: int = 0, k: int = 10) -> xr.Dataset:
    """The tokens whose logits a cell changes most: dims (token), the largest change first, of either sign.

    logits: from `cell_logits`. before, after: the logit in the run that was changed. probability_before,
    probability_after. change: the difference of the logits after taking away the mean change of the vocabulary, which
    moves no probability.

    Raises ValueError if there is no such example, or fewer than k tokens.
    """
    if not 0 <= example < logits.sizes["example"]:
        raise ValueError(f"there is no example {example}: the logits are of {logits.sizes['example']}")
    if not 0 < k <= logits.sizes["vocab"]:
        raise ValueError(f"k={k} tokens were asked for, the vocabulary has {logits.sizes['vocab']}")
    base = "corrupted" if logits.attrs["direction"] == "clean_to_corrupted" else "clean"
    one = logits.isel(example=example)
    before, after = (torch.from_numpy(one.sel(run=run).values) for run in (base, "changed"))
    change = (after - before) - (after - before).mean()
    order = _most_told(before, after, change, k)
    texts = [str(i) if model.tokenizer is None else model.to_str_tokens(torch.tensor([i]))[0] for i in order.tolist()]
    numbers: dict[str, Float[Tensor, " vocab"]] = {
        "before": before,
        "after": after,
        "change": change,
        "probability_before": before.softmax(-1),
        "probability_after": after.softmax(-1),
    }
    return xr.Dataset(
        {name: ("token", value[order].numpy()) for name, value in numbers.items()} | {"id": ("token", order.numpy())},
        coords={"token": np.array(texts, dtype=object).astype(str)},
        attrs=logits.attrs | {"example": example, "changed_run": base, **_place(logits)},
    )


def _most_told(before: Tensor, after: Tensor, change: Tensor, k: int) -> Int[Tensor, " k"]:
    """The tokens whose probability changes most, and where that is too small to tell, the logit."""
    moved = (after.softmax(-1) - before.softmax(-1)).abs()
    order = (moved + 1e-6 * change.abs() / change.abs().max().clamp(min=1e-12)).topk(k).indices
    return order[change[order].abs().argsort(descending=True)]


def _place(logits: xr.DataArray) -> dict[str, str | int]:
    return {
        "hook": str(logits["hook"].item()),
        "layer": int(logits["layer"].item()),
        "position": str(logits["position"].item()),
    }


def strongest_channels(sweep: xr.DataArray, n: int) -> Sequence[int]:
    """The `n` channels with the largest values, of either sign, in an attribution by channel or state.

    Raises ValueError if the array has no channels.
    """
    if "channel" not in sweep.dims:
        raise ValueError(f"the array has dims {sweep.dims}, none of them is channel")
    others = [dim for dim in sweep.dims if dim != "channel"]
    size = abs(sweep).sum(others)
    return [int(sweep["channel"].values[i]) for i in np.argsort(-size.values, kind="stable")[:n]]


@torch.no_grad()
def cell_change(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hook: str,
    layer: int,
    position: SweepPositions | Column,
    *,
    direction: Direction = "clean_to_corrupted",
    intervention: SweepIntervention = "patch",
) -> xr.DataArray:
    """How much an intervention changes what is there: the mean of |new − old| over examples.

    dims: (channel, coordinate), (channel) or (coordinate), as the hook has them. Arguments are as for `cell_logits`.

    Raises ValueError for what `cell_logits` refuses.
    """
    sweep, _ = _one_cell(model, clean, corrupted, hook, layer, position, direction, intervention)
    now, source = NaiveEngine(sweep, {}).values(layer)
    place = sweep.column_place(sweep.point(sweep.specs[0], layer), 0)
    size = (sweep.new_value(now, source, place).float() - now.float()).abs().mean(0)
    dims = [
        "coordinate" if axis == "d_state" else "tap" if axis == "d_conv" else "channel"
        for axis in sweep.specs[0].axes[2:]
    ]
    return xr.DataArray(
        size.cpu().numpy(),
        dims=dims,
        coords={dim: [str(i) for i in range(n)] for dim, n in zip(dims, size.shape, strict=True)},
        name="change",
        attrs={"unit": f"mean |new − old| of {hook}", **provenance(sweep, direction, "naive")},
    )
