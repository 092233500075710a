"""What the page Patch asks for, and its results, kept for all tabs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import streamlit as st
import torch
import xarray as xr

from ssminterp import HookedMamba
from ssminterp.interventions import scale
from ssminterp.patching import (
    Column,
    Steered,
    attribution_patch,
    cell_change,
    cell_logits,
    patch_sweep,
    position_columns,
    role_columns,
    strongest_channels,
)
from ssminterp.patching.request import Direction, SweepIntervention
from ssminterp.tasks import Metric, TaskBatch, aligned_task, make_task, own_pairs
from ssminterp_dashboards import models
from ssminterp_dashboards.models import ModelKey
from ssminterp_dashboards.results import MAX_TOKENS

METRICS = {
    "logit_diff": "logit difference",
    "probability": "probability of the answer",
    "log_odds": "log odds of the answer",
    "kl": "KL from the clean run",
}
INTERVENTIONS = {
    "patch": "patch: put the other run's value there",
    "zero": "ablate: put zeros there",
    "mean": "ablate: put the other run's mean there",
    "scale": "scale what is there",
    "steer": "steer towards the other run",
}
# Multiply-adds of one part of a sweep, roughly: long enough to be worth starting, short enough
# to stop after, and for another tab to wait for.
PART_WORK = 6e9


class Pairs(NamedTuple):
    """Which prompts: of a task, or one's own where `task` is empty."""

    task: str
    n: int = 8
    seed: int = 0
    clean: tuple[str, ...] = ()
    corrupted: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


class Request(NamedTuple):
    """What one map depends on, but its hook."""

    key: ModelKey
    pairs: Pairs
    columns: Literal["tokens", "roles"] = "tokens"
    metric: str = "logit_diff"
    direction: Direction = "clean_to_corrupted"
    intervention: str = "patch"
    amount: float = 1.0


def digest(request: Request, hooks: Sequence[str]) -> str:
    """A short name of a request, for links."""
    return hashlib.sha256(repr((request, tuple(hooks))).encode()).hexdigest()[:8]


@st.cache_resource(max_entries=16, show_spinner=False)
def batch_of(key: ModelKey, pairs: Pairs, columns: str) -> TaskBatch:
    """The prompts. Raises ValueError, saying what is wrong with them."""
    with models.load(key).ready() as model:
        if model.tokenizer is None:
            raise ValueError("This model has no tokenizer, so it has no prompts to patch.")
        if pairs.task:
            make = aligned_task if columns == "tokens" else make_task
            batch = make(pairs.task, model.tokenizer, n=pairs.n, seed=pairs.seed)
        else:
            batch = own_batch(model, pairs)
        if batch.clean.shape[1] > MAX_TOKENS:
            raise ValueError(f"The prompts have {batch.clean.shape[1]:,} tokens; the page takes {MAX_TOKENS:,}.")
        return batch.to(model.device)


def own_batch(model: HookedMamba, pairs: Pairs) -> TaskBatch:
    """A reader's own prompts; where no answers are named, what the model itself says to each.

    Raises ValueError for empty prompts, pairs of different length (with both sides), unknown words (with the nearest
    known ones), and where the model gives both prompts of a pair the same answer.
    """
    if not pairs.clean or not pairs.corrupted:
        raise ValueError("Write a clean and a corrupted prompt: one prompt a line, as many of each.")
    if len(pairs.clean) != len(pairs.corrupted):
        raise ValueError(
            f"There are {len(pairs.clean)} clean and {len(pairs.corrupted)} corrupted prompts: write one a line, as "
            "many of each."
        )
    said = []
    for clean, corrupted in zip(pairs.clean, pairs.corrupted, strict=True):
        sides = [model.to_tokens(text) for text in (clean, corrupted)]
        if sides[0].shape != sides[1].shape:
            raise ValueError(
                f"A clean and a corrupted prompt must have as many tokens, these have {sides[0].shape[1]} and "
                f"{sides[1].shape[1]}: {model.to_str_tokens(sides[0])} and {model.to_str_tokens(sides[1])}."
            )
        said.append([int(model(tokens)[0, -1].argmax()) for tokens in sides])
    n = len(said)
    answers: list[int | str] = [*(pairs.answers * n if len(pairs.answers) == 1 else pairs.answers)]
    wrong: list[int | str] = [*(pairs.wrong * n if len(pairs.wrong) == 1 else pairs.wrong)]
    answers, wrong = answers or [clean for clean, _ in said], wrong or [corrupted for _, corrupted in said]
    for (good, bad), text in zip(said, pairs.clean, strict=True):
        if good == bad and not (pairs.answers and pairs.wrong):
            word = model.to_str_tokens(torch.tensor([good]))[0]
            raise ValueError(
                f"The model says {word!r} to {text!r} and to its corrupted prompt: name an answer and a wrong answer."
            )
    assert model.tokenizer is not None
    return own_pairs(model.tokenizer, list(pairs.clean), list(pairs.corrupted), answers, wrong)


def columns_of(model: HookedMamba, request: Request, batch: TaskBatch) -> list[Column]:
    """The columns of the map: every token, or the roles."""
    if request.columns == "roles":
        return role_columns(batch.roles, batch.clean)
    return position_columns(model, batch.clean, roles=batch.roles)


def metric_of(model: HookedMamba, request: Request, batch: TaskBatch) -> Metric:
    """The metric, with the clean run's logits where it needs them."""
    return batch.metric(request.metric, model(batch.clean) if request.metric == "kl" else None)


