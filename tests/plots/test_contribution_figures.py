"""Maps of contributions show the array's numbers under the tokens' texts."""

import numpy as np
import pytest
from xarray import DataArray

from ssminterp.plots import contribution_heatmap


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


def test_what_is_never_negative_starts_at_white(values: DataArray) -> None:
    heatmap = contribution_heatmap(abs(values).assign_attrs(values.attrs)).data[0]
    assert heatmap.zmin == 0.0
    assert heatmap.colorscale[0][1] == "#ffffff"


def test_what_cannot_be_shown_is_refused(values: DataArray) -> None:
    with pytest.raises(ValueError, match="holds 2 examples"):
        contribution_heatmap(DataArray(np.zeros((2, 1, 1)), dims=["batch", "target", "source"], name="y"))
    with pytest.raises(ValueError, match=r"shows \(target, source\)"):
        contribution_heatmap(values.expand_dims("channel"))
