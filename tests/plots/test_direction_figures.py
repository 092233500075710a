"""Curves of probes and substitutions show the arrays' numbers beside their baselines."""

import numpy as np
import pytest
import torch
from tiny_models import hooked, random_tokens

from ssminterp.analysis import probe, substitution_test, token_averages
from ssminterp.plots import probe_curves, substitution_curves

MODEL, TOKENS = hooked(), random_tokens(30, 5, vocab=7)


def test_probes_beside_their_control_and_chance() -> None:
    labels, types = torch.arange(30) % 2, torch.arange(30) // 2 % 6
    probes = probe(
        MODEL, TOKENS, ["x", "B"], labels, types=types, positions=[0, 4], folds=3, method="means", progress=False
    )
    figure = probe_curves(probes.sel(hook="B"))
    assert [curve.line.dash for curve in figure.data] == [None, "dash", None, "dash"]
    for k, position in enumerate(probes["position"].values):
        np.testing.assert_array_equal(figure.data[2 * k].y, probes["accuracy"].sel(hook="B", position=position))
        np.testing.assert_array_equal(
            figure.data[2 * k + 1].y, probes["control_accuracy"].sel(hook="B", position=position)
        )
    assert figure.layout.shapes[0].y0 == 0.5
    assert "reads from B" in figure.layout.title.text
    assert "means, 2 classes, 30 examples, 3 folds" in figure.layout.title.text
    with pytest.raises(ValueError, match="select one hook"):
        probe_curves(probes)
    alone = probe(MODEL, TOKENS, "x", labels, types=None, positions=4, folds=3, method="means", progress=False)
    assert len(probe_curves(alone).data) == 1


def test_substitutions_beside_the_token_itself() -> None:
    averages = token_averages(MODEL, TOKENS, [0, 2], progress=False)
    found = substitution_test(MODEL, TOKENS, averages, [0, 2], reduce=None, progress=False)
    figure = substitution_curves(found)
    means = found.mean("example")
    for curve, position in zip(figure.data, found["position"].values, strict=True):
        np.testing.assert_allclose(curve.y, means["becomes_new"].sel(position=position))
    np.testing.assert_allclose([line.y0 for line in figure.layout.shapes], means["replaced_becomes_new"])
    assert "average x 1 after the token · 30 prompts" in figure.layout.title.text
    assert not substitution_curves(found, "changes").layout.shapes
    with pytest.raises(ValueError, match="test must be one of becomes_new, as_if_replaced, changes"):
        substitution_curves(found, "logit_diff")
