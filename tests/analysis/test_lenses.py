"""Lenses give the model's own logits where they must, and read the planted answer out of the state."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import NAME_A, NAME_B, planted_circuit
from tiny_models import VOCAB, hooked, hooked_pair, random_tokens
from torch.nn.functional import silu

from ssminterp import HookedMamba, ablate
from ssminterp.analysis import attribute_to_layers, lens_summary, logit_lens, state_lens, top_tokens
from ssminterp.checkpoints.vocabulary import build_tokenizer


@pytest.fixture(scope="module", params=["mamba", "falcon"])
def model(request: pytest.FixtureRequest) -> HookedMamba:
    return hooked(request.param)


def test_the_logit_lens_on_the_last_layer_is_the_model(model: HookedMamba) -> None:
    tokens = random_tokens(2, 9)
    logits = model(tokens).detach()
    found = logit_lens(model, tokens)
    assert found["layer"].values.tolist() == ["embed", "0", "1", "2"]
    np.testing.assert_allclose(found.sel(layer="2").values, logits, atol=1e-4)
    some = logit_lens(model, tokens, layers=[2, 0], positions=[-1, 3], vocab=[5, 1])
    np.testing.assert_allclose(some.values[:, 0], logits[:, [8, 3]][..., [5, 1]], atol=1e-4)
    np.testing.assert_allclose(some.values[:, 1], found.sel(layer="0").values[:, [8, 3]][..., [5, 1]], atol=1e-5)


@pytest.mark.parametrize("max_logits", [1, 500, 50_000_000])
def test_the_summary_is_the_best_tokens_of_the_whole_lens(max_logits: int, model: HookedMamba) -> None:
    """However few logits are held at once."""
    tokens = random_tokens(2, 9)
    found = lens_summary(model, tokens, k=3, max_logits=max_logits)
    expected = top_tokens(model, logit_lens(model, tokens), k=3)
    assert dict(found.sizes) == dict(expected.sizes)
    np.testing.assert_array_equal(found["position"], expected["position"])
    found = found.transpose(*expected["token"].dims)
    np.testing.assert_array_equal(found["token"], expected["token"])
    np.testing.assert_allclose(found["probability"], expected["probability"], rtol=1e-5)


@torch.no_grad()
def test_the_logit_lens_after_a_layer_is_the_model_that_ends_there() -> None:
    plain, model = hooked_pair()
    tokens = random_tokens(2, 9)
    found = logit_lens(model, tokens)
    for kept, row in ((2, "1"), (1, "0"), (0, "embed")):
        plain.backbone.layers = plain.backbone.layers[:kept]
        plain.config.num_hidden_layers = kept
        np.testing.assert_allclose(found.sel(layer=row).values, plain(tokens).logits, atol=1e-4)


@given(st.sampled_from(["mamba", "falcon"]), st.integers(1, 20), st.integers(0, 5))
def test_the_states_of_all_layers_and_the_embedding_sum_to_the_logits(family: str, length: int, seed: int) -> None:
    model, tokens = hooked(family, seed), random_tokens(2, length, seed)
    logits = model(tokens).detach()
    states = sum(state_lens(model, tokens, layer, positions=[0, -1][: min(length, 2)], skip=True) for layer in range(3))
    assert not isinstance(states, int)
    for token in (3, 11):
        embedding = attribute_to_layers(model, tokens, token, positions=-1).sel(component="embed")
        found = states.values[:, -1, token] + embedding.values[:, 0]
        np.testing.assert_allclose(found, logits[:, -1, token], atol=1e-3)


@torch.no_grad()
def test_a_state_read_from_another_position(model: HookedMamba) -> None:
    tokens = random_tokens(2, 12)
    cache = model.run_with_cache(tokens, ["*hook_state", "*hook_C", "*hook_gate", "*hook_resid_post"])[1]
    state, C, gate = (cache[short, 1].double() for short in ("state", "C", "gate"))
    y = torch.einsum("bn,bpdn->bpd", C[:, 10], state[:, [2, 5]])
    mixer_out = (y * silu(gate[:, None, 10])).float() @ model.blocks[1].mixer.out_proj.weight.T
    resid = cache["resid_post", 2][:, None, 10]
    scaled = mixer_out / (resid.pow(2).mean(-1, keepdim=True) + model.lm.backbone.norm_f.variance_epsilon).sqrt()
    expected = scaled * model.lm.backbone.norm_f.weight @ model.lm.lm_head.weight.T
    found = state_lens(model, tokens, 1, positions=[2, 5], read_at=10)
    np.testing.assert_allclose(found.values, expected, atol=1e-4)
    assert found.attrs["read_at"].startswith("10 ")


def test_the_planted_state_says_the_name_to_the_query_and_only_after_the_name() -> None:
    circuit = planted_circuit(delay=1)
    for name, other in ((NAME_A, NAME_B), (NAME_B, NAME_A)):
        tokens = circuit.prompt(name, 3, 14)
        lens = state_lens(circuit.model, tokens, circuit.layer, positions=slice(None), read_at=-1)[0]
        np.testing.assert_allclose(lens.values[:4, [name, other]], 0.0, atol=1e-6)
        assert (lens.values[4:, name] > 0.1).all()
        assert (lens.values[4:, other] < -0.1).all()
        own = state_lens(circuit.model, tokens, circuit.layer, positions=[5, 6, 7])[0]
        np.testing.assert_allclose(own.values[:, [name, other]], 0.0, atol=1e-6)


def test_top_tokens_are_named_and_ordered() -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    lens = logit_lens(model, "Emma gave an apple to", positions=[-1, 0])
    top = top_tokens(model, lens, k=3)
    assert top["token"].dims == ("batch", "layer", "position", "rank")
    best = int(lens.values[0, 2, 1].argmax())
    assert int(top["id"][0, 2, 1, 0]) == best
    assert str(top["token"][0, 2, 1, 0].item()) == model.to_str_tokens(torch.tensor([best]))[0]
    assert (np.diff(top["logit"].values, axis=-1) <= 0).all()
    softmax = torch.from_numpy(lens.values).softmax(-1).amax(-1)
    np.testing.assert_allclose(top["probability"].values[..., 0], softmax, rtol=1e-5)
    few = top_tokens(hooked(), logit_lens(hooked(), random_tokens(1, 3), vocab=[4, 7]), k=2)
    assert set(few["token"].values.ravel()) == {"4", "7"}


def test_what_cannot_be_answered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = hooked(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"layers \[5\] do not exist"):
        logit_lens(model, tokens, layers=5)
    with pytest.raises(ValueError, match=rf"tokens \[{VOCAB}\] do not exist: the vocabulary has {VOCAB}"):
        state_lens(model, tokens, 0, vocab=[VOCAB])
    with pytest.raises(ValueError, match="vocab is empty"):
        logit_lens(model, tokens, vocab=[])
    with pytest.raises(ValueError, match=r"positions \[9\] are out of range"):
        state_lens(model, tokens, 0, read_at=9)
    with (
        model.intervene(ablate("*hook_state", positions=[1])),
        pytest.raises(ValueError, match="hook functions change"),
    ):
        state_lens(model, tokens, 0)
    with pytest.raises(ValueError, match="k=99 tokens were asked for"):
        top_tokens(model, logit_lens(model, tokens), k=99)
    with pytest.raises(ValueError, match="none of them is vocab"):
        top_tokens(model, attribute_to_layers(model, tokens, 3))
    monkeypatch.setattr("ssminterp.analysis.lenses.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"batch 1 × 4 layers × 6 positions × 23 tokens need .* pass positions="):
        logit_lens(model, tokens)
