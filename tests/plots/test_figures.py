"""Figures show what the array holds, with labels, scale and baselines."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from xarray import DataArray

from ssminterp.plots import patching_heatmap, save_html, save_report, strongest_columns


@pytest.fixture
def sweep() -> DataArray:
    return DataArray(
        np.array([[1.0, 3.0, 5.0], [2.0, 0.0, 9.0]]),
        dims=["layer", "position"],
        coords={"layer": [0, 1], "position": ["0 When", "1 ⟨IO⟩", "2 to"], "hook": "state"},
        name="logit_diff",
        attrs={"clean": 5.0, "corrupted": 1.0, "examples": 4, "model": "tiny-mamba", "dtype": "float32"},
    )


def test_colours_are_the_way_from_corrupted_to_clean_centred_on_zero(sweep: DataArray) -> None:
    heatmap = patching_heatmap(sweep).data[0]
    np.testing.assert_allclose(heatmap.z, [[0.0, 0.5, 1.0], [0.25, -0.25, 2.0]])
    assert (heatmap.zmin, heatmap.zmax) == (-2.0, 2.0)


def test_axes_show_tokens_and_the_title_the_baselines(sweep: DataArray) -> None:
    layout = patching_heatmap(sweep).layout
    assert list(layout.xaxis.ticktext) == ["0 When", "1 ⟨IO⟩", "2 to"]
    for part in ("state", "clean 5.00", "corrupted 1.00", "4 prompt pairs", "tiny-mamba"):
        assert part in layout.title.text


def test_labels_for_tokens_that_differ_are_explained_where_there_are_some(sweep: DataArray) -> None:
    assert patching_heatmap(sweep).layout.xaxis.title.text == "position (⟨…⟩: not the same in all prompts)"
    same = sweep.assign_coords(position=["0 When", "1 Mary", "2 to"])
    assert patching_heatmap(same).layout.xaxis.title.text == "position"


def test_the_other_direction_counts_from_the_clean_run(sweep: DataArray) -> None:
    figure = patching_heatmap(sweep.assign_attrs(direction="corrupted_to_clean"))
    np.testing.assert_allclose(figure.data[0].z, [[1.0, 0.5, 0.0], [0.75, 1.25, -1.0]])
    assert "corrupted into clean" in figure.layout.title.text


def test_the_strongest_columns_keep_their_order(sweep: DataArray) -> None:
    assert strongest_columns(sweep, 2) == [1, 2]
    assert strongest_columns(sweep.assign_attrs(direction="corrupted_to_clean"), 1) == [1]
    with pytest.raises(ValueError, match="n=0"):
        strongest_columns(sweep, 0)


def test_what_cannot_be_shown_is_refused(sweep: DataArray) -> None:
    with pytest.raises(ValueError, match="select one hook"):
        patching_heatmap(sweep.expand_dims("example"))
    with pytest.raises(ValueError, match="no effect to show"):
        patching_heatmap(sweep.assign_attrs(clean=1.0))


def test_pages_work_offline_and_escape_text(sweep: DataArray, tmp_path: Path) -> None:
    page = save_html(patching_heatmap(sweep), f"{tmp_path}/figures/state.html")
    assert "https://cdn" not in page.read_text(encoding="utf-8")[:2000]
    table = pd.DataFrame({"position": ["<script>"], "moved": [0.5]})
    report = save_report(str(tmp_path / "index.html"), "a < b", {"Strongest": table}, [patching_heatmap(sweep)])
    text = report.read_text(encoding="utf-8")
    assert "a &lt; b" in text
    assert "<td>&lt;script&gt;</td>" in text
    assert (tmp_path / "plotly.min.js").is_file()
