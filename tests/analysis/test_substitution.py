"""Averages of tokens are averages, and exchanging them exchanges the token where a circuit reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from planted import NAME_A, NAME_B, PlantedCircuit, answer, planted_circuit
from tiny_models import hooked, random_tokens

from ssminterp import HookedMamba, HookPoint
from ssminterp.analysis import substitution_test, token_averages
from ssminterp.checkpoints.vocabulary import build_tokenizer

MODEL = hooked()


def prompts_of(circuit: PlantedCircuit, seeds: range) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts with either name at one of three places, and the role of the name."""
    places = torch.tensor([2 + seed % 3 for seed in seeds])
    names = [NAME_A if seed % 2 else NAME_B for seed in seeds]
    tokens = [circuit.prompt(name, int(at), 10, s) for name, at, s in zip(names, places, seeds, strict=True)]
    return torch.cat(tokens), {"name": places}


@pytest.mark.parametrize("hook", ["x", "state", "resid_pre"])
def test_averages_are_those_of_the_examples_that_have_the_token(hook: str) -> None:
    tokens, at = random_tokens(25, 6, vocab=5), {"a": torch.arange(25) % 4, "b": torch.full((25,), 1)}
    tokens[:, 1] = tokens[:, 1].clamp(max=3)
    found = token_averages(MODEL, tokens, at, hook, layers=[2, 0], offset=2, progress=False)
    cache = MODEL.run_with_cache(tokens, [f"*hook_{hook}"])[1]
    assert found.dims[:3] == ("layer", "position", "token")
    assert found["token_id"].values.tolist() == [1, 2, 3, 4]
    for layer in (2, 0):
        for role, places in at.items():
            for token in found["token_id"].values.tolist():
                rows = [i for i in range(25) if tokens[i, places[i]] == token]
                here = found.sel(layer=layer, position=role, token=str(token))
                assert here["count"] == len(rows)
                if rows:
                    expected = torch.stack([cache[hook, layer][i, places[i] + 2] for i in rows]).mean(0)
                    np.testing.assert_allclose(here, expected, rtol=1e-4, atol=1e-5)
                else:
                    assert (role, token) == ("b", 4)
                    assert np.isnan(here).all()


@torch.no_grad()
@pytest.mark.parametrize("delay", [0, 1])
def test_exchanged_averages_exchange_the_name_of_a_planted_circuit(delay: int) -> None:
    circuit = planted_circuit(delay=delay)
    tokens, roles = prompts_of(circuit, range(40))
    tests, at = prompts_of(circuit, range(100, 112))
    for offset in (0, 1):
        averages = token_averages(circuit.model, tokens, roles, offset=offset, progress=False)
        found = substitution_test(circuit.model, tests, averages, at, progress=False)
        assert found["becomes_new"].dims == ("layer", "position")
        assert found["replaced_becomes_new"].item() == 1.0
        expected = [float(layer == circuit.layer and offset == delay) for layer in range(circuit.model.cfg.n_layers)]
        for test in ("becomes_new", "as_if_replaced", "changes"):
            assert found[test].sel(position="name").values.tolist() == expected
    assert (answer(circuit.model(tests)).sign() == torch.tensor([-1, 1] * 6)).all()


