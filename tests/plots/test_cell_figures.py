"""Clickable maps, figures of one cell, and the dark page."""

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from xarray import DataArray

from ssminterp.plots import changed_tokens_figure, channel_map, clickable, parts_bars, patching_heatmap
from ssminterp.plots.theme import DARK, DIVERGING, DIVERGING_DARK, in_dark, themed, title_and_subtitle, without_markup

ATTRS = {"clean": 5.0, "corrupted": 1.0, "examples": 4, "model": "m", "dtype": "float32", "metric": "d"}
ATTRS |= {"direction": "clean_to_corrupted"}


def cell(values: np.ndarray, *dims: str) -> DataArray:
    coords = {dim: [str(i) for i in range(n)] for dim, n in zip(dims, values.shape, strict=True)}
    return DataArray(values, dims=dims, coords=coords | {"hook": "state", "layer": 2, "position": "3 to"}, attrs=ATTRS)


def test_every_cell_has_a_marker_that_knows_its_row_and_column() -> None:
    sweep = DataArray(
        np.arange(6.0).reshape(2, 3),
        dims=["layer", "position"],
        coords={"layer": [0, 1], "position": ["0 a", "1 b", "2 a"]},
        name="d",
        attrs=ATTRS,
    )
    figure = clickable(patching_heatmap(sweep), chosen=(1, 2))
    heat, marks = figure.data
    assert [tuple(point[:2]) for point in marks.customdata] == [(r, c) for r in range(2) for c in range(3)]
    np.testing.assert_allclose([point[2] for point in marks.customdata], np.ravel(heat.z))
    assert list(marks.y) == [0, 0, 0, 1, 1, 1]
    assert "%{customdata[2]:.3f}" in marks.hovertemplate  # z of the map
    assert "%{customdata[4]}" in marks.hovertemplate  # the label of the position, its customdata[1]
    assert marks.customdata[5][4] == "2 a"
    (frame,) = figure.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1.5, 2.5, 0.5, 1.5)


def test_a_frame_on_a_category_axis_stands_at_the_place_not_the_number() -> None:
    figure = go.Figure(go.Heatmap(z=[[1.0, 2.0]], x=["7", "9"], y=["3"])).update_xaxes(type="category")
    (frame,) = clickable(figure, (0, 1)).layout.shapes
    assert (frame.x0, frame.y0) == (0.5, -0.5)


def test_what_cannot_be_clicked_is_refused() -> None:
    with pytest.raises(ValueError, match="0 heat maps"):
        clickable(go.Figure(go.Bar(x=[1], y=[2])))
    with pytest.raises(ValueError, match="no cell"):
        clickable(go.Figure(go.Heatmap(z=[[1.0]])), (1, 0))


def test_a_stopped_sweep_leaves_cells_empty() -> None:
    sweep = DataArray(
        np.array([[1.0, 5.0], [np.nan, np.nan]]),
        dims=["layer", "position"],
        coords={"layer": [0, 1], "position": ["0 a", "1 b"]},
        name="d",
        attrs=ATTRS,
    )
    heat = patching_heatmap(sweep).data[0]
    assert (heat.zmin, heat.zmax) == (-1.0, 1.0)
    assert np.isnan(heat.z[1]).all()


def test_bars_show_shares_of_the_way_the_largest_first_with_estimates_at_their_own_parts() -> None:
    exact = cell(np.array([2.0, 5.0, 0.0]), "channel")
    estimated = cell(np.array([0.4, 4.0, 0.0]), "channel").assign_attrs(clean=4.0, corrupted=0.0)
    bars, marks = parts_bars(exact, estimated, n=2).data
    assert list(bars.x) == ["1", "0"]
    np.testing.assert_allclose(bars.y, [1.0, 0.25])
    np.testing.assert_allclose(marks.y, [1.0, 0.1])
    with pytest.raises(ValueError, match="channel"):
        parts_bars(cell(np.zeros((2, 2)), "channel", "coordinate"))
    with pytest.raises(ValueError, match="no effect"):
        parts_bars(exact.assign_attrs(clean=1.0))


def test_the_map_keeps_the_strongest_channels_and_says_how_much_they_hold() -> None:
    values = np.zeros((6, 3))
    values[4, 1], values[2, 0], values[0, 2] = 3.0, -2.0, 1.0
    figure = channel_map(cell(values, "channel", "coordinate").assign_attrs(clean=1.0, corrupted=0.0), n=2)
    assert list(figure.data[0].y) == ["4", "2"]
    assert "2 of 6 channels, 83% of all" in figure.layout.title.text
    with pytest.raises(ValueError, match="n=0"):
        channel_map(cell(values, "channel", "coordinate"), n=0)


def test_tokens_before_and_after() -> None:
    numbers = {"before": [1.0, 2.0], "after": [3.0, 2.5], "probability_before": [0.1, 0.2], "change": [2.0, 0.5]}
    numbers["probability_after"] = [0.5, 0.1]
    changed = xr.Dataset(
        {name: ("token", np.array(value)) for name, value in numbers.items()},
        coords={"token": [" Mary", " "]},
        attrs=ATTRS | {"hook": "x", "layer": 1, "position": "2 to", "example": 0, "changed_run": "corrupted"},
    )
    figure = changed_tokens_figure(changed)
    assert list(figure.layout.yaxis.ticktext) == ["Mary", "' '"]
    np.testing.assert_allclose(figure.data[1].x, [3.0, 2.5])
    with pytest.raises(ValueError, match="token"):
        changed_tokens_figure(changed.expand_dims("example"))


def test_on_a_dark_page_the_shared_colours_have_dark_counterparts() -> None:
    figure = go.Figure([go.Heatmap(z=[[1.0]], colorscale=DIVERGING), go.Bar(y=[1], marker_color=DIVERGING[-1])])
    figure.add_scatter(y=[1], marker={"color": "#ffffff", "line": {"color": "#1f2933"}})
    figure.add_annotation(text="a", bgcolor="white", font={"color": "#0072b2"})
    dark = in_dark(themed(figure, "Title", "sub"))
    assert (dark.layout.annotations[0].bgcolor, dark.layout.annotations[0].font.color) == (DARK["label"], "#56b4e9")
    assert [colour for _, colour in dark.data[0].colorscale] == DIVERGING_DARK
    assert dark.data[1].marker.color == DIVERGING_DARK[-1]
    assert (dark.data[2].marker.color, dark.data[2].marker.line.color) == (DIVERGING_DARK[3], DARK["text"])
    assert dark.layout.font.color == DARK["text"]
    assert title_and_subtitle(dark) == ("Title", "sub")
    kept = in_dark(go.Figure(go.Heatmap(z=[[1.0]], colorscale="Viridis")))
    assert kept.data[0].colorscale == go.Heatmap(colorscale="Viridis").colorscale


def test_labels_that_look_like_html_are_shown_as_text() -> None:
    figure = go.Figure(go.Heatmap(z=[[1.0]], x=["<a href='x'>"], y=[3], text=[["<b>"]], customdata=[[["<i>", 2]]]))
    figure.update_xaxes(ticktext=["<img>"], tickvals=[0])
    without_markup(figure)
    assert "<" not in str(figure.to_dict()["data"][0]["x"]) + str(figure.data[0].text) + str(figure.data[0].customdata)
    assert figure.layout.xaxis.ticktext[0] == "&lt;img>"
    assert list(figure.data[0].y) == [3]
