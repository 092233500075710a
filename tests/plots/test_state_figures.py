"""Figures of the state show the arrays' numbers, and refuse what they cannot show."""

import numpy as np
import pytest
from tiny_models import hooked, random_tokens

from ssminterp.analysis import compare_states, horizons, state_norms, state_shares, state_words, states_at
from ssminterp.plots import (
    clickable,
    compare_curves,
    contribution_heatmap,
    horizon_heatmap,
    norm_curve,
    norm_heatmap,
    state_heatmap,
    state_words_figure,
)


def test_sizes_are_shown_as_they_are() -> None:
    norms = state_norms(hooked(), random_tokens(1, 7))
    shown = norm_heatmap(norms).data[0]
    np.testing.assert_array_equal(shown.customdata, norms.values[0])
    np.testing.assert_allclose(shown.z.max(1), 1.0)
    np.testing.assert_array_equal(norm_curve(norms, 2).data[0].y, norms.values[0, 2])


def test_the_largest_channels_come_first_and_the_rest_is_said() -> None:
    state = states_at(hooked(), random_tokens(1, 7), 1, 6)[0, 0]
    shown = state_heatmap(state, n=5)
    largest = np.abs(shown.data[0].z).max(0)
    assert (np.diff(largest) <= 0).all()
    assert largest[0] == np.abs(state.values).max()
    np.testing.assert_array_equal(shown.data[0].z[:, 2], state.sel(channel=int(shown.data[0].x[2])).values)
    assert "5 of 16 channels" in shown.layout.title.text
    assert "100% of ‖h‖²" in state_heatmap(state).layout.title.text


def test_two_texts_and_where_they_part() -> None:
    first, second = random_tokens(1, 8), random_tokens(1, 8)
    second[0, 4:] = second[0, 4:] % 21 + 1
    compared = compare_states(hooked(), first, second)
    figure = compare_curves(compared, 1)
    np.testing.assert_array_equal(figure.data[2].y, compared["distance"].values[1])
    assert "they part at position 4" in figure.layout.title.text
    assert figure.layout.shapes[0].x0 == 3.5
    assert "the same tokens throughout" in compare_curves(compare_states(hooked(), first, first), 1).layout.title.text


def test_words_of_every_layer() -> None:
    words = state_words(hooked(), random_tokens(1, 6), 3, k=4)
    figure = state_words_figure(words)
    np.testing.assert_array_equal(figure.data[0].text, words["token"].values[0])
    np.testing.assert_array_equal(figure.data[0].z, words["logit"].values[0])
    assert "the state after 3 ?, read at its own position" in figure.layout.title.text
    with pytest.raises(ValueError, match=r"shown by \(layer, rank\)"):
        state_words_figure(words.isel(layer=0))


def test_horizons_are_ordered_within_layers_and_thinned_out_where_too_many() -> None:
    values = horizons(hooked(), random_tokens(1, 7))
    shown = horizon_heatmap(values)
    np.testing.assert_allclose(10 ** shown.data[0].z[1], np.sort(values.values[1])[::-1], rtol=1e-5)
    few = horizon_heatmap(values, most_columns=4)
    np.testing.assert_array_equal(few.data[0].z[:, [0, -1]], shown.data[0].z[:, [0, -1]])
    assert "4 of 16 channels" in few.layout.title.text


def test_a_map_to_click_ends_at_its_cells() -> None:
    model, tokens = hooked(), random_tokens(1, 7)
    layout = clickable(horizon_heatmap(horizons(model, tokens))).layout
    assert (layout.xaxis.range, layout.yaxis.range) == ((0.5, 16.5), (-0.5, 2.5))
    layout = clickable(norm_heatmap(state_norms(model, tokens))).layout
    assert layout.xaxis.range == (-0.5, 6.5)
    layout = clickable(contribution_heatmap(state_shares(model, tokens, 0))).layout
    assert layout.yaxis.range == (6.5, -0.5)


def test_what_cannot_be_shown_is_refused() -> None:
    model = hooked()
    states = states_at(model, random_tokens(1, 5), 1, [1, 2])
    with pytest.raises(ValueError, match="select one position"):
        state_heatmap(states[0])
    with pytest.raises(ValueError, match="holds 2 examples"):
        norm_heatmap(state_norms(model, random_tokens(2, 5)))
    with pytest.raises(ValueError, match=r"shows \(layer, position\)"):
        norm_heatmap(states[0, 0])
    with pytest.raises(ValueError, match="n=0 channels"):
        state_heatmap(states[0, 0], n=0)
    with pytest.raises(ValueError, match=r"shows \(layer, channel\)"):
        horizon_heatmap(states[0, 0])
