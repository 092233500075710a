"""Direct logit attribution adds up exactly, and finds the planted layer, channel and source."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import NAME_A, NAME_B, PlantedCircuit, answer, planted_circuit
from tiny_models import VOCAB, hooked, random_tokens

from ssminterp import ablate
from ssminterp.analysis import (
    attribute_to_channels,
    attribute_to_layers,
    attribute_to_sources,
    logit_direction,
    token_contributions,
)
from ssminterp.checkpoints.vocabulary import build_tokenizer


@given(st.sampled_from(["mamba", "falcon"]), st.integers(2, 30), st.integers(0, 5))
def test_the_parts_add_up_to_the_logits(family: str, length: int, seed: int) -> None:
    model, tokens = hooked(family, seed), random_tokens(2, length, seed)
    logits, cache = model.run_with_cache(tokens)
    logits = logits.detach()
    right, wrong = torch.tensor([3, 8]), torch.tensor([11, 2])
    at = [length - 1, 0]
    rows = torch.arange(2)
    expected = torch.stack([logits[rows, p, right] - logits[rows, p, wrong] for p in at], dim=1)
    layers = attribute_to_layers(model, cache, right, wrong, positions=at)
    np.testing.assert_allclose(layers.sum("component"), expected, atol=1e-4)
    np.testing.assert_allclose(
        attribute_to_layers(model, tokens, 3, positions=at).sum("component"), logits[:, at, 3], atol=1e-4
    )
    by_layer = layers.sel(component=["0", "1", "2"]).values
    sources = attribute_to_sources(model, cache, right, wrong, targets=at)
    np.testing.assert_allclose(sources.sum("source").values, by_layer.swapaxes(1, 2), atol=1e-4)
    channels = attribute_to_channels(model, cache, right, wrong, positions=at)
    np.testing.assert_allclose(channels.sum("channel").values, by_layer.swapaxes(1, 2), atol=1e-4)


def test_parts_of_the_attribution() -> None:
    model, tokens = hooked(), random_tokens(2, 12)
    whole = attribute_to_sources(model, tokens, 3, 4)
    assert whole.dims == ("batch", "layer", "target", "source")
    some = attribute_to_sources(model, tokens, 3, 4, layers=[2, 0], sources=[7, 1], channels=[0, 5])
    rest = [c for c in range(model.cfg.d_inner) if c not in (0, 5)]
    others = attribute_to_sources(model, tokens, 3, 4, layers=[2, 0], sources=[7, 1], channels=rest)
    np.testing.assert_allclose((some + others).values, whole.values[:, [2, 0]][..., [7, 1]], atol=1e-5)
    direction = logit_direction(model, tokens, 3, 4)
    np.testing.assert_allclose(
        token_contributions(model, tokens, 1, direction, targets=-1, skip=True).values, whole.sel(layer=1), atol=1e-6
    )


CIRCUITS = [{}, {"layer": 0, "channel": 0, "coordinate": 0, "delay": 1}, {"layer": 2, "channel": 9, "delay": 2}]


@pytest.mark.parametrize("where", CIRCUITS, ids=str)
def test_the_planted_layer_channel_and_source_have_all_of_it(where: dict[str, int]) -> None:
    circuit: PlantedCircuit = planted_circuit(**where)
    tokens = circuit.prompt(NAME_B, 3, 14)
    expected = float(answer(circuit.model(tokens).detach()))
    assert expected < -0.5
    layers = attribute_to_layers(circuit.model, tokens, NAME_A, NAME_B)[0, 0]
    channels = attribute_to_channels(circuit.model, tokens, NAME_A, NAME_B)[0, :, 0]
    sources = attribute_to_sources(circuit.model, tokens, NAME_A, NAME_B)[0, :, 0]
    for values, place in (
        (layers.values, (circuit.layer + 1,)),
        (channels.values, (circuit.layer, circuit.channel)),
        (sources.values, (circuit.layer, 3 + circuit.delay)),
    ):
        assert values[place] == pytest.approx(expected, rel=1e-5)
        values[place] = 0.0
        np.testing.assert_allclose(values, 0.0, atol=1e-5)


def test_answers_by_text() -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    text = "Then, Shelby and Emma had fun at the school. Shelby gave an apple to"
    found = attribute_to_layers(model, text, " Emma", "Shelby")
    logits = model(text)[0, -1]
    right, wrong = (int(model.to_tokens(name)[0, 0]) for name in ("Emma", "Shelby"))
    assert float(found.sum()) == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-4)
    assert found.attrs["of"] == "logit of Emma - Shelby"
    assert found["position"].values.tolist() == ["15 to"]
    with pytest.raises(ValueError, match="'Emma Shelby' is 2 tokens"):
        attribute_to_layers(model, text, "Emma Shelby")
    with pytest.raises(ValueError, match="out of the tokenizer's vocabulary"):
        attribute_to_layers(model, text, "Quetzalcoatl")


def test_what_cannot_be_answered_is_refused() -> None:
    model, tokens = hooked(), random_tokens(2, 6)
    with pytest.raises(ValueError, match=rf"tokens \[{VOCAB}\] do not exist: the vocabulary has {VOCAB}"):
        attribute_to_layers(model, tokens, VOCAB)
    with pytest.raises(ValueError, match="3 tokens were given for a batch of 2"):
        attribute_to_channels(model, tokens, [1, 2, 3])
    with pytest.raises(ValueError, match="has no tokenizer"):
        attribute_to_layers(model, tokens, "Mary")
    with pytest.raises(ValueError, match=r"the same token in examples \[1\]"):
        attribute_to_layers(model, tokens, [1, 2], [3, 2])
    with pytest.raises(ValueError, match=r"layers \[-1\] do not exist"):
        attribute_to_sources(model, tokens, 1, layers=-1)
    with pytest.raises(ValueError, match=r"sources \[5\] lie after every target; the last target is 2"):
        attribute_to_sources(model, tokens, 1, targets=2, sources=5)
    with (
        model.intervene(ablate("blocks.1.hook_resid_post", positions=-1)),
        pytest.raises(ValueError, match="hook functions changed the residual stream"),
    ):
        attribute_to_layers(model, tokens, 1)
