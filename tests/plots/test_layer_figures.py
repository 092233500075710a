"""Figures of whole layers show the numbers under the layers' numbers."""

import numpy as np
import pandas as pd
import pytest
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp.patching import ablate_layers
from ssminterp.plots import layer_curves, share_bars


def third(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


def test_a_curve_for_each_way_to_ablate() -> None:
    model, tokens = hooked(), random_tokens(2, 5)
    ablations = {
        "zero": ablate_layers(model, tokens, third, progress=False),
        "mean": ablate_layers(model, tokens, third, method="mean", progress=False),
    }
    figure = layer_curves(ablations, "third")
    for trace, (name, found) in zip(figure.data, ablations.items(), strict=True):
        assert trace.name == name
        np.testing.assert_array_equal(trace.y, found["third"])
    assert f"{ablations['zero']['third'].attrs['baseline']:.2f} (dotted) · 2 prompts" in figure.layout.title.text
    with pytest.raises(ValueError, match="no variable 'fourth'"):
        layer_curves(ablations, "fourth")
    with pytest.raises(ValueError, match="nothing to show"):
        layer_curves({}, "third")


def test_bars_of_shares() -> None:
    figure = share_bars(pd.Series({0: 0.25, 2: 1.0}), "4 sets")
    assert list(figure.data[0].x) == ["0", "2"]
    assert list(figure.data[0].y) == [0.25, 1.0]
    assert "4 sets" in figure.layout.title.text
