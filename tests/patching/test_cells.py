"""One cell from near: its logits are the sweep's, and what it changes is what a planted circuit holds."""

import numpy as np
import pytest
import torch
from planted import NAME_A, NAME_B, planted_circuit
from sweep_cases import HOOKS, metric_at
from tiny_models import hooked, random_tokens

from ssminterp import scale
from ssminterp.patching import (
    Steered,
    attribution_patch,
    cell_change,
    cell_logits,
    changed_tokens,
    patch_sweep,
    strongest_channels,
)


def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_tokens(2, 6, seed=1), random_tokens(2, 6, seed=2), torch.tensor([5, 3])


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("intervention", ["patch", "zero", "mean", scale("*", 0.5), Steered(2.0)])
def test_the_metric_of_a_cells_logits_is_the_sweeps(hook: str, intervention: object) -> None:
    model, (clean, corrupted, at) = hooked(), pair()
    options = {"direction": "corrupted_to_clean", "intervention": intervention}
    logits = cell_logits(model, clean, corrupted, hook, 1, 2, at, **options)
    metric = metric_at(at.tolist())
    sweep = patch_sweep(model, clean, corrupted, [hook], metric, [1], [2], reduce=None, progress=False, **options)
    of_cell = metric.at_end(torch.from_numpy(logits.sel(run="changed").values))
    np.testing.assert_allclose(of_cell, sweep.values.ravel(), atol=1e-4)
    for run in ("clean", "corrupted"):
        of_run = metric.at_end(torch.from_numpy(logits.sel(run=run).values))
        np.testing.assert_allclose(of_run, sweep[f"{run}_by_example"], atol=1e-5)


def test_steering_all_the_way_is_a_patch_and_scaling_by_one_is_nothing() -> None:
    model, (clean, corrupted, at) = hooked(), pair()
    cell = (model, clean, corrupted, "state", 1, 3, at)
    steered, patched = (cell_logits(*cell, intervention=i).sel(run="changed") for i in (Steered(1.0), "patch"))
    np.testing.assert_allclose(steered, patched, atol=1e-5)
    same = cell_logits(*cell, intervention=scale("*", 1.0))
    np.testing.assert_allclose(same.sel(run="changed"), same.sel(run="corrupted"), atol=1e-5)
    assert same.attrs["intervention"] == "scale('*', 1.0)"


def test_the_change_is_the_difference_of_the_runs() -> None:
    model, (clean, corrupted, _) = hooked(), pair()
    name = "blocks.1.mixer.hook_state"
    runs = [model.run_with_cache(tokens, name, positions=[3])[1][name][:, 0] for tokens in (clean, corrupted)]
    change = cell_change(model, clean, corrupted, "state", 1, 3)
    np.testing.assert_allclose(change, (runs[0] - runs[1]).abs().mean(0).detach(), atol=1e-5)
    halved = cell_change(model, clean, corrupted, "state", 1, 3, intervention=scale("*", 0.5))
    np.testing.assert_allclose(halved, runs[1].abs().mean(0).detach() / 2, atol=1e-5)


def test_changed_tokens_name_the_two_answers_of_a_planted_circuit() -> None:
    circuit = planted_circuit(layer=1, channel=5, coordinate=2)
    model, end = circuit.model, torch.tensor([7])
    prompts = circuit.prompt(NAME_A, 2, 8), circuit.prompt(NAME_B, 2, 8)
    at_the_circuit = changed_tokens(model, cell_logits(model, *prompts, "state", 1, 4, end), k=2)
    assert set(at_the_circuit["id"].values.tolist()) == {NAME_A, NAME_B}
    by_id = at_the_circuit.set_index(token="id")["change"]
    assert float(by_id.sel(token=NAME_A)) > 0 > float(by_id.sel(token=NAME_B))
    assert (
        abs(float(changed_tokens(model, cell_logits(model, *prompts, "state", 0, 4, end), k=2)["change"].max())) < 1e-3
    )


def test_the_strongest_channel_is_the_planted_one() -> None:
    circuit = planted_circuit(layer=1, channel=5, coordinate=2)
    prompts = circuit.prompt(NAME_A, 2, 8), circuit.prompt(NAME_B, 2, 8)
    metric = lambda logits: logits[:, -1, NAME_A] - logits[:, -1, NAME_B]  # noqa: E731
    effects = attribution_patch(circuit.model, *prompts, ["state"], metric, layers=[1], positions=[4], by="state")
    assert strongest_channels(effects, 1) == [5]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook": "stat"}, "short name"),
        ({"layer": 9}, "layer"),
        ({"position": 11}, "11"),
        ({"position": [1, 2]}, "one column"),
        ({"direction": "up"}, "direction must be"),
        ({"intervention": "swap"}, "intervention must be"),
    ],
)
def test_bad_cells_are_refused(change: dict, message: str) -> None:
    clean, corrupted, at = pair()
    arguments = {"hook": "state", "layer": 1, "position": 2} | change
    with pytest.raises(ValueError, match=message):
        cell_logits(hooked(), clean, corrupted, at=at, **arguments)


def test_bad_examples_and_counts_are_refused() -> None:
    clean, corrupted, at = pair()
    logits = cell_logits(hooked(), clean, corrupted, "x", 0, 1, at)
    with pytest.raises(ValueError, match="no example 2"):
        changed_tokens(hooked(), logits, example=2)
    with pytest.raises(ValueError, match="k=0"):
        changed_tokens(hooked(), logits, k=0)
    with pytest.raises(ValueError, match="none of them is channel"):
        strongest_channels(logits, 2)
