"""States in traces: read and changed at single positions inside the scan, which goes on from what the trace leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, hooked
from torch import Tensor
from trace_cases import ROOTS, TOKENS

from ssminterp import HookedMamba, HookPoint, ablate, knockout, patch
from ssminterp.models.mixers import scans as scans_module

MODELS = {family: hooked(family) for family in FAMILIES}
LENGTH = TOKENS.shape[1]
NAME = "blocks.1.mixer.hook_state"


@pytest.fixture(params=ROOTS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def changed(state: Tensor, hook: HookPoint) -> Tensor:
    return state * 0.5 - 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_single_positions(way: str, family: str) -> None:
    model = MODELS[family]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        read = [root.blocks[layer].mixer.hook_state.at[p].output for layer in (0, 2) for p in (0, 3, 4, -1)].save()
        result = tracer.result.save()
    logits, cache = model.run_with_cache(TOKENS, "*hook_state")
    expected = [cache["state", layer][:, p] for layer in (0, 2) for p in (0, 3, 4, -1)]
    for got, want in zip(read, expected, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(result, logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [[0], [2, 5], [LENGTH - 1], list(range(LENGTH))], ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_change_reaches_later_states(way: str, family: str, positions: list[int], in_place: bool) -> None:
    model = MODELS[family]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        for p in positions:
            if in_place:
                root.blocks[1].mixer.hook_state.at[p].output.mul_(0.5).sub_(0.2)
            else:
                state = root.blocks[1].mixer.hook_state.at[p].output
                root.blocks[1].mixer.hook_state.at[p].output = state * 0.5 - 0.2
        after = root.blocks[1].mixer.hook_state.output.save()
        y = root.blocks[1].mixer.hook_y.output.save()
        result = tracer.result.save()
    with model.hooks([(NAME, changed, positions)]):
        logits, cache = model.run_with_cache(TOKENS, [NAME, "blocks.1.mixer.hook_y"])
    torch.testing.assert_close(after, cache[NAME])
    torch.testing.assert_close(y, cache["y", 1])
    torch.testing.assert_close(result, logits)
    assert (model(TOKENS) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("states", [[2, -1], 3, slice(1, 5), [5, 0, 4]], ids=str)
def test_named_positions_of_the_trajectory(states: Any) -> None:
    model = MODELS["mamba"]
    with model.trace(TOKENS, states=states):
        first = model.blocks[0].mixer.hook_state.output.save()
        model.blocks[1].mixer.hook_state.at[1].output[:] = 0
        single = model.blocks[1].mixer.hook_state.at[3].output.save()
        second = model.blocks[1].mixer.hook_state.output.save()
    with model.intervene(ablate(NAME, positions=1)):
        cache = model.run_with_cache(TOKENS, "*hook_state")[1]
    listed = [states] if isinstance(states, int) else states
    torch.testing.assert_close(first, cache["state", 0][:, listed])
    torch.testing.assert_close(second, cache["state", 1][:, listed])
    torch.testing.assert_close(single, cache["state", 1][:, 3])
    with model.trace(TOKENS):
        everything = model.blocks[0].mixer.hook_state.output.save()
    torch.testing.assert_close(everything, cache["state", 0])


@pytest.mark.parametrize("position", [0, 3, LENGTH - 1])
def test_gradients_are_adjoints(way: str, position: int) -> None:
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        state = root.blocks[1].mixer.hook_state.at[position].output
        loss = tracer.result.square().sum()
        with loss.backward():
            gradient = state.grad.save()
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: HookPoint) -> Tensor:
        kept.append(tensor * 1)
        return kept[0]

    loss = model.run_with_hooks(TOKENS, [(NAME, keep, [position])]).square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, kept[0])[0])
    assert gradient.abs().max() > 0


def test_interventions_come_before_the_trace() -> None:
    model = MODELS["mamba"]
    with model.intervene(patch(NAME, 2.0, positions=[1, 4]), ablate("*hook_x", positions=5)), model.trace(TOKENS):
        before = model.blocks[1].mixer.hook_state.at[1].output.clone().save()
        model.blocks[1].mixer.hook_state.at[1].output[:, 0] = 3.0
        fourth = model.blocks[1].mixer.hook_state.at[4].output.save()
        fifth = model.blocks[1].mixer.hook_state.at[5].output.save()
    assert (before == 2).all()
    assert (fourth == 2).all()
    assert not (fifth == 2).any()


def test_patching_one_prompt_with_the_states_of_another() -> None:
    model = MODELS["mamba"]
    clean, corrupted = TOKENS[:1], TOKENS[1:]
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(clean):
            donor = model.blocks[1].mixer.hook_state.at[3].output
            barrier()
        with tracer.invoke(corrupted):
            barrier()
            model.blocks[1].mixer.hook_state.at[3].output = donor
            patched = model.hook_logits.output.save()
        with tracer.invoke(corrupted):
            plain = model.hook_logits.output.save()
    with model.intervene(patch(NAME, model.run_with_cache(clean, NAME)[1], positions=3)):
        torch.testing.assert_close(patched, model(corrupted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, model(corrupted), atol=1e-4, rtol=1e-4)


def test_states_and_hooks_of_the_same_layer_in_order() -> None:
    """What a trace asks for after a state is computed, though nothing could foretell it."""
    model = MODELS["mamba"]
    shorts = ["delta", "C", "B_bar", "state", "y", "ssm_out", "gated"]
    expected = model.run_with_cache(TOKENS, "*")[1]
    for first in range(len(shorts)):
        for second in range(first + 1, len(shorts)):
            with model.trace(TOKENS):
                a = getattr(model.blocks[1].mixer, f"hook_{shorts[first]}").output.save()
                b = getattr(model.blocks[1].mixer, f"hook_{shorts[second]}").output.save()
            torch.testing.assert_close(a, expected[shorts[first], 1])
            torch.testing.assert_close(b, expected[shorts[second], 1])


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[dict[str, Any]] = []
    scan: Callable[..., Any] = scans_module.selective_scan

    def counted(*args: Any, **kwargs: Any) -> Any:
        scans.append(kwargs | {"length": args[0].shape[1]})
        return scan(*args, **kwargs)

    monkeypatch.setattr(scans_module, "selective_scan", counted)
    step: Callable[..., Any] = scans_module.selective_scan_step

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        scans.append(kwargs | {"length": 1, "states": None})
        return step(*args, **kwargs)

    monkeypatch.setattr(scans_module, "selective_scan_step", counted_step)
    model: HookedMamba = MODELS["mamba"]
    with model.trace(TOKENS, states=[4]):
        model.blocks[0].mixer.hook_delta.output.save()
        model.blocks[1].mixer.hook_state.output.save()
    assert [s["states"] for s in scans] == [None, (4,), None]
    assert [s["delta_softplus"] for s in scans] == [False, True, True]
    assert [s["z"] is None for s in scans] == [False, True, False]
    scans.clear()
    with model.trace(TOKENS):
        model.blocks[1].mixer.hook_state.at[3].output.save()
    assert [s["length"] for s in scans] == [LENGTH, 3, 1, 1, LENGTH - 4, LENGTH]
    assert all(s["states"] is None for s in scans)


def test_knockouts_and_traces() -> None:
    """A trace may read states of a layer in which reads are forbidden; what it changes there cannot be repeated."""
    model = MODELS["mamba"]
    forbid = knockout(sources=[1], targets=[4, 5], layers=1)
    with model.intervene(forbid):
        expected = model.run_with_cache(TOKENS, "*hook_y")[1]["y", 1]
        with model.trace(TOKENS):
            model.blocks[1].mixer.hook_state.at[2].output.save()
            y = model.blocks[1].mixer.hook_y.output.save()
        with pytest.raises(ValueError, match="a trace changed"), model.trace(TOKENS):
            model.blocks[1].mixer.hook_state.at[2].output[:] = 0
    torch.testing.assert_close(y, expected)
