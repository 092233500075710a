"""Curves of knockouts show the sweep's numbers, their windows and the baseline."""

import numpy as np
import pytest
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp.analysis import knockout_sweep
from ssminterp.plots import knockout_curves


def third(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def fourth(logits: Tensor) -> Tensor:
    return logits[:, -1, 4]


def test_a_panel_for_each_metric_and_a_curve_for_each_source() -> None:
    metrics = {"third": third, "fourth": fourth}
    sources = {"first": 0, "second": [1, 2]}
    sweep = knockout_sweep(hooked(), random_tokens(2, 6), metrics, sources, -1, window=2, reduce=None, progress=False)
    figure = knockout_curves(sweep)
    shown = [(curve.name, curve.yaxis) for curve in figure.data]
    assert shown == [("first", "y"), ("second", "y"), ("first", "y2"), ("second", "y2")]
    for curve, name in zip(figure.data, ("third", "third", "fourth", "fourth"), strict=True):
        np.testing.assert_allclose(curve.y, sweep[name].sel(source=curve.name).mean("example"), rtol=1e-6)
        np.testing.assert_array_equal(curve.x, [0.5, 1.5])
    assert figure.layout.xaxis2.ticktext == ("0–1", "1–2")
    assert [line.y0 for line in figure.layout.shapes] == [sweep[name].attrs["baseline"] for name in metrics]
    assert "target: -1 · decay kept" in figure.layout.title.text


def test_one_metric_and_what_cannot_be_shown() -> None:
    sweep = knockout_sweep(hooked(), random_tokens(2, 6), third, {"first": 0}, progress=False)
    assert knockout_curves(sweep).layout.xaxis.ticktext == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"the curves show \(source, layer\), got \('layer',\)"):
        knockout_curves(sweep.sel(source="first"))
