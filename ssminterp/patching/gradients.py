"""Gradients at hooks: of a metric, with respect to an additive edit at every hook point asked for, in one backward.

Gradients are taken as they pass the hook points; where nothing behind a tensor requires one, a zero that does is added.
At `hook_state` they are the adjoints dMetric/dh_t, direct and through all later states: there zeros are affine edits,
which go into one scan however many positions they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.hook_points import Recorder, Registered, attached
from ssminterp.models.mixers.scans import SelectiveScan
from ssminterp.models.mixers.state_hook import StateHookPoint
from ssminterp.models.mixers.state_scan import AffineStateHook
from ssminterp.patching.metrics import Metric, checked

# (hook point, gradient [batch, pos, *features]) -> None
Receive: TypeAlias = Callable[[HookPoint, Tensor], None]


class Recording(NamedTuple):
    """What to keep of a run: some hook points at some positions, others at all, and what the scans of some states take
    in."""

    points: Sequence[HookPoint] = ()
    positions: Sequence[int] = ()
    whole: Sequence[HookPoint] = ()
    scans: Sequence[StateHookPoint] = ()


class Run(NamedTuple):
    """The metric of a run, what its hook points held, {name: [batch, n_positions, *features]} and whole, and scans by
    the names of their states."""

    metric: Float[Tensor, " batch"]
    activations: dict[str, Tensor]
    whole: dict[str, Tensor]
    scans: dict[str, SelectiveScan]


@torch.no_grad()
def recorded_run(
    model: HookedMamba, tokens: Int[Tensor, "batch pos"], recording: Recording, metric_name: str, metric: Metric
) -> Run:
    """One forward. Raises ValueError if the metric is not one number per example, or the recording does not fit."""
    scans: dict[str, SelectiveScan] = {}

    def keep(point: StateHookPoint, scan: SelectiveScan, y: Tensor) -> Tensor:
        scans[point.name] = scan
        return y

    with _watched(recording.scans, keep):
        logits, activations, whole = _run(model, tokens, recording)
    return Run(checked(metric_name, metric(logits), len(tokens)), activations, whole, scans)


def _run(
    model: HookedMamba, tokens: Int[Tensor, "batch pos"], recording: Recording
) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, Tensor], dict[str, Tensor]]:
    """Logits, and what the recording asks for."""
    whole: dict[str, Tensor] = {}
    recorder = Recorder(whole)
    with attached([(point, recorder) for point in recording.whole]):
        if not recording.points:
            return model(tokens), {}, whole
        names = {point.name for point in recording.points}
        # Every position is recorded as it is; single ones are copied.
        everywhere = list(recording.positions) == list(range(tokens.shape[1]))
        positions = None if everywhere else list(recording.positions)
        logits, cache = model.run_with_cache(tokens, names.__contains__, positions=positions)
        return logits, dict(cache), whole


def gradient_run(
    model: HookedMamba,
    tokens: Int[Tensor, "batch pos"],
    points: Sequence[HookPoint],
    positions: Sequence[int],
    recording: Recording,
    metric_name: str,
    metric: Metric,
    receiver: Callable[[Run], Receive],
    embeddings: Float[Tensor, "batch pos d_model"] | None = None,
) -> Run:
    """One forward and one backward: `receiver(run)`, called in between, gives what every gradient is handed to.

    Gradients are [batch, pos, *features], those of states [batch, n_positions, d_inner, d_state] at the `positions`
    alone. Each is freed once it was received. Parameters get none. For a state whose scan is recorded, the gradient of
    the scan's output [batch, pos, d_inner] is received in its name.

    points: where gradients are taken; no state whose scan is recorded. embeddings: what to go on with at `hook_embed`
        instead of the tokens' own.

    Raises ValueError if the metric is not one number per example, or has no gradient.
    """
    receive: list[Receive] = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        if embeddings is not None:
            replacement = embeddings
            stack.enter_context(model.hooks([("hook_embed", lambda tensor, hook: replacement)]))

        def receive_one(point: HookPoint, gradient: Tensor) -> None:
            receive[0](point, gradient)

        zeros: list[Tensor] = []
        scans: dict[str, SelectiveScan] = {}

        def tap_scan(point: StateHookPoint, scan: SelectiveScan, y: Tensor) -> Tensor:
            scans[point.name] = scan
            return _tapped_tensor(y, point, receive_one, zeros)

        stack.enter_context(_tapped(model, len(tokens), points, positions, receive_one, zeros))
        stack.enter_context(_watched(recording.scans, tap_scan))
        logits, activations, whole = _run(model, tokens, recording)
        values = checked(metric_name, metric(logits), len(tokens))
        check_differentiable(metric_name, values)
        run = Run(values.detach(), activations, whole, scans)
        receive.append(receiver(run))
        try:
            torch.autograd.grad(values.sum(), zeros, allow_unused=True)
        finally:
            # The graph's hooks lead here, and what receives gradients may hold tensors of the graph.
            receive.clear()
    return run


def check_differentiable(metric_name: str, values: Float[Tensor, " batch"]) -> None:
    """Raises ValueError if a metric has no gradient."""
    if not values.requires_grad:
        raise ValueError(
            f"the metric {metric_name!r} has no gradient with respect to the logits: attribution needs one that "
            "is differentiable, logit_diff or kl say, not a count of right answers"
        )


@contextmanager
def _watched(
    points: Sequence[StateHookPoint], watcher: Callable[[StateHookPoint, SelectiveScan, Tensor], Tensor]
) -> Iterator[None]:
    """A context in which a watcher is called after the scans of these states."""
    for point in points:
        point.watchers.append(watcher)
    try:
        yield
    finally:
        for point in points:
            point.watchers.remove(watcher)


@contextmanager
def _tapped(
    model: HookedMamba,
    batch: int,
    points: Sequence[HookPoint],
    positions: Sequence[int],
    receive: Receive,
    zeros: list[Tensor],
) -> Iterator[None]:
    """A context in which the gradients of a run's tensors at the hook points are received. Fills `zeros`, in the run:
    what the metric is to be differentiated with respect to."""
    pairs: list[tuple[HookPoint, Registered]] = []
    for point in points:
        if point.spec.short == "state":
            taps = _state_taps(model, batch, point, positions, receive, zeros)
        else:
            taps = [Registered(lambda tensor, hook: _tapped_tensor(tensor, hook, receive, zeros), None)]
        pairs += [(point, tap) for tap in taps]
    # Attached directly: model.hooks would look up the name anew for every position of every state.
    with attached(pairs):
        yield


def _tapped_tensor(tensor: Tensor, hook: HookPoint, receive: Receive, zeros: list[Tensor]) -> Tensor:
    """The tensor, whose gradient is received. The first ones of a run have no graph behind them until a zero is added;
    neither has what an intervention puts in the place of what the model computed."""
    if not tensor.requires_grad:
        tensor = tensor + _expanded_zero(tensor.shape, tensor.dtype, tensor.device, zeros)
    tensor.register_hook(lambda gradient: receive(hook, gradient))
    return tensor


def _state_taps(
    model: HookedMamba,
    batch: int,
    point: HookPoint,
    positions: Sequence[int],
    receive: Receive,
    zeros: list[Tensor],
) -> list[Registered]:
    """One affine edit per position, all of them parts of one zero."""
    shape = (batch, len(positions), model.cfg.d_inner, model.cfg.d_state)
    dtype = torch.promote_types(model.lm.dtype, torch.float32)
    expanded = _expanded_zero(shape, dtype, model.device, zeros)
    expanded.register_hook(lambda gradient: receive(point, gradient))
    parts = zip(positions, expanded.unbind(1), strict=True)
    return [Registered(AffineStateHook(1.0, part), p) for p, part in parts]


def _expanded_zero(shape: Sequence[int], dtype: torch.dtype, device: torch.device, zeros: list[Tensor]) -> Tensor:
    """Zeros of a shape that take no memory; their gradient is that of the tensor they are added to."""
    zeros.append(torch.zeros((), dtype=dtype, device=device, requires_grad=True))
    return zeros[-1].expand(tuple(shape))


@contextmanager
def _frozen(model: HookedMamba) -> Iterator[None]:
    """A context in which no parameter requires a gradient, so that no graph is kept for them."""
    trained = [parameter for parameter in _parameters(model) if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and all modules in it. Of a thousand hook points, nn.Module's own way takes as long as
    a few layers of a run."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        if (one := waiting.pop()) is not None:
            yield from (parameter for parameter in one._parameters.values() if parameter is not None)
            waiting += one._modules.values()
