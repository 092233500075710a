"""Activation patching over hooks × layers × positions (Wang et al. 2022, arXiv:2211.00593, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args, overload

import torch
from tqdm.auto import tqdm
from xarray import DataArray, Dataset

from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.columns import SweepPositions, sweep_columns
from ssminterp.patching.metrics import Metric, Metrics
from ssminterp.patching.naive import NaiveEngine
from ssminterp.patching.plan import Limits
from ssminterp.patching.request import (
    DIRECTIONS,
    Direction,
    Sweep,
    SweepIntervention,
    as_metrics,
    check_choice,
    check_intervention,
    on_grid,
    sweep_specs,
    sweep_tokens,
)
from ssminterp.patching.results import as_dataset, labelled, provenance, with_baselines
from ssminterp.patching.resume import ResumeEngine, check_nothing_attached
from ssminterp.patching.selections import Groups, selection_grid
from ssminterp.patching.storage import Results, describe, open_folder
from ssminterp_kernels.first_launches import told_of_first_launches

Engine: TypeAlias = Literal["auto", "resume", "naive"]


@overload
def patch_sweep(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hooks: str | Sequence[str],
    metric: Metric,
    layers: Sequence[int] | None = None,
    positions: SweepPositions = None,
    *,
    direction: Direction = ...,
    intervention: SweepIntervention = ...,
    channels: Groups | None = None,
    states: Groups | None = None,
    reduce: Literal["mean"] | None = "mean",
    engine: Engine = "auto",
    max_batch: int | None = None,
    max_bytes: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> DataArray: ...


@overload
def patch_sweep(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hooks: str | Sequence[str],
    metric: Metrics,
    layers: Sequence[int] | None = None,
    positions: SweepPositions = None,
    *,
    direction: Direction = ...,
    intervention: SweepIntervention = ...,
    channels: Groups | None = None,
    states: Groups | None = None,
    reduce: Literal["mean"] | None = "mean",
    engine: Engine = "auto",
    max_batch: int | None = None,
    max_bytes: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Dataset: ...


@torch.no_grad()
def patch_sweep(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hooks: str | Sequence[str],
    metric: Metric | Metrics,
    layers: Sequence[int] | None = None,
    positions: SweepPositions = None,
    *,
    direction: Direction = "clean_to_corrupted",
    intervention: SweepIntervention = "patch",
    channels: Groups | None = None,
    states: Groups | None = None,
    reduce: Literal["mean"] | None = "mean",
    engine: Engine = "auto",
    max_batch: int | None = None,
    max_bytes: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> DataArray | Dataset:
    """The metric after changing one hook at one layer and position of a run, for every layer and position in turn.

    clean, corrupted: texts, or tokens [batch, pos], of the same shape.
    hooks: short names ("state", "delta", "resid_pre", …).
    metric: logits [batch, pos, vocab] to one number per example, [batch]; or several as {name: metric}. Logits are
        computed only where they are read if the metric says where (see `ssminterp.patching.metrics`).
    layers: which ones; None means all.
    positions: which ones; None means all. A mapping {role: positions [batch]}, like `TaskBatch.roles`, makes a column
        for every role, at its own position in each example. Ready-made columns are taken as they are.
    direction: which run's values go into which.
    intervention: "patch" puts the other run's value there, "zero" zeros, "mean" the mean of the other run over its
        prompts at that column. A function (now, other) -> new gets the values of both runs, [n, *features] for any n,
        and decides for each row by itself. Or an intervention object like `scale("*", 0.5)`, `steer("*", vector)` or
        `ablate("*", method="mean", prompts=…)`, without positions: it is put at each place of the grid in turn, and
        keeps the channels, states and examples that it names. Its values are [batch or 1, 1, *features].
    channels: {label: indices} or "each": change only these features of a d_model or d_inner axis, a cell for each
        group. states: the same for a d_state axis.
    reduce: "mean" over examples, or None to keep them apart.
    engine: "resume" starts each cell at its own layer and position, many in one batch; "naive" runs the model once per
        cell, also under hooks that are attached to it. "auto" is "resume" unless something is attached to the model.
    max_batch: the most rows that run as one batch. max_bytes: the most memory to take beside the model's; by default
        half of what is free. Both are for the resuming engine, which picks its batches by them.
    progress: show a bar. On a GPU it also names kernels that are launched for the first time: a new shape, dtype or
        hook may take some seconds to compile.
    out: a folder that finished parts are written to; called again, an interrupted sweep goes on where it stopped. An
        error in one part (a metric that is NaN there, memory that ran out) does not stop the others.

    Returns an array over (hook, layer, position[, channel][, coordinate][, example]), or for several metrics a Dataset
    of one such variable for each, whose attributes hold the clean and corrupted baselines and where the numbers come
    from.

    Raises ValueError, before the sweep, for unknown hooks, layers or roles, positions, channels or states out of range,
    prompts of different shape, a metric that returns another shape or NaN, a folder that holds another sweep, limits
    that leave no room, interventions that cannot be moved over the grid, and for engine="resume" if hook functions or
    recorders are attached to the model. Raises RuntimeError, after the sweep, if parts failed with out=.

    >>> sweep = patch_sweep(model, batch.clean, batch.corrupted, ["state", "x"],
    ...                     batch.metric("logit_diff"), positions=batch.roles)  # doctest: +SKIP
    """
    check_choice("reduce", reduce, ("mean", None))
    check_choice("engine", engine, get_args(Engine))
    check_choice("direction", direction, DIRECTIONS)
    check_intervention(intervention)
    sides = sweep_tokens(model, clean, corrupted)
    source, base = sides if direction == "clean_to_corrupted" else (sides[1], sides[0])
    specs = sweep_specs(model, hooks)
    grid = selection_grid(specs, model.cfg, channels, states)
    chosen_layers = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    model.check_layers(chosen_layers)
    if not chosen_layers or len(set(chosen_layers)) < len(chosen_layers):
        raise ValueError(f"layers must name at least one layer and none twice, got {chosen_layers}")
    columns = sweep_columns(model, base, positions)
    moved = on_grid(intervention, model, specs, chosen_layers, columns)
    sweep = Sweep(model, source, base, specs, chosen_layers, columns, grid.selections, moved)
    metrics = as_metrics(metric)
    attached = [name for name, point in model.hook_points.items() if point.is_listened_to]
    if engine == "auto":
        engine = "naive" if attached else "resume"
    elif engine == "resume":
        check_nothing_attached(attached)
    limits = Limits.of(sweep, max_batch, max_bytes)
    in_parts = out is not None
    chosen = NaiveEngine(sweep, metrics) if engine == "naive" else ResumeEngine(sweep, metrics, limits, in_parts)
    names = ("clean", "corrupted") if direction == "clean_to_corrupted" else ("corrupted", "clean")
    with tqdm(total=math.prod(sweep.grid), desc="patching: both runs", unit="cell", disable=not progress) as bar:

        def advance(cells: int) -> None:
            bar.set_description("patching", refresh=False)
            bar.update(cells)

        with told_of_first_launches(lambda name: bar.set_description(f"patching: first launch of {name}")):
            baselines = {name: dict(zip(names, runs, strict=True)) for name, runs in chosen.baselines().items()}
            folder = None if out is None else open_folder(out, describe(sweep, direction, baselines))
            results = Results(sweep, list(metrics), folder)
            advance(int(results.done.sum()))
            chosen.fill(results, advance)
    results.check_complete()
    attributes = provenance(sweep, direction, engine)
    arrays = labelled(results, sweep, grid, baselines, attributes, reduce)
    if isinstance(metric, Mapping):
        return as_dataset(arrays, baselines, attributes, reduce)
    (name,) = arrays
    return arrays[name] if reduce == "mean" else with_baselines(arrays[name], baselines[name])
