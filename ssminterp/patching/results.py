"""Labelled results of sweeps: xarray arrays that know what they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ssminterp.patching.request import Direction, Sweep
from ssminterp.patching.selections import SelectionGrid
from ssminterp.patching.storage import Results
from ssminterp.versions import versions

# run -> value [batch]
Baselines = Mapping[str, Float[Tensor, " batch"]]


def provenance(sweep: Sweep, direction: Direction, engine: str) -> dict[str, object]:
    """Where the numbers of a sweep come from: strings, numbers and lists, so that `to_netcdf` can write them."""
    model = sweep.model
    revision = getattr(model.lm.config, "_commit_hash", None)
    prompts = {}
    clean_first = direction == "clean_to_corrupted"
    for name, tokens in zip(
        ("clean_prompts", "corrupted_prompts"),
        (sweep.source, sweep.base) if clean_first else (sweep.base, sweep.source),
        strict=True,
    ):
        if model.tokenizer is None:
            prompts[name] = [" ".join(map(str, row)) for row in tokens.tolist()]
        else:
            prompts[name] = model.tokenizer.batch_decode(tokens)
    return {
        "examples": sweep.batch,
        "direction": direction,
        "intervention": sweep.intervention_name,
        "engine": engine,
        "model": model.cfg.model_name,
        "revision": str(revision or ""),
        "architecture": model.cfg.architecture,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(model.device),
        **prompts,
        **versions(),
    }


def labelled(
    results: Results,
    sweep: Sweep,
    selections: SelectionGrid,
    baselines: Mapping[str, Baselines],
    attributes: Mapping[str, object],
    reduce: str | None,
) -> dict[str, xr.DataArray]:
    """The values of each metric under (hook, layer, position[, channel][, coordinate][, example])."""
    dims = ["hook", "layer", "position"]
    coords: dict[str, object] = {
        "hook": [spec.short for spec in sweep.specs],
        "layer": list(sweep.layers),
        "position": [column.label for column in sweep.columns],
    }
    for name, labels in (("channel", selections.channels), ("coordinate", selections.states)):
        if labels is not None:
            dims.append(name)
            coords[name] = labels
    if reduce is None:
        dims.append("example")
    arrays = {}
    hooks, layers, columns, n_selections = sweep.grid
    for name, by_cell in results.values.items():
        value = by_cell.view(hooks, layers, n_selections, columns, sweep.batch).transpose(2, 3)
        numbers = value.mean(-1) if reduce == "mean" else value
        shape = [len(list(coords[dim])) if dim in coords else sweep.batch for dim in dims]  # type: ignore[call-overload]
        own = {run: float(baseline.double().mean()) for run, baseline in baselines[name].items()}
        arrays[name] = xr.DataArray(
            numbers.reshape(shape).numpy(),
            dims=dims,
            coords=coords,
            name=name,
            attrs={"metric": name, **own, **attributes},
        )
    return arrays


def with_baselines(array: xr.DataArray, baselines: Baselines) -> xr.DataArray:
    """The array with each example's baselines as coordinates `clean_by_example` and `corrupted_by_example`."""
    return array.assign_coords(
        {f"{run}_by_example": ("example", value.float().cpu().numpy()) for run, value in baselines.items()}
    )


def as_dataset(
    arrays: Mapping[str, xr.DataArray],
    baselines: Mapping[str, Baselines],
    attributes: Mapping[str, object],
    reduce: str | None,
) -> xr.Dataset:
    """One variable per metric; without reduction also `{metric}_clean` and `{metric}_corrupted` of each example."""
    variables: dict[str, object] = dict(arrays)
    if reduce is None:
        for name, runs in baselines.items():
            variables |= {f"{name}_{run}": ("example", value.float().cpu().numpy()) for run, value in runs.items()}
    return xr.Dataset(variables, attrs=dict(attributes))


def changed_and_source(sweep: xr.DataArray) -> tuple[str, str]:
    """The names ("corrupted", "clean") of the run that a sweep changes and of the one its values come from."""
    if sweep.attrs.get("direction") == "corrupted_to_clean":
        return "clean", "corrupted"
    return "corrupted", "clean"


def strongest(sweep: xr.DataArray, n: int = 10, hooks: Sequence[str] | None = None) -> pd.DataFrame:
    """The `n` cells that move the metric most away from the run that was changed, strongest first.

    Columns: hook, layer, position (and channel, coordinate if the sweep has them), the metric there, and `moved`, the
    share of the way from the baseline of the changed run (0) to that of the other one (1).

    Raises ValueError if a hook is not in the sweep.
    """
    if "example" in sweep.dims:
        sweep = sweep.mean("example", keep_attrs=True)
    unknown = [hook for hook in hooks or () if hook not in sweep["hook"].values]
    if unknown:
        raise ValueError(f"hooks {unknown} are not in the sweep, which has {sweep['hook'].values.tolist()}")
    chosen = sweep if hooks is None else sweep.sel(hook=list(hooks))
    metric = str(sweep.name)
    table = chosen.to_dataframe(name=metric).reset_index()[[*map(str, sweep.dims), metric]]
    start, goal = (sweep.attrs[run] for run in changed_and_source(sweep))
    table["moved"] = (table[metric] - start) / (goal - start)
    order = np.argsort(-table["moved"].abs().to_numpy(), kind="stable")
    return table.iloc[order[:n]].reset_index(drop=True)