def intervention_of(request: Request) -> SweepIntervention:
    """What to do at a cell."""
    if request.intervention == "scale":
        return scale("*", request.amount)
    if request.intervention == "steer":
        return Steered(request.amount)
    return request.intervention  # type: ignore[return-value]


def parts(request: Request, hooks: Sequence[str]) -> dict[Hashable, Callable[[], xr.DataArray]]:
    """A sweep cut into parts, by (hook, layers): the same cut for every reader, so that they share what is kept."""
    loaded = models.load(request.key)
    batch = batch_of(request.key, request.pairs, request.columns)
    n_columns = len(batch.roles) if request.columns == "roles" else batch.clean.shape[1]
    work = loaded.n_parameters * batch.clean.numel() * n_columns / 2
    at_once = max(1, min(loaded.model.cfg.n_layers, int(PART_WORK / work)))
    found: dict[Hashable, Callable[[], xr.DataArray]] = {}
    for hook in hooks:
        for start in range(0, loaded.model.cfg.n_layers, at_once):
            layers = tuple(range(start, min(start + at_once, loaded.model.cfg.n_layers)))
            found[hook, layers] = partial(part, request, hook, layers)
    return found


@st.cache_data(max_entries=512, show_spinner=False)
def part(request: Request, hook: str, layers: tuple[int, ...]) -> xr.DataArray:
    """Some layers of one map: (hook, layer, position)."""
    batch = batch_of(request.key, request.pairs, request.columns)
    with models.load(request.key).ready() as model:
        return patch_sweep(
            model,
            batch.clean,
            batch.corrupted,
            [hook],
            metric_of(model, request, batch),
            layers=layers,
            positions=columns_of(model, request, batch),
            direction=request.direction,
            intervention=intervention_of(request),
            progress=False,
        )


def assembled(found: Sequence[xr.DataArray], hooks: Sequence[str], n_layers: int) -> xr.DataArray:
    """One array of the parts that are finished, NaN where none is yet. Raises ValueError if there is none at all."""
    if not found:
        raise ValueError("no part of the sweep is finished")
    whole = xr.combine_by_coords([one.to_dataset() for one in found], join="outer", combine_attrs="override")
    array = whole[found[0].name].reindex(hook=list(hooks), layer=range(n_layers))
    return array.reindex(position=found[0]["position"]).assign_attrs(found[0].attrs)


@st.cache_data(max_entries=64, show_spinner="Taking the gradient …")
def attribution(request: Request, hook: str) -> xr.DataArray:
    """The map as one gradient estimates it: (hook, layer, position)."""
    batch = batch_of(request.key, request.pairs, request.columns)
    with models.load(request.key).ready() as model:
        return attribution_patch(
            model,
            batch.clean,
            batch.corrupted,
            [hook],
            metric_of(model, request, batch),
            positions=columns_of(model, request, batch),
            direction=request.direction,
        )


@st.cache_data(max_entries=128, show_spinner=False)
def logits(request: Request, hook: str, layer: int, column: int) -> xr.DataArray:
    """Logits at the end of every example in both runs and in that with one cell changed: (run, example, vocab)."""
    batch = batch_of(request.key, request.pairs, request.columns)
    with models.load(request.key).ready() as model:
        return cell_logits(
            model,
            batch.clean,
            batch.corrupted,
            hook,
            layer,
            columns_of(model, request, batch)[column],
            batch.roles["end"],
            direction=request.direction,
            intervention=intervention_of(request),
        )


class CellParts(NamedTuple):
    """What the channels and the state coordinates of one cell do; None where the hook or the intervention has none.

    estimated: by one gradient, (channel, coordinate), (channel) or (coordinate). channels: the exact effect of each of
    the strongest channels alone, coordinates: of every coordinate alone. Where nothing is estimated, the strongest
    channels are those that the intervention changes most.
    """

    estimated: xr.DataArray | None
    channels: xr.DataArray | None
    coordinates: xr.DataArray | None


@st.cache_data(max_entries=128, show_spinner=False)
def cell_parts(request: Request, hook: str, layer: int, column: int, n_channels: int) -> CellParts:
    """What the channels and the state coordinates of one cell do."""
    batch = batch_of(request.key, request.pairs, request.columns)
    with models.load(request.key).ready() as model:
        at = columns_of(model, request, batch)[column]
        sides = (model, batch.clean, batch.corrupted)
        metric = metric_of(model, request, batch)
        axes = next(spec for spec in model.hook_specs if spec.short == hook).axes[2:]
        has_channels, has_states = axes[0] != "d_state", axes[-1] == "d_state"
        changes = intervention_of(request)
        estimated = None
        if request.intervention == "patch" and axes[-1] != "d_conv":
            estimated = attribution_patch(
                *sides,
                [hook],
                metric,
                layers=[layer],
                positions=[at],
                direction=request.direction,
                by="state" if has_states else "channel",
            ).isel(hook=0, layer=0, position=0)
        exact = partial(
            patch_sweep,
            *sides,
            [hook],
            metric,
            layers=[layer],
            positions=[at],
            direction=request.direction,
            intervention=changes,
            progress=False,
        )
        first: Sequence[int] = []
        if has_channels:
            size = estimated
            if size is None:
                size = cell_change(*sides, hook, layer, at, direction=request.direction, intervention=changes)
            first = strongest_channels(size, n_channels)
        by_channel = exact(channels={str(c): [c] for c in first}).isel(hook=0, layer=0, position=0) if first else None
        by_state = exact(states="each").isel(hook=0, layer=0, position=0) if has_states else None
        return CellParts(estimated, by_channel, by_state)
