"""Norms, states and distances are those of the hooks, whatever the chunks; two texts part where their tokens do."""

import numpy as np
import pytest
import torch
from tiny_models import hooked, random_tokens

import ssminterp.analysis.states as states_module
from ssminterp import HookedMamba
from ssminterp.analysis import compare_states, state_lens, state_norms, state_words, states_at, top_tokens


@pytest.fixture(scope="module", params=["mamba", "falcon"])
def model(request: pytest.FixtureRequest) -> HookedMamba:
    return hooked(request.param)


@pytest.fixture(params=[2**23, 200])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunks")
def test_norms_and_states_are_those_of_the_hook(model: HookedMamba) -> None:
    tokens = random_tokens(2, 11)
    cache = model.run_with_cache(tokens, "*hook_state")[1]
    norms = state_norms(model, tokens)
    assert norms.dims == ("batch", "layer", "position")
    for layer in range(model.cfg.n_layers):
        np.testing.assert_allclose(norms.sel(layer=layer), cache["state", layer].flatten(2).norm(dim=-1), rtol=1e-5)
    found = states_at(model, tokens, 1, [9, 0, 4])
    np.testing.assert_allclose(found.values, cache["state", 1][:, [9, 0, 4]], rtol=1e-4, atol=1e-6)
    assert [label.split()[0] for label in found["position"].values] == ["9", "0", "4"]


@pytest.mark.usefixtures("chunks")
def test_texts_part_where_their_tokens_do(model: HookedMamba) -> None:
    first, second = random_tokens(1, 9), random_tokens(1, 12)
    second[0, :5] = first[0, :5]
    second[0, 5] = first[0, 5] % 21 + 1
    found = compare_states(model, first, second, layers=[2, 0])
    assert found.attrs["parts_at"] == 5
    assert found.sizes == {"layer": 2, "position": 9}
    np.testing.assert_allclose(found["distance"][:, :5], 0.0, atol=1e-6)
    assert (found["distance"][:, 5:] > 1e-4).all()
    a, b = (model.run_with_cache(t, "*hook_state")[1]["state", 2][0, :9].flatten(1) for t in (first, second))
    expected = (a - b).norm(dim=-1) / ((a.norm(dim=-1) + b.norm(dim=-1)) / 2)
    np.testing.assert_allclose(found["distance"].sel(layer=2), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["norm_second"].sel(layer=2), b.norm(dim=-1), rtol=1e-5)


def test_words_are_those_of_every_layers_lens(model: HookedMamba) -> None:
    tokens = random_tokens(2, 7)
    found = state_words(model, tokens, 4, read_at=6, k=3)
    assert found.sizes == {"batch": 2, "layer": 3, "rank": 3}
    for layer in range(3):
        one = top_tokens(model, state_lens(model, tokens, layer, 4, read_at=6), 3).isel(position=0)
        np.testing.assert_array_equal(found["token"].sel(layer=layer), one["token"])
        np.testing.assert_allclose(found["logit"].sel(layer=layer), one["logit"], rtol=1e-4, atol=1e-5)
    assert found["position"].item().startswith("4 ")


def test_the_same_text_does_not_part(model: HookedMamba) -> None:
    tokens = random_tokens(1, 6)
    found = compare_states(model, tokens, tokens)
    assert found.attrs["parts_at"] == 6
    np.testing.assert_array_equal(found["distance"].values, 0.0)


def test_what_cannot_be_answered_is_refused(as_users_run_it: None) -> None:
    model, tokens = hooked(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist"):
        state_norms(model, tokens, 7)
    with pytest.raises(ValueError, match=r"positions \[6\] are out of range"):
        states_at(model, tokens, 0, 6)
    with pytest.raises(ValueError, match=r"two texts are compared, got \[1, 2\]"):
        compare_states(model, tokens, random_tokens(2, 6))
    with (
        model.hooks([("blocks.1.mixer.hook_state", lambda h, hook: torch.zeros_like(h), [2])]),
        pytest.raises(ValueError, match=r"hook functions change blocks\.1\.mixer\.hook_state"),
    ):
        state_norms(model, tokens)
