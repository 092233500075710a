"""Attribution patching: what a patch would do, estimated for every place at once from one gradient.

    effect of patching hook a ≈ Σ dMetric/da · (a in the source run − a in the base run)

to first order around the base run (Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv:2310.10348; Kramár
et al. 2024, arXiv:2403.00745, section 2). The gradient of a state is its adjoint dMetric/dh_t, direct and through all
later states, since an exact patch of the state propagates too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from xarray import DataArray

from ssminterp.models import HookedMamba
from ssminterp.models.hook_points import HookSpec
from ssminterp.models.hooked_mamba import Input
from ssminterp.models.memory import free_bytes, recording_bytes
from ssminterp.models.mixers.state_hook import StateHookPoint
from ssminterp.patching.columns import SweepPositions, sweep_columns
from ssminterp.patching.contraction import AttributionTask, Contraction
from ssminterp.patching.effects import By, kept_axes, labelled_effects
from ssminterp.patching.gradients import Receive, Recording, Run, gradient_run, recorded_run
from ssminterp.patching.metrics import Metric, checked
from ssminterp.patching.request import (
    DIRECTIONS,
    Direction,
    Sweep,
    as_metrics,
    check_choice,
    sweep_specs,
    sweep_tokens,
)
from ssminterp.patching.results import Baselines
from ssminterp.patching.selections import Selection
from ssminterp.patching.state_scans import examples_of_scan, scan_inputs, scan_suffices

# Tensors of the recording's size that are alive at once: both runs' values or their difference, the zeros of the
# states, and as much again for what the backward pass holds of a layer.
COPIES = 4
# By stages, of what the scans of all layers behind the lowest one take in: that of both runs, and as much for the rest.
COPIES_BY_STAGES = 5

# How many tokens a GPU computes, forwards and backwards, while they are launched: in float32, and in half precision.
LAUNCHED_TOKENS = (512, 4096)


def attribution_patch(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    hooks: str | Sequence[str],
    metric: Metric,
    layers: Sequence[int] | None = None,
    positions: SweepPositions = None,
    *,
    direction: Direction = "clean_to_corrupted",
    steps: int | None = None,
    reduce: Literal["mean"] | None = "mean",
    by: By = "position",
) -> DataArray:
    """The change of the metric that patching each hook, layer and position would make, estimated by gradients.

    Takes two forward passes and one backward for everything together (as often as groups of layers are needed to
    fit in memory), where `patch_sweep` takes a run for every cell. Short runs on a GPU are made together, as one of
    twice the batch, if nothing is attached to the model; and states alone, of Mamba-1, without autograd.

    clean, corrupted, hooks, layers, positions: as in `patch_sweep`.
    metric: logits [batch, pos, vocab] to one number per example, [batch], differentiable, each example by itself.
    direction: "clean_to_corrupted" estimates patches of the clean run's values (the source) into the corrupted run
        (the base), "corrupted_to_clean" the other way round.
    steps: None takes the gradient in the base run. A number takes integrated gradients: the mean gradient at that
        many points of the straight line between the embeddings of the two runs (its midpoints, (k - 1/2) / steps),
        each one a forward and a backward. This is EAP-IG's choice (Hanna et al. 2024, arXiv:2403.17806, section 3).
        At the input itself (`resid_pre` of layer 0) the attributions of all positions then sum to the difference
        between the two runs, as steps grow (completeness: Sundararajan et al. 2017, arXiv:1703.01365, section 3);
        at other hooks, whose values do not move on a straight line, there is no such law.
    reduce: "mean" over examples, or None to keep them apart.
    by: "position" sums over all features of a hook. "channel" keeps its d_model or d_inner axis apart, "state" also
        its d_state axis (of B and C, which have no channels, d_state alone).

    Returns an array over (hook, layer, position[, channel][, coordinate][, example]). Its numbers are changes of the
    metric from the base run, and so are the attributes `clean` and `corrupted`; `baseline` is the metric of the base
    run. What is kept apart sums to what is not: the channels of a position to the position.

    Raises ValueError, before any gradient is taken, for what `patch_sweep` refuses, hooks without the axis that `by`
    names or with different ones, and a metric without gradient.

    >>> effects = attribution_patch(model, batch.clean, batch.corrupted, ["state", "x"],
    ...                             batch.metric("logit_diff"), positions=batch.roles)  # doctest: +SKIP
    """
    check_choice("direction", direction, DIRECTIONS)
    check_choice("reduce", reduce, ("mean", None))
    check_choice("by", by, get_args(By))
    check_steps(steps)
    sides = sweep_tokens(model, clean, corrupted)
    source, base = sides if direction == "clean_to_corrupted" else (sides[1], sides[0])
    specs = sweep_specs(model, hooks)
    axes = kept_axes(specs, by)
    rows = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    _check_rows(model, rows)
    columns = sweep_columns(model, base, positions)
    sweep = Sweep(model, source, base, specs, rows, columns, [Selection()], "patch")
    task = AttributionTask(sweep, *single_metric(metric), steps, reduce, by)
    found: dict[str, Tensor] = {}
    metrics: Baselines = {}
    if _by_stages(task):
        from ssminterp.patching.attribution_stages import attribute_by_stages  # Triton may not be installed

        metrics = attribute_by_stages(task, rows, found)
    else:
        for group in _groups(task):
            metrics = _attribute(task, group, found)
    values = torch.stack([_on_cpu([found[spec.name(row)] for row in rows]) for spec in specs])
    _check_finite(values, specs)
    method = "attribution" if steps is None else f"attribution, EAP-IG in {steps} steps"
    return labelled_effects(values, axes, metrics, sweep, direction, method, task.metric_name, reduce)


def _attribute(task: AttributionTask, layers: Sequence[int], found: dict[str, Tensor]) -> Baselines:
    """Put the attributions of some layers' hooks into `found`, by name. Returns the metric of both runs."""
    model, source, base = task.sweep.model, task.sweep.source, task.sweep.base
    metric = (task.metric_name, task.metric)
    recording = _recording(task, layers)
    taps = list(recording.points)
    if _runs_together(task):
        return _attribute_together(task, recording, found)
    of_source = recorded_run(model, source, recording, *metric)
    if task.steps is None:
        contractions: list[Contraction] = []

        def contraction_of(run: Run) -> Contraction:
            contractions.append(Contraction(task, of_source, run, found))
            return contractions[0]

        of_base = gradient_run(model, base, taps, task.needed, recording, *metric, contraction_of)
        contractions[0].finish()
        return {"source": of_source.metric, "base": of_base.metric}
    of_base = recorded_run(model, base, recording, *metric)
    contraction = Contraction(task, of_source, of_base, found)
    start, end = (_embedded(model, tokens) for tokens in (base, source))
    for step in range(task.steps):
        between = start.lerp(end, (step + 0.5) / task.steps)
        gradient_run(model, base, taps, task.needed, Recording(), *metric, lambda run: contraction, between)
        contraction.finish()
    return {"source": of_source.metric, "base": of_base.metric}


