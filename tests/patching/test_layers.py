"""Whole layers: the planted layer is the one that matters, the one that suffices, and the last to go."""

import numpy as np
import pytest
import torch
from planted import NAME_A, NAME_B, answer, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import ablate
from ssminterp.patching import ablate_layers, remove_layers, restore_layers


def third(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def fourth(logits: Tensor) -> Tensor:
    return logits[:, -1, 4]


def right(logits: Tensor) -> Tensor:
    return (answer(logits) > 1.0).float()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_planted_layer_is_found(layer: int) -> None:
    circuit = planted_circuit(layer=layer)
    clean, corrupted = (circuit.prompt(name, 3, 14) for name in (NAME_A, NAME_B))
    whole = float(answer(circuit.model(clean).detach()))
    for method, others in (("zero", None), ("mean", None), ("resample", corrupted)):
        found = ablate_layers(circuit.model, clean, answer, method=method, others=others, progress=False)["answer"]
        lost = found.attrs["baseline"] - found.values
        assert found.attrs["baseline"] == pytest.approx(whole, rel=1e-5)
        assert int(np.abs(lost).argmax()) == layer
        assert np.abs(np.delete(lost, layer)).max() < 0.05 * abs(lost[layer])
    steps = restore_layers(circuit.model, clean, corrupted, {"right": right, "answer": answer}, until=1.0)
    assert steps["layer"].tolist() == [-1, layer]
    assert steps["right"].tolist() == [0.0, 1.0]
    removed = remove_layers(circuit.model, clean, {"right": right, "answer": answer}, down_to=1.0)
    assert removed["layer"].tolist()[-1] == layer
    assert removed["right"].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_ablations_are_those_of_the_interventions() -> None:
    model, tokens, others = hooked(), random_tokens(3, 7, 1), random_tokens(3, 7, 2)
    metrics = {"third": third, "fourth": fourth}
    found = ablate_layers(model, tokens, metrics, "x", layers=[2, 0], progress=False)
    for layer in (0, 2):
        with model.intervene(ablate(f"blocks.{layer}.mixer.hook_x")), torch.no_grad():
            expected = fourth(model(tokens)).mean()
        assert found["fourth"].sel(layer=layer).item() == pytest.approx(float(expected), abs=1e-5)
    resampled = ablate_layers(
        model, tokens, third, "resid_pre", method="resample", others=others, layers=[0], progress=False
    )
    assert resampled["third"].item() == pytest.approx(float(third(model(others).detach()).mean()), abs=1e-4)
    one = ablate_layers(model, tokens[:1], third, method="position_mean", progress=False)
    np.testing.assert_allclose(one["third"], one["third"].attrs["baseline"], atol=1e-5)
    name = "blocks.1.hook_mixer_out"
    means = model.run_with_cache(tokens, name)[1][name].mean(0, keepdim=True).expand(3, -1, -1)
    of_means = ablate_layers(model, tokens, third, method="position_mean", layers=[1], progress=False)
    with torch.no_grad():
        expected = third(model.run_with_hooks(tokens, [(name, lambda tensor, hook: means)])).mean()
    assert of_means["third"].item() == pytest.approx(float(expected), abs=1e-5)
    same = ablate_layers(model, tokens, third, "y", method="resample", others=tokens, progress=False)
    np.testing.assert_allclose(same["third"], same["third"].attrs["baseline"], atol=1e-5)


def test_with_every_layer_given_back_the_run_is_the_clean_one() -> None:
    model, clean, corrupted = hooked(), random_tokens(2, 6, 1), random_tokens(2, 6, 2)
    steps = restore_layers(model, clean, corrupted, third, until=1e9)
    assert steps["step"].tolist() == [0, 1, 2, 3]
    assert sorted(steps["layer"]) == [-1, 0, 1, 2]
    assert steps["third"].iloc[-1] == pytest.approx(float(third(model(clean).detach()).mean()), abs=1e-5)
    assert len(restore_layers(model, clean, corrupted, third, until=1e9, at_most=1)) == 2
    assert len(restore_layers(model, clean, corrupted, third, until=-1e9)) == 1


def test_each_step_takes_the_best_layer_and_other_metrics_decide_between_equals() -> None:
    model, tokens = hooked(), random_tokens(2, 6, 1)

    def none(logits: Tensor) -> Tensor:
        return torch.zeros(len(logits))

    alone = ablate_layers(model, tokens, third, progress=False)["third"]
    steps = remove_layers(model, tokens, {"none": none, "third": third}, down_to=0.0, at_most=1)
    assert steps["layer"].iloc[1] == int(alone.values.argmax())
    assert steps["third"].iloc[1] == pytest.approx(float(alone.max()), abs=1e-5)


def test_bad_input_is_named(as_users_run_it: None) -> None:
    model, tokens = hooked(), random_tokens(2, 6)
    for arguments, message in (
        ({"method": "median"}, "method must be"),
        ({"method": "resample"}, "needs others"),
        ({"others": tokens}, "takes no others"),
        ({"hook": "stat"}, "short name"),
        ({"hook": "state"}, "positions"),
        ({"layers": [7]}, "layer"),
        ({"method": "resample", "others": tokens[:, 1:]}, "same shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate_layers(model, tokens, third, progress=False, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number per example"):
        restore_layers(model, tokens, tokens, lambda logits: logits, until=1.0)
