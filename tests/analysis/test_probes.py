"""Probes find what is there, hold out what they are scored on, and are held against a control task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from planted import NAME_A, NAME_B, answer, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import ActivationCache, steer
from ssminterp.analysis import class_direction, probe

MODEL = hooked()
N, D = 120, MODEL.cfg.d_model
LABELS = torch.arange(N) % 2
TYPES = torch.arange(N) % 20
HOOK = "blocks.1.hook_resid_pre"


def cache_of(values: Tensor) -> ActivationCache:
    """A run in which resid_pre of layer 1 held these values [batch, pos, d_model]."""
    return ActivationCache({HOOK: values}, random_tokens(*values.shape[:2]), MODEL.cfg.model_name)


def scores(values: Tensor, **options: Any) -> dict[str, float]:
    arguments: dict[str, Any] = {"labels": LABELS, "types": TYPES, "layers": 1, "progress": False} | options
    found = probe(MODEL, cache_of(values[:, None]), "resid_pre", **arguments)
    assert found["accuracy"].dims == ("hook", "layer", "position")
    return {str(name): value.item() for name, value in found.items()} | found.attrs


@pytest.mark.parametrize("method", ["logistic", "means"])
def test_a_class_that_is_written_is_read_and_noise_is_not(method: str) -> None:
    noise = torch.randn(N, D)
    found = scores(noise + 6.0 * LABELS[:, None] * torch.eye(D)[2], method=method)
    assert found["accuracy"] > 0.97
    assert found["selectivity"] > 0.3
    assert found["chance"] == 0.5
    assert scores(noise, method=method)["accuracy"] < 0.65


def test_scores_are_of_examples_held_out() -> None:
    """More dimensions than examples: everything can be learned by heart, and nothing is known."""
    model = hooked(hidden_size=160)
    cache = ActivationCache({HOOK: torch.randn(N, 1, 160)}, random_tokens(N, 1), model.cfg.model_name)
    found = probe(model, cache, "resid_pre", LABELS, types=None, layers=1, progress=False)
    assert found["train_accuracy"].item() == 1.0
    assert 0.3 < found["accuracy"].item() < 0.7
    assert set(found) == {"accuracy", "train_accuracy"}
    assert found.attrs["controls"] == 0


def test_a_probe_that_knows_types_by_heart_is_not_selective() -> None:
    model = hooked(hidden_size=20)
    values = torch.eye(20)[TYPES][:, None] + 0.01 * torch.randn(N, 1, 20)
    cache = ActivationCache({HOOK: values}, random_tokens(N, 1), model.cfg.model_name)
    found = probe(model, cache, "resid_pre", TYPES % 2, types=TYPES, layers=1, progress=False)
    assert found["accuracy"].item() == found["control_accuracy"].item() == 1.0
    assert found["selectivity"].item() == 0.0


def test_nearest_means_by_hand() -> None:
    values, labels = torch.randn(N, D).double(), torch.arange(N) % 3
    values[:, 1] += labels
    folds = probe(
        MODEL, cache_of(values[:, None]), "resid_pre", labels, types=None, method="means", layers=1, progress=False
    )
    from sklearn.model_selection import StratifiedKFold

    right = []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(values, labels):
        means = torch.stack([values[train][labels[train] == k].mean(0) for k in range(3)])
        right.append(torch.cdist(values[test], means).argmin(1) == labels[test])
    assert folds["accuracy"].item() == pytest.approx(float(torch.cat(right).double().mean()))
    assert folds.attrs["classes"] == ["0", "1", "2"]


def test_every_hook_layer_and_role_is_probed_at_its_place() -> None:
    tokens = random_tokens(40, 6)
    roles = {"mark": torch.arange(40) % 4, "end": torch.full((40,), 5)}
    tokens[torch.arange(40), roles["mark"]] = 1 + torch.arange(40) % 2
    labels = ["one" if i % 2 == 0 else "two" for i in range(40)]
    arguments: dict[str, Any] = {"types": None, "positions": roles, "folds": 4, "progress": False}
    found = probe(MODEL, tokens, ["in_x", "state", "resid_post"], labels, layers=[2, 0], **arguments)
    assert found["accuracy"].shape == (3, 2, 2)
    assert found["position"].values.tolist() == ["mark", "end"]
    assert found["layer"].values.tolist() == [2, 0]
    np.testing.assert_array_equal(found["accuracy"].sel(hook="in_x", layer=0, position="mark"), 1.0)
    cache = MODEL.run_with_cache(tokens, ["*hook_in_x", "*hook_state", "*resid_post"])[1]
    again = probe(MODEL, cache, ["in_x", "state", "resid_post"], labels, layers=[2, 0], **arguments)
    xr.testing.assert_allclose(again, found, atol=0.05)


def test_chunks_of_examples_and_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssminterp.analysis import activations

    tokens, labels = random_tokens(30, 5), torch.arange(30) % 2
    arguments: dict[str, Any] = {"types": None, "positions": [1, 4], "progress": False}
    whole = probe(MODEL, tokens, ["x", "B"], labels, **arguments)
    monkeypatch.setattr(activations, "MAX_LOGITS", 7 * 5 * MODEL.cfg.vocab)
    monkeypatch.setattr(activations, "free_bytes", lambda device: 1)
    xr.testing.assert_allclose(probe(MODEL, tokens, ["x", "B"], labels, **arguments), whole)


@pytest.mark.parametrize("method", ["logistic", "means"])
def test_a_direction_tells_the_classes_apart(method: str) -> None:
    values = torch.randn(N, D) * torch.logspace(-1, 1, D)
    values[:, 3] += 3.0 * values.std(0)[3] * LABELS
    cache = cache_of(torch.stack([torch.randn(N, D), values], 1))
    found = class_direction(MODEL, cache, HOOK, LABELS, 1, method=method)
    assert found.dims == ("d_model",)
    assert (found.attrs["first"], found.attrs["second"], found.attrs["hook"]) == ("0", "1", HOOK)
    along = values @ torch.from_numpy(found.values)
    if method == "means":
        expected = values[LABELS == 1].mean(0) - values[LABELS == 0].mean(0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        middle = (along[LABELS == 0].mean() + along[LABELS == 1].mean()) / 2
        assert ((along > middle) == LABELS.bool()).float().mean() > 0.9
    swapped = class_direction(MODEL, cache, HOOK, 1 - LABELS, 1, method=method)
    np.testing.assert_allclose(swapped, -found, rtol=1e-3, atol=1e-4)


def test_directions_have_the_axes_of_their_hook() -> None:
    tokens = random_tokens(12, 5)
    found = class_direction(MODEL, tokens, "blocks.1.mixer.hook_state", torch.arange(12) % 2, 3)
    assert found.dims == ("channel", "coordinate")
    states = MODEL.run_with_cache(tokens, "blocks.1.mixer.hook_state")[1]["state", 1][:, 3]
    np.testing.assert_allclose(found, states[1::2].mean(0) - states[::2].mean(0), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_direction_of_a_planted_answer_steers_it() -> None:
    circuit = planted_circuit()
    names = [NAME_A, NAME_B] * 10
    tokens = torch.cat([circuit.prompt(name, 2 + i % 3, 10, seed=i) for i, name in enumerate(names)])
    name = f"blocks.{circuit.layer}.hook_resid_post"
    direction = torch.from_numpy(class_direction(circuit.model, tokens, name, names, -1).values)
    plain = answer(circuit.model(tokens))
    with circuit.model.intervene(steer(name, direction, positions=-1)):
        assert (answer(circuit.model(tokens))[::2] < 0).all()
    with circuit.model.intervene(steer(name, -direction, positions=-1)):
        assert (answer(circuit.model(tokens))[1::2] > 0).all()
    assert (plain[::2] > 0).all()
    assert (plain[1::2] < 0).all()


@torch.no_grad()
def test_the_name_of_a_planted_circuit_is_read_where_it_stands() -> None:
    circuit = planted_circuit()
    names = [NAME_A, NAME_B] * 15
    tokens = torch.cat([circuit.prompt(name, 2, 10, seed=i) for i, name in enumerate(names)])
    found = probe(circuit.model, tokens, "resid_pre", names, types=None, layers=0, positions=[1, 2, -1], progress=False)
    before, at, query = found["accuracy"].values.ravel()
    assert at == 1.0
    # Fillers are the same for both names of no pair; the query is the same token everywhere.
    assert before < 0.8
    assert query <= 0.5


def test_results_travel_as_netcdf(tmp_path: Path) -> None:
    tokens, labels = random_tokens(20, 5), torch.arange(20) % 2
    found = probe(MODEL, tokens, "x", labels, types=torch.arange(20) // 2 % 5, progress=False)
    found.to_netcdf(tmp_path / "probe.nc")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "probe.nc"), found)
    direction = class_direction(MODEL, tokens, "hook_embed", labels, 2)
    direction.to_netcdf(tmp_path / "direction.nc")
    xr.testing.assert_identical(xr.load_dataarray(tmp_path / "direction.nc"), direction)


RUN = cache_of(torch.randn(N, 2, D))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.ones(N)}, "a probe needs two classes or more, all 120 labels are"),
        ({"labels": [0, 1]}, r"labels must be one for each of the 120 examples, got shape \[2\]"),
        ({"labels": [0] * (N - 2) + [1, 1]}, "class 1 has 2 examples, fewer than the 5 folds"),
        ({"folds": 1}, "folds must be 2 or more, got 1"),
        ({"types": torch.zeros(N)}, "types holds 1 types in 120 examples, too few"),
        ({"types": torch.zeros(4)}, "types must be one for each of the 120 examples"),
        ({"controls": 0}, "controls must be a number of control tasks, 1 or more"),
        ({"method": "svm"}, "there is no direction or probe 'svm': choose from logistic, means"),
        ({"hooks": "resid_prr"}, "no hook has the short name 'resid_prr'"),
        ({"hooks": "embed"}, "belong to no layer"),
        ({"layers": 7}, r"layers \[7\] do not exist"),
        ({"layers": 0}, "the cache lacks blocks.0.hook_resid_pre"),
        ({"positions": 2}, r"positions \[2\] are out of range"),
        ({"positions": {"late": torch.full((N,), 2)}}, r"positions \[2\] are out of range"),
        ({"positions": {"few": torch.zeros(3)}}, "has positions of shape"),
    ],
)
def test_what_cannot_be_probed_is_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"hooks": "resid_pre", "labels": LABELS, "types": TYPES, "layers": 1} | options
    with pytest.raises(ValueError, match=message):
        probe(MODEL, RUN, progress=False, **arguments)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "blocks.*.hook_resid_pre"}, "a direction is taken at one hook"),
        ({"name": "blocks.9.hook_resid_pre"}, "no hook is called"),
        ({"labels": torch.arange(N) % 3}, "a direction leads from one class to another: labels hold 3"),
        ({"labels": torch.ones(N)}, "labels hold 1"),
        ({"position": [0, 1]}, "a direction is taken at one place of each example"),
        ({"method": "median"}, "there is no direction or probe 'median'"),
    ],
)
def test_directions_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_direction(MODEL, RUN, **{"name": HOOK, "labels": LABELS, "position": 1} | options)