def _by_stages(task: AttributionTask) -> bool:
    """Whether all that is asked for are states of a model that autograd is not needed for, which takes longer to ask
    than a GPU to compute."""
    sweep, model = task.sweep, task.sweep.model
    if [spec.short for spec in sweep.specs] != ["state"] or not _states_by_scan(task):
        return False
    if not all(point.is_idle for point in model.hook_points.values()):
        return False
    kept = scan_inputs(model, range(min(sweep.layers), model.cfg.n_layers))
    if COPIES_BY_STAGES * recording_bytes(kept, model.cfg, sweep.batch, sweep.length) > free_bytes(model.device):
        return False
    from ssminterp.patching.attribution_stages import suits_stages  # Triton may not be installed

    return suits_stages(model)


def _runs_together(task: AttributionTask) -> bool:
    """Whether the two runs are one of twice the batch: on a GPU that has little to do, one of them costs what it takes
    to launch it. What is attached to hooks may be meant for one run's examples."""
    model, tokens = task.sweep.model, 2 * task.sweep.batch * task.sweep.length
    most = LAUNCHED_TOKENS[model.cfg.dtype.itemsize <= 2]
    if model.device.type != "cuda" or task.steps is not None or tokens > most:
        return False
    return all(point.is_idle for point in model.hook_points.values())


