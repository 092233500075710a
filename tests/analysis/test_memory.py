"""Half-lives, survival and shares agree with the states themselves, and find what was planted."""

import brute_force
import numpy as np
import pytest
import torch
from brute_force import quantities
from hypothesis import given
from hypothesis import strategies as st
from planted import NAME_A, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import HookedMamba, HookPoint
from ssminterp.analysis import half_lives, horizons, rank_channels, sinks, spectrum, state_shares, step_sizes, survival

LAYER = 1


@pytest.fixture(scope="module", params=["mamba", "falcon"])
def model(request: pytest.FixtureRequest) -> HookedMamba:
    return hooked(request.param)


def test_steps_and_decays_are_those_of_the_hooks(model: HookedMamba) -> None:
    tokens = random_tokens(2, 12)
    cache = model.run_with_cache(tokens, ["*hook_delta", "*hook_A_bar"])[1]
    found = step_sizes(model, tokens)
    for layer in range(model.cfg.n_layers):
        delta, decay = cache["delta", layer].double(), cache["A_bar", layer].double().flatten(2)
        expected = {"delta": delta.mean(-1), "delta_max": delta.amax(-1), "decay": decay.mean(-1)}
        for name, values in (expected | {"decay_min": decay.amin(-1)}).items():
            np.testing.assert_allclose(found[name].sel(layer=layer).values, values, rtol=1e-5)
    assert found["delta"].dims == ("batch", "layer", "position")
    rates = -torch.stack([block.mixer.A_log.detach() for block in model.blocks]).exp()
    np.testing.assert_allclose(spectrum(model).values, rates, rtol=1e-6)


def test_survival_is_the_product_of_decays(model: HookedMamba) -> None:
    tokens = random_tokens(2, 12)
    decays = model.run_with_cache(tokens, "*hook_A_bar")[1]["A_bar", LAYER]
    found = survival(model, tokens, LAYER, 3, targets=[11, 3, 5], channels=[4, 0])
    expected = torch.stack([decays[:, 4 : t + 1].prod(1) for t in (11, 3, 5)], dim=1)[:, :, [4, 0]]
    np.testing.assert_allclose(found.values, expected, rtol=2e-5)
    np.testing.assert_array_equal(found.values[:, 1], 1.0)


@given(st.integers(0, 5), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_survivals_along_the_way_multiply(seed: int, positions: list[int]) -> None:
    model, tokens = hooked(seed=seed), random_tokens(1, 10, seed)
    s, t, u = sorted(positions)
    whole = survival(model, tokens, LAYER, s, targets=u).values
    np.testing.assert_allclose(
        survival(model, tokens, LAYER, s, targets=t).values * survival(model, tokens, LAYER, t, targets=u).values,
        whole,
        rtol=1e-5,
    )


def test_shares_agree_with_brute_force_and_sum_to_one(model: HookedMamba) -> None:
    tokens = random_tokens(2, 40)
    q = quantities(model, model.run_with_cache(tokens)[1], LAYER)
    kept = [5, 1, 9]
    parts = brute_force.state_parts(q)[:, :, :, kept]
    norms = parts.flatten(3).norm(dim=-1)
    read = (parts * q["C"][:, :, None, None]).sum(-1)
    projected = torch.einsum("btsd,btd->bts", read, read.sum(2))
    for by, expected in (("norm", norms), ("read_out", projected)):
        found = state_shares(model, tokens, LAYER, by, channels=kept)
        np.testing.assert_allclose(found.sum("source"), 1.0, atol=1e-4)
        np.testing.assert_allclose(found.values, expected / expected.sum(-1, keepdim=True), atol=1e-4)
        some = state_shares(model, tokens, LAYER, by, channels=kept, targets=[30, 7])
        np.testing.assert_allclose(some.values, found.values[:, [30, 7], :31], atol=1e-5)


def test_horizons_are_those_of_the_slowest_coordinates(model: HookedMamba) -> None:
    tokens = random_tokens(1, 9)
    found = horizons(model, tokens, layers=[2, 0])
    assert found.dims == ("layer", "channel")
    for layer in (0, 2):
        expected = half_lives(model, tokens, layer)[0].max("coordinate")
        np.testing.assert_allclose(found.sel(layer=layer), expected, rtol=1e-5)
    best = rank_channels(model, tokens, n=1).iloc[0]
    assert float(horizons(model, tokens).max()) == pytest.approx(best["half_life"])


def test_a_planted_half_life_is_found() -> None:
    circuit = planted_circuit(layer=2, channel=4, coordinate=3, half_life=500.0)
    tokens = circuit.prompt(NAME_A, 2, 20)
    found = half_lives(circuit.model, tokens, 2, positions=slice(1, None))[0]
    assert float(found.sel(channel=4, coordinate=3)) == pytest.approx(500.0, rel=1e-4)
    first = rank_channels(circuit.model, tokens).iloc[0]
    assert (first["layer"], first["channel"], first["coordinate"]) == (2, 4, 3)
    assert first["half_life"] == pytest.approx(500.0, rel=1e-4)
    left = survival(circuit.model, tokens, 2, 2, channels=4)[0, :, 0, 3]
    np.testing.assert_allclose(left, 0.5 ** (np.arange(18) / 500.0), rtol=1e-5)


def test_what_the_planted_circuit_reads_at_the_query_is_the_name() -> None:
    circuit = planted_circuit()
    tokens = circuit.prompt(NAME_A, 3, 14)
    read = state_shares(circuit.model, tokens, 1, "read_out", channels=circuit.channel, targets=-1)[0, 0]
    assert read.values[3] == pytest.approx(1.0, abs=1e-5)
    assert np.abs(np.delete(read.values, 3)).max() < 1e-5


def test_a_planted_outlying_step_is_found_and_no_other() -> None:
    model, tokens = hooked(), random_tokens(2, 24)

    def stretch(delta: Tensor, hook: HookPoint) -> Tensor:
        delta[1, 9] *= 1e4
        return delta

    with model.hooks([("blocks.1.mixer.hook_delta", stretch)]):
        found = sinks(model, tokens, layers=1, threshold=20.0)
    assert found[["batch", "layer"]].to_numpy().tolist() == [[1, 1]]
    assert found["position"][0].startswith("9 ")
    assert found["score"][0] > 20


def test_where_all_steps_are_the_same_there_is_no_sink() -> None:
    model = hooked()
    with model.hooks([("*hook_delta", lambda delta, hook: torch.full_like(delta, 0.5))]):
        assert sinks(model, random_tokens(1, 8)).empty


def test_what_cannot_be_answered_is_refused(as_users_run_it: None) -> None:
    model, tokens = hooked(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"layers \[3\] do not exist: the model has 3"):
        step_sizes(model, tokens, layers=[0, 3])
    with pytest.raises(ValueError, match=r"targets \[2\] lie before every source; the first source is 4"):
        survival(model, tokens, 0, 4, targets=[2, 5])
    with pytest.raises(ValueError, match=r"positions \[6\] are out of range"):
        half_lives(model, tokens, 0, positions=6)
    with pytest.raises(ValueError, match=r"channels \[99\] do not exist"):
        state_shares(model, tokens, 0, channels=99)
    with pytest.raises(ValueError, match="by must be 'norm' or 'read_out', got 'size'"):
        state_shares(model, tokens, 0, "size")
    with pytest.raises(ValueError, match="threshold must be positive"):
        sinks(model, tokens, threshold=0.0)
    with pytest.raises(ValueError, match="the cache lacks blocks"):
        sinks(model, model.run_with_cache(tokens, "*hook_B")[1])
