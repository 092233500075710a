"""Knockout of one token's reads of another, in a window of layers that moves up: where does the information pass?

Source: Endy et al. 2025, "Mamba Knockout for Unraveling Factual Information Flow", arXiv:2505.24244, after Geva et al.
2023, "Dissecting Recall of Factual Associations", arXiv:2304.14767.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from xarray import DataArray, Dataset

from ssminterp.analysis.arrays import Coords, labelled, provenance
from ssminterp.interventions import knockout
from ssminterp.interventions.knockout import Decay, Knockout
from ssminterp.interventions.places import Where
from ssminterp.interventions.selection import Indices, Roles
from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.metrics import Metric, Metrics, checked
from ssminterp.patching.request import as_metrics, sweep_tokens

# {label: positions or roles, None for all}, or the names of roles, each a source by itself
Sources: TypeAlias = Mapping[str, Where | None] | Sequence[str]


@overload
def knockout_sweep(
    model: HookedMamba,
    prompts: Input,
    metric: Metric,
    sources: Sources,
    targets: Where | None = None,
    *,
    window: int = 1,
    stride: int = 1,
    decay: Decay = "kept",
    channels: Indices | None = None,
    states: Indices | None = None,
    roles: Roles | None = None,
    reduce: Literal["mean"] | None = "mean",
    progress: bool = True,
) -> DataArray: ...


@overload
def knockout_sweep(
    model: HookedMamba,
    prompts: Input,
    metric: Metrics,
    sources: Sources,
    targets: Where | None = None,
    *,
    window: int = 1,
    stride: int = 1,
    decay: Decay = "kept",
    channels: Indices | None = None,
    states: Indices | None = None,
    roles: Roles | None = None,
    reduce: Literal["mean"] | None = "mean",
    progress: bool = True,
) -> Dataset: ...


@torch.no_grad()
def knockout_sweep(
    model: HookedMamba,
    prompts: Input,
    metric: Metric | Metrics,
    sources: Sources,
    targets: Where | None = None,
    *,
    window: int = 1,
    stride: int = 1,
    decay: Decay = "kept",
    channels: Indices | None = None,
    states: Indices | None = None,
    roles: Roles | None = None,
    reduce: Literal["mean"] | None = "mean",
    progress: bool = True,
) -> DataArray | Dataset:
    """The metric when the targets must not read a source from the states of a window of layers, for every window.

    prompts: texts, or tokens [batch, pos].
    metric: logits [batch, pos, vocab] to one number per example, [batch]; or several as {name: metric}:
        `{name: batch.metric(name) for name in ("accuracy", "probability")}` of a task's batch are the paper's curves.
    sources: {label: positions or roles as `knockout` takes them}, or the names of roles, a curve for each.
    targets, decay, channels, states: as in `knockout`. roles: positions [batch] by name, like `TaskBatch.roles`.
    window: how many layers are knocked out at once. stride: from one window's first layer to the next one's.
    reduce: "mean" over examples, or None to keep them apart.

    Returns dims (source, layer[, example]); layer is the first of the window, the coordinate `last_layer` its last. For
    several metrics a Dataset of one such variable each. The attribute `baseline` is the metric without knockout, and
    without reduction `{metric}_baseline` that of each example.

    Raises ValueError, before the sweep, for windows that are not in the model, for whatever `knockout` refuses, and for
    a metric that does not give one number per example.

    >>> from ssminterp import HookedMamba
    >>> from ssminterp.tasks import make_task
    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> batch = make_task("ioi", model.tokenizer, n=8)
    >>> curves = knockout_sweep(model, batch.clean, batch.metric("accuracy"), ["IO", "S1"], "end",
    ...                         roles=batch.roles, window=3, progress=False)
    >>> curves.dims
    ('source', 'layer')
    """
    if reduce not in ("mean", None):
        raise ValueError(f"reduce must be 'mean' or None, got {reduce!r}")
    tokens = sweep_tokens(model, prompts, prompts)[0]
    metrics = as_metrics(metric)
    windows = layer_windows(window, stride, model.cfg.n_layers)
    of_sources = _labelled_sources(sources)

    def cut(at: Where | None, layers: Sequence[int]) -> Knockout:
        return knockout(layers, sources=at, targets=targets, decay=decay, channels=channels, states=states)

    for at in of_sources.values():
        cut(at, [0]).check_fits(model, tokens, roles)
    baselines = _measured(model, tokens, metrics)
    values = {name: torch.empty(len(of_sources), len(windows), len(tokens)) for name in metrics}
    with tqdm(total=len(of_sources) * len(windows), desc="knocking out", unit="window", disable=not progress) as bar:
        for i, at in enumerate(of_sources.values()):
            for j, layers in enumerate(windows):
                with model.intervene(cut(at, layers), roles=roles):
                    for name, value in _measured(model, tokens, metrics).items():
                        values[name][i, j] = value
                bar.update()
    coords: Coords = {"source": list(of_sources), "layer": [layers[0] for layers in windows]}
    attributes: dict[str, str | int] = {"targets": str(targets), "window": window, "stride": stride, "decay": decay}
    attributes["examples"] = len(tokens)
    arrays = {}
    for name, value in values.items():
        shown, dims = (value.mean(-1), coords) if reduce == "mean" else (value, {**coords, "example": len(tokens)})
        mean = float(baselines[name].double().mean())
        array = labelled(shown, model, dims, name, metric=name, baseline=mean, **attributes)
        arrays[name] = array.assign_coords(last_layer=("layer", [layers[-1] for layers in windows]))
    by_example = {f"{name}_baseline": ("example", value.numpy()) for name, value in baselines.items()}
    if isinstance(metric, Mapping):
        extra = {} if reduce == "mean" else by_example
        return Dataset({**arrays, **extra}, attrs=attributes | provenance(model))
    (array,) = arrays.values()
    return array if reduce == "mean" else array.assign_coords(by_example)


def _measured(
    model: HookedMamba, tokens: Int[Tensor, "batch pos"], metrics: Metrics
) -> dict[str, Float[Tensor, " batch"]]:
    """Every metric of one run."""
    logits = model(tokens)
    return {name: checked(name, metric(logits), len(tokens)).cpu() for name, metric in metrics.items()}


def layer_windows(window: int, stride: int, n_layers: int) -> list[range]:
    """All windows of that many layers that are in the model, every `stride` layers from 0 on.

    Raises ValueError if there is none.
    """
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a number of layers, 1 or more, got {value!r}")
    if window > n_layers:
        raise ValueError(f"a window of {window} layers does not fit into the model's {n_layers}")
    return [range(first, first + window) for first in range(0, n_layers - window + 1, stride)]


def _labelled_sources(sources: Sources) -> dict[str, Where | None]:
    if not isinstance(sources, Mapping):
        if isinstance(sources, str) or not all(isinstance(name, str) for name in sources):
            raise ValueError(f"sources must be {{label: positions or roles}} or a list of roles, got {sources!r}")
        sources = {name: name for name in sources}
    if not sources:
        raise ValueError("sources is empty: name at least one")
    return dict(sources)
