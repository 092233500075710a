"""Asking for one hook does not cost what the others cost."""

from typing import Any

import pytest
import torch
from tiny_models import hooked, random_tokens

from ssminterp import ablate
from ssminterp.models.mixers import mamba1, scans

MODEL = hooked(num_hidden_layers=2)
TOKENS = random_tokens(2, 7)
CHEAP = [spec.short for spec in MODEL.hook_specs if not spec.on_demand]


class Calls:
    """What the mixers asked for: arguments of each scan, one-step ones included, how many of them were those, and how
    often the other costly parts were computed."""

    def __init__(self) -> None:
        self.scans: list[dict[str, Any]] = []
        self.steps = 0
        self.discretised = 0
        self.taps = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    scan, step = scans.selective_scan, scans.selective_scan_step
    discretised = mamba1.HookedMambaMixer._discretised_scan
    by_taps = mamba1.HookedMambaMixer._conv_by_taps

    def counted_scan(*args: Any, **kwargs: Any) -> Any:
        calls.scans.append(kwargs | {"length": args[0].shape[1]})
        return scan(*args, **kwargs)

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        calls.scans.append(kwargs | {"length": 1, "states": None})
        calls.steps += 1
        return step(*args, **kwargs)

    def counted_discretised(*args: Any) -> Any:
        calls.discretised += 1
        return discretised(*args)

    def counted_taps(*args: Any) -> Any:
        calls.taps += 1
        return by_taps(*args)

    monkeypatch.setattr(scans, "selective_scan", counted_scan)
    monkeypatch.setattr(scans, "selective_scan_step", counted_step)
    monkeypatch.setattr(mamba1.HookedMambaMixer, "_discretised_scan", counted_discretised)
    monkeypatch.setattr(mamba1.HookedMambaMixer, "_conv_by_taps", counted_taps)
    return calls


@pytest.mark.parametrize("short", [None, *CHEAP])
def test_cheap_hooks_compute_no_state(short: str | None, calls: Calls) -> None:
    if short is None:
        MODEL(TOKENS)
    else:
        MODEL.run_with_cache(TOKENS, f"*hook_{short}")
    assert [scan["states"] for scan in calls.scans] == [None, None]
    assert calls.discretised == calls.taps == 0
    # Softplus, D and the gate stay in the scan's kernel unless a hook wants what lies before or after them.
    assert all(scan["delta_softplus"] == (short != "delta") for scan in calls.scans)
    assert all((scan["z"] is not None) == (short not in ("y", "ssm_out")) for scan in calls.scans)


def test_a_hook_in_one_layer_costs_nothing_in_the_other(calls: Calls) -> None:
    MODEL.run_with_cache(TOKENS, ["blocks.0.mixer.hook_state", "blocks.0.mixer.hook_conv_taps"])
    assert [scan["states"] for scan in calls.scans] == ["all", None]
    assert calls.taps == 1
    MODEL.run_with_cache(TOKENS, "blocks.1.mixer.hook_A_bar")
    assert calls.discretised == 1
    assert len(calls.scans) == 3


def test_of_states_only_the_positions_asked_for_are_kept(calls: Calls) -> None:
    MODEL.run_with_cache(TOKENS, "*hook_state", positions=[5, 2])
    assert [scan["states"] for scan in calls.scans] == [(2, 5)] * 2


def test_affine_edits_ride_in_one_scan(calls: Calls) -> None:
    with MODEL.intervene(ablate("*hook_state", positions=[1, 4]), ablate("*hook_state", positions=2)):
        MODEL(TOKENS)
    assert [scan["edits"].positions for scan in calls.scans] == [(1, 2, 4)] * 2
    assert all(scan["states"] is None for scan in calls.scans)


def test_functions_cut_the_sequence_at_their_positions(calls: Calls) -> None:
    MODEL.run_with_hooks(TOKENS, [("blocks.0.mixer.hook_state", lambda state, hook: state * 0.5, [3])])
    assert [scan["length"] for scan in calls.scans] == [3, 1, 1, 3, 7]
    assert all(scan["states"] is None for scan in calls.scans)


def test_torch_hooks_count_as_listening(calls: Calls) -> None:
    """nnsight and others read through torch's own hooks."""
    point = MODEL.hook_points["blocks.0.mixer.hook_state"]
    shapes: list[torch.Size] = []
    for register in (
        lambda: point.register_forward_hook(lambda module, args, output: shapes.append(output.shape)),
        lambda: point.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape)),
    ):
        handle = register()
        try:
            MODEL(TOKENS)
        finally:
            handle.remove()
    assert shapes == [(2, 7, 16, 4)] * 2
    assert [scan["states"] for scan in calls.scans] == ["all", None] * 2
