"""Whole layers: what is lost without each, which can go, and which few carry information from token to token.

Source: Ensign & Garriga-Alonso 2024, "Investigating the Indirect Object Identification circuit in Mamba",
arXiv:2407.14008, and the experiments beside it (github.com/Phylliida/investigating-mamba-ioi): zero ablation of each
layer's output, removal of layers one by one, and removal of cross-token communication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from xarray import DataArray, Dataset

from ssminterp.interventions import Intervention, ablate, patch
from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.metrics import Metric, Metrics, checked
from ssminterp.patching.request import as_metrics, check_choice, sweep_specs, sweep_tokens
from ssminterp.versions import versions

LayerMethod: TypeAlias = Literal["zero", "mean", "position_mean", "resample"]


@torch.no_grad()
def ablate_layers(
    model: HookedMamba,
    prompts: Input,
    metric: Metric | Metrics,
    hook: str = "mixer_out",
    *,
    method: LayerMethod = "zero",
    others: Input | None = None,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Dataset:
    """The metrics with one hook of one layer ablated at every position, for every layer in turn.

    prompts: texts, or tokens [batch, pos]. metric: one, or several as {name: metric}.
    hook: a short name; the default takes away what the layer adds to the residual stream.
    method: "zero"; "mean", the hook's mean over prompts and positions; "position_mean", that over prompts at each
        position, which keeps what prompts built alike have in common; "resample", its values in `others`, prompt by
        prompt (for "resample" alone).
    layers: None means all.

    Returns a variable (layer) for each metric, a mean over prompts. The attribute `baseline` of each is the metric of
    the unchanged run.

    Raises ValueError for unknown hooks, layers and methods, others of another shape, missing or given in vain, and a
    metric that does not give one number per prompt.
    """
    check_choice("method", method, get_args(LayerMethod))
    if (others is not None) != (method == "resample"):
        raise ValueError(f"method={method!r} {'needs' if method == 'resample' else 'takes no'} others")
    tokens, values = sweep_tokens(model, prompts, prompts if others is None else others)
    (spec,) = sweep_specs(model, [hook])
    chosen = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    model.check_layers(chosen)

    def ablation(layer: int) -> Intervention:
        name = spec.name(layer)
        if method == "resample":
            return patch(name, model.run_with_cache(values, name)[1])
        if method == "position_mean":
            return patch(name, model.run_with_cache(tokens, name)[1][name].mean(0, keepdim=True))
        return ablate(name) if method == "zero" else ablate(name, method="mean", prompts=tokens)

    metrics = as_metrics(metric)
    baselines = _means(model, tokens, metrics, [])
    rows = [
        _means(model, tokens, metrics, [ablation(layer)])
        for layer in tqdm(chosen, desc="ablating layers", unit="layer", disable=not progress)
    ]
    arrays = {
        name: DataArray([row[name] for row in rows], dims=["layer"], attrs={"baseline": baselines[name]})
        for name in metrics
    }
    about = {"hook": hook, "method": method, "examples": len(tokens), "model": model.cfg.model_name}
    about["dtype"] = str(model.cfg.dtype).removeprefix("torch.")
    return Dataset(arrays, coords={"layer": chosen}, attrs={**about, **versions()})


@torch.no_grad()
def restore_layers(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    metric: Metric | Metrics,
    until: float,
    hook: str = "conv",
    *,
    at_most: int | None = None,
) -> pd.DataFrame:
    """A small set of layers that suffices: all layers get a hook's corrupted values, and one after the other its own.

    With the default hook every layer's conv, and all that follows from it (x, Δ, B, C and the state), is the corrupted
    run's, so no clean information passes from token to token. Of all layers that one is given back which makes the
    metric highest, until it reaches `until`. Greedy: a smaller set may exist.

    metric: one, or several as {name: metric}; the first is what `until` is about, the others decide between equals.
    at_most: how many layers to give back at most; None means all.

    Returns a row for each step: step, layer (-1 in step 0, with none given back) and the metrics.

    Raises ValueError for an unknown hook, prompts of different shape, and a metric that does not give one number per
    prompt.
    """
    tokens, others = sweep_tokens(model, clean, corrupted)
    (spec,) = sweep_specs(model, [hook])
    cache = model.run_with_cache(others, [spec.name(layer) for layer in range(model.cfg.n_layers)])[1]
    patches = {layer: patch(spec.name(layer), cache) for layer in range(model.cfg.n_layers)}

    def without(given_back: Sequence[int]) -> dict[str, float]:
        kept = [patches[layer] for layer in patches if layer not in given_back]
        return _means(model, tokens, as_metrics(metric), kept)

    steps = model.cfg.n_layers if at_most is None else min(at_most, model.cfg.n_layers)
    return _greedy(range(model.cfg.n_layers), without, steps, lambda first: first >= until)


@torch.no_grad()
def remove_layers(
    model: HookedMamba, prompts: Input, metric: Metric | Metrics, down_to: float, *, at_most: int | None = None
) -> pd.DataFrame:
    """How many layers can go: their outputs are zeroed one after the other, each time of that layer which costs least.

    metric: one, or several as {name: metric}; the first must stay at least `down_to`, the others decide between equals.
    at_most: how many layers to remove at most; None means all.

    Returns a row for each step: step, layer (-1 in step 0, with none removed) and the metrics. The last row may be the
    one that falls below `down_to`.

    Raises ValueError for a metric that does not give one number per prompt.
    """
    tokens, _ = sweep_tokens(model, prompts, prompts)

    def without(removed: Sequence[int]) -> dict[str, float]:
        return _means(
            model, tokens, as_metrics(metric), [ablate(f"blocks.{layer}.hook_mixer_out") for layer in removed]
        )

    steps = model.cfg.n_layers if at_most is None else min(at_most, model.cfg.n_layers)
    return _greedy(range(model.cfg.n_layers), without, steps, lambda first: first < down_to)


def _greedy(
    layers: Sequence[int],
    measure: Callable[[Sequence[int]], Mapping[str, float]],
    steps: int,
    is_enough: Callable[[float], bool],
) -> pd.DataFrame:
    """Take the layer with the highest metrics, in their order, then the next one beside it, …"""
    taken: list[int] = []
    now = measure(taken)
    rows = [{"step": 0, "layer": -1, **now}]
    while len(taken) < steps and not is_enough(next(iter(now.values()))):
        measured = {layer: measure([*taken, layer]) for layer in layers if layer not in taken}
        best = max(measured, key=lambda layer: (*measured[layer].values(), -layer))
        taken, now = [*taken, best], measured[best]
        rows.append({"step": len(taken), "layer": best, **now})
    return pd.DataFrame(rows)


def _means(
    model: HookedMamba, tokens: Int[Tensor, "batch pos"], metrics: Metrics, interventions: Sequence[Intervention]
) -> dict[str, float]:
    """Every metric's mean over the prompts under interventions."""
    with model.intervene(*interventions):
        logits = model(tokens)
    return {name: float(checked(name, metric(logits), len(tokens)).mean()) for name, metric in metrics.items()}