def _attribute_together(task: AttributionTask, recording: Recording, found: dict[str, Tensor]) -> Baselines:
    """As `_attribute`, of both runs in one."""
    n = task.sweep.batch
    contractions: list[Contraction] = []

    def metric_of_both(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        halves = (logits[:n].detach(), logits[n:])
        return torch.cat([checked(task.metric_name, task.metric(half), n) for half in halves])

    def contraction_of(run: Run) -> Receive:
        contractions.append(Contraction(task, *_halves(run, n), found))
        return lambda point, gradient: contractions[0](point, gradient[n:])

    both = torch.cat([task.sweep.source, task.sweep.base])
    points = list(recording.points)
    run = gradient_run(
        *(task.sweep.model, both, points, task.needed, recording, task.metric_name, metric_of_both, contraction_of)
    )
    contractions[0].finish()
    return {"source": run.metric[:n], "base": run.metric[n:]}


def _halves(run: Run, n: int) -> tuple[Run, Run]:
    """A run's first n examples, and the others."""
    first, second = (
        Run(
            run.metric[rows],
            {name: tensor[rows] for name, tensor in run.activations.items()},
            {name: tensor[rows] for name, tensor in run.whole.items()},
            {name: examples_of_scan(scan, rows) for name, scan in run.scans.items()},
        )
        for rows in (slice(0, n), slice(n, None))
    )
    run.activations.clear()
    return first, second


def _recording(task: AttributionTask, layers: Sequence[int]) -> Recording:
    """What is kept of both runs."""
    points = task.points(layers)
    if not _states_by_scan(task):
        return Recording(points, task.needed)
    others = [point for point in points if point.spec.short != "state"]
    return Recording(others, task.needed, scans=[point for point in points if isinstance(point, StateHookPoint)])


def _states_by_scan(task: AttributionTask) -> bool:
    """Whether the states' attributions are contracted in a kernel, on CUDA, where what that saves is worth it.

    Their adjoints must then be those of the base run, as they are without integrated gradients. Who asks for A_bar and
    B_bar as well gets trajectories anyway.
    """
    shorts = {spec.short for spec in task.sweep.specs}
    asked = "state" in shorts and shorts.isdisjoint({"A_bar", "B_bar"})
    on_gpu = task.sweep.model.device.type == "cuda"
    return asked and on_gpu and task.by != "state" and task.steps is None and scan_suffices(task.sweep.model)


def _on_cpu(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, stacked; in one copy if they are on one device."""
    if len({tensor.device for tensor in tensors}) == 1:
        return torch.stack(list(tensors)).cpu()
    return torch.stack([tensor.cpu() for tensor in tensors])


def _groups(task: AttributionTask) -> list[Sequence[int]]:
    """The layers in groups whose recordings and gradients fit in memory together; at least one layer each."""
    sweep, layers = task.sweep, task.sweep.layers
    recording = _recording(task, layers[:1])
    size = recording_bytes(recording.points, sweep.model.cfg, sweep.batch, len(recording.positions))
    if recording.scans:
        size += recording_bytes(scan_inputs(sweep.model, layers[:1]), sweep.model.cfg, sweep.batch, sweep.length)
    at_once = max(1, free_bytes(sweep.model.device) // (COPIES * size))
    return [layers[start : start + at_once] for start in range(0, len(layers), at_once)]


@torch.no_grad()
def _embedded(model: HookedMamba, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """What the model goes on with at `hook_embed`, interventions that are attached there included."""
    return model.lm.get_input_embeddings()(tokens)


def single_metric(metric: object) -> tuple[str, Metric]:
    metrics = as_metrics(metric)
    if len(metrics) > 1:
        raise ValueError(f"attribution takes one metric, since each needs its own backward; got {list(metrics)}")
    return next(iter(metrics.items()))


def check_steps(steps: int | None) -> None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be None or a positive number of points, got {steps!r}")


def _check_rows(model: HookedMamba, layers: Sequence[int]) -> None:
    model.check_layers(layers)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers must name at least one layer and none twice, got {list(layers)}")


def _check_finite(values: Float[Tensor, "hook layer ..."], specs: Sequence[HookSpec]) -> None:
    bad = [spec.short for spec, of_hook in zip(specs, values, strict=True) if not of_hook.isfinite().all()]
    if bad:
        raise ValueError(f"the attributions of {bad} are not finite: the gradient or an activation is NaN or infinite")
