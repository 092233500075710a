"""Figures of lenses and attributions show the numbers and words of their arrays."""

import numpy as np
import pytest
from tiny_models import hooked, random_tokens

from ssminterp.analysis import attribute_to_layers, attribute_to_sources, logit_lens, state_lens, top_tokens
from ssminterp.plots import attribution_bars, attribution_heatmap, lens_heatmap


def test_a_logit_lens_shows_the_best_word_of_each_cell() -> None:
    model, tokens = hooked(), random_tokens(1, 5)
    lens = logit_lens(model, tokens)
    figure = lens_heatmap(top_tokens(model, lens, k=3))
    best = lens.values[0].argmax(-1)
    np.testing.assert_array_equal(figure.data[0].text, best.astype(str))
    assert list(figure.data[0].y) == ["embed", "0", "1", "2"]
    assert figure.data[0].customdata[2][4].startswith(f"{best[2, 4]} ")


def test_a_state_lens_shows_words_by_rank() -> None:
    model, tokens = hooked(), random_tokens(1, 5)
    lens = state_lens(model, tokens, 1, positions=[2, 4])
    figure = lens_heatmap(top_tokens(model, lens, k=4), colour="logit")
    order = np.argsort(-lens.values[0], axis=-1)[:, :4].T
    np.testing.assert_array_equal(figure.data[0].text, order.astype(str))
    assert "state of layer 1, read at its own position" in figure.layout.title.text


def test_attributions_show_parts_and_total() -> None:
    model, tokens = hooked(), random_tokens(1, 5)
    layers = attribute_to_layers(model, tokens, 3, 4)
    figure = attribution_bars(layers)
    np.testing.assert_array_equal(figure.data[0].y, layers.values[0, 0])
    assert f"{float(layers.sum()):.2f} in all" in figure.layout.title.text
    sources = attribute_to_sources(model, tokens, 3, 4)
    np.testing.assert_array_equal(attribution_heatmap(sources).data[0].z, sources.values[0, :, 0])


def test_what_cannot_be_shown_is_refused() -> None:
    model, tokens = hooked(), random_tokens(2, 5)
    top = top_tokens(model, logit_lens(model, tokens), k=1)
    with pytest.raises(ValueError, match="holds 2 examples"):
        lens_heatmap(top)
    with pytest.raises(ValueError, match=r"the map shows \(layer, position, rank\)"):
        lens_heatmap(top.isel(batch=0, position=0))
    with pytest.raises(ValueError, match=r"the bars show \(component\)"):
        attribution_bars(attribute_to_layers(model, tokens, 3, positions=[0, 1]).isel(batch=0))
    with pytest.raises(ValueError, match=r"the map shows \(layer, source\)"):
        attribution_heatmap(attribute_to_sources(model, tokens, 3, targets=[1, 2]).isel(batch=0))