@torch.no_grad()
def test_a_substitution_is_the_difference_added_at_its_place() -> None:
    tokens, at = random_tokens(30, 8, vocab=4), {"a": 1 + torch.arange(30) % 3}
    averages = token_averages(MODEL, tokens, at, layers=[1], progress=False)
    tests, ends = tokens[:6].clone(), torch.tensor([7, 6, 5, -1, -2, 7])
    places = at["a"][:6]
    tests[torch.arange(6), places] = 1
    new = [2, 3, 2, 3, 2, 3]
    found = substitution_test(
        MODEL, tests, averages, {"a": places}, new=new, ends=ends, among="vocab", reduce=None, progress=False
    )
    rows = torch.arange(6)

    def exchange(x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        of = averages.sel(layer=1, position="a")
        for i, token in enumerate(new):
            x[i, places[i] + 1] += torch.from_numpy((of.sel(token=str(token)) - of.sel(token="1")).values)
        return x

    before = MODEL(tests)[rows, ends]
    after = MODEL.run_with_hooks(tests, [("blocks.1.mixer.hook_x", exchange)])[rows, ends]
    replaced = tests.clone()
    replaced[rows, places] = torch.tensor(new)
    really = MODEL(replaced)[rows, ends].argmax(1)
    at_a = found.sel(layer=1, position="a")
    np.testing.assert_allclose(at_a["logit_diff"], after[rows, torch.tensor(new)] - after[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        at_a["logit_diff_before"], before[rows, torch.tensor(new)] - before[:, 1], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(at_a["becomes_new"], after.argmax(1) == torch.tensor(new))
    np.testing.assert_array_equal(at_a["as_if_replaced"], after.argmax(1) == really)
    np.testing.assert_array_equal(at_a["changes"], after.argmax(1) != before.argmax(1))
    np.testing.assert_array_equal(at_a["replaced_becomes_new"], really == torch.tensor(new))


def test_new_tokens_are_drawn_from_those_the_prompt_does_not_hold() -> None:
    tokens = random_tokens(60, 5, vocab=9)
    averages = token_averages(MODEL, tokens, [1, 3], layers=[0], progress=False)
    arguments: dict[str, Any] = {"reduce": None, "progress": False}
    first, again, other = (
        substitution_test(MODEL, tokens, averages, [1, 3], seed=seed, **arguments) for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    assert not np.array_equal(first["logit_diff"], other["logit_diff"])
    everything = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match=r"every token averaged at .* is in example 0"):
        substitution_test(MODEL, everything, averages, [1, 3], **arguments)


def test_labels_are_the_words_and_it_travels(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    texts = ["Emma gave an apple", "Shelby gave an apple", "Emma had an apple"]
    averages = token_averages(model, texts, 0, layers=2, progress=False)
    assert sorted(averages["token"].values.tolist()) == ["Emma", "Shelby"]
    assert averages.sel(token="Emma")["count"].item() == 2
    averages.to_netcdf(tmp_path / "averages.nc")
    opened = xr.load_dataarray(tmp_path / "averages.nc")
    xr.testing.assert_identical(opened, averages)
    found = substitution_test(model, texts[:1], opened, 0, new="Shelby", progress=False)
    found.to_netcdf(tmp_path / "found.nc")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "found.nc"), found)
    for new, message in (
        ("Angela", "'Angela' is to stand at"),
        ("Emma", "is the one at .* already"),
        ("Emm", "out of the tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            substitution_test(model, texts[:1], averages, 0, new=new, progress=False)
    with pytest.raises(ValueError, match=r"'Angela' stands at .* in example 0, and has no average there; averaged are"):
        substitution_test(model, ["Angela gave an apple"], averages, 0, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_averaged_or_substituted_is_refused() -> None:
    tokens, roles = random_tokens(60, 6, vocab=9), {"a": torch.arange(60) % 3}
    with pytest.raises(ValueError, match="2 after 'late' is position 6 in example 0, out of range"):
        token_averages(MODEL, tokens, {"late": torch.full((60,), 4)}, offset=2, progress=False)
    with pytest.raises(ValueError, match="no hook has the short name 'y_'"):
        token_averages(MODEL, tokens, roles, "y_", progress=False)
    averages = token_averages(MODEL, tokens, roles, layers=[1], progress=False)

    def refused(message: str, model: HookedMamba = MODEL, positions: Any = roles, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            substitution_test(model, tokens, averages, positions, progress=False, **options)

    refused("there are no averages for", positions={"b": roles["a"]})
    refused("2 positions were given, the averages have 1", positions=[0, 1])
    refused(r"positions \[9\] are out of range", ends=9)
    refused("among must be", among="names")
    refused("reduce must be", reduce="sum")
    refused("do not exist", new=99)
    refused("59 tokens were given for a batch of 60", new=[1] * 59)
    other = hooked(num_hidden_layers=1)
    refused(r"layers \[1\] do not exist", model=other)
    averages.attrs["model"] = "another"
    refused("the averages are of another")


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    tokens, roles = random_tokens(60, 9, vocab=20), {"a": torch.arange(60) % 5}
    found = []
    for model in (hooked(), hooked().to("cuda")):
        averages = token_averages(model, tokens, roles, progress=False)
        found.append((averages, substitution_test(model, tokens, averages, roles, progress=False)["logit_diff"]))
    for cpu, gpu in zip(*found, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-3, atol=1e-4)
