"""Maps of contributions show the array's numbers under the tokens' texts."""

import numpy as np
import pytest
from xarray import DataArray

from ssminterp.plots import contribution_heatmap, strongest_part


@pytest.fixture
def values() -> DataArray:
    return DataArray(
        np.array([[[3.0, 0.0], [-4.0, 2.0]]]),
        dims=["batch", "target", "source"],
        coords={"target": ["0 When", "1 Mary"], "source": ["0 When", "1 Mary"]},
        name="hidden_attention",
        attrs={"layer": 5, "model": "tiny-mamba", "dtype": "float32"},
    )


def test_rows_are_targets_and_columns_sources(values: DataArray) -> None:
    figure = contribution_heatmap(values.transpose("batch", "source", "target"))
    heatmap = figure.data[0]
    np.testing.assert_array_equal(heatmap.z, values.values[0])
    assert heatmap.zmin == -heatmap.zmax
    assert list(heatmap.y) == ["0 When", "1 Mary"]
    for part in ("Hidden attention", "layer 5", "tiny-mamba", "strongest 4"):
        assert part in figure.layout.title.text


def test_colours_end_at_a_quantile_of_what_is_not_zero_or_at_the_largest() -> None:
    numbers = np.zeros((20, 20))
    numbers[-1] = np.arange(1.0, 21.0)
    values = DataArray(
        numbers, dims=["target", "source"], name="y", attrs={"layer": 0, "model": "m", "dtype": "float32"}
    )
    assert contribution_heatmap(values, clip=0.5).data[0].zmax == 10.5
    whole = contribution_heatmap(values, clip=1.0)
    assert whole.data[0].zmax == 20.0
    assert "colours end" not in whole.layout.title.text


def test_what_is_never_negative_starts_at_white(values: DataArray) -> None:
    heatmap = contribution_heatmap(abs(values).assign_attrs(values.attrs)).data[0]
    assert heatmap.zmin == 0.0
    assert heatmap.colorscale[0][1] == "#ffffff"


def test_a_map_too_large_to_read_keeps_its_strongest_rows_and_says_so() -> None:
    numbers = np.zeros((9, 9))
    numbers[[3, 7, 8], [1, 2, 6]] = [1.0, -5.0, 3.0]
    values = DataArray(
        numbers, dims=["target", "source"], name="y", attrs={"layer": 0, "model": "m", "dtype": "float32"}
    )
    part = strongest_part(values, 2)
    np.testing.assert_array_equal(part.values, [[-5.0, 0.0], [0.0, 3.0]])
    assert "the strongest 2 of 9 targets × 2 of 9 sources" in contribution_heatmap(part).layout.title.text
    assert strongest_part(values, 9) is values
    with pytest.raises(ValueError, match="got 0 of"):
        strongest_part(values, 0)


def test_what_cannot_be_shown_is_refused(values: DataArray) -> None:
    with pytest.raises(ValueError, match="holds 2 examples"):
        contribution_heatmap(DataArray(np.zeros((2, 1, 1)), dims=["batch", "target", "source"], name="y"))
    with pytest.raises(ValueError, match=r"shows \(target, source\)"):
        contribution_heatmap(values.expand_dims("channel"))
