"""Averages, lines, differences and distances of states, beside the formulas written out."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import hooked, random_tokens

from ssminterp import ModelState, steer
from ssminterp.cartridges import average, blank, difference, distance, interpolate
from ssminterp.plots import state_distance_heatmap

MODEL = hooked()
A, B, C = (MODEL.read(random_tokens(2, length, seed=length)) for length in (5, 9, 7))
QUESTION = random_tokens(2, 4, seed=2)
weights = st.floats(-3, 3).filter(lambda w: abs(w) > 0.01)


def same(state: ModelState, conv: torch.Tensor, ssm: torch.Tensor) -> None:
    torch.testing.assert_close(state.conv, conv, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.ssm, ssm, atol=1e-5, rtol=1e-5)


@given(shares=st.lists(weights, min_size=3, max_size=3).filter(lambda ws: abs(sum(ws)) > 0.1))
def test_average(shares: list[float]) -> None:
    w = [share / sum(shares) for share in shares]
    got = average([A, B, C], shares)
    same(got, *(w[0] * a + w[1] * b + w[2] * c for a, b, c in ((A.conv, B.conv, C.conv), (A.ssm, B.ssm, C.ssm))))
    assert got.n_tokens == 9
    assert "read 5 tokens" in got.history[0]


@given(at=st.floats(-1, 2), strength=weights)
def test_a_line_between_two_states_and_their_difference(at: float, strength: float) -> None:
    same(interpolate(A, B, at), (1 - at) * A.conv + at * B.conv, (1 - at) * A.ssm + at * B.ssm)
    apart = difference(B, A)
    moved = apart.added_to(A, at)
    same(moved, *(getattr(interpolate(A, B, at), part) for part in ("conv", "ssm")))
    assert moved.n_tokens == A.n_tokens
    same(apart.added_to(apart.added_to(C, strength), -strength), C.conv, C.ssm)
    same(apart.added_to(A), B.conv, B.ssm)


@torch.no_grad()
def test_a_mean_of_one_text_is_that_text_and_blank_is_where_reading_starts() -> None:
    assert torch.equal(MODEL(QUESTION, state=average([A, A])), MODEL(QUESTION, state=A))
    assert torch.equal(MODEL(QUESTION, state=blank(A)), MODEL(QUESTION))
    assert blank(A).n_tokens == 0


@torch.no_grad()
def test_a_difference_steers_a_run() -> None:
    """Added to the last layer's state before a question, it does what steering that state at the text's end does."""
    text = random_tokens(2, 5, seed=5)
    last = torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    apart = dataclasses.replace(difference(B, A), conv=torch.zeros_like(A.conv), ssm=last * (B.ssm - A.ssm))
    with MODEL.intervene(steer("blocks.2.mixer.hook_state", apart.ssm[2], 2.0, positions=4)):
        expected = MODEL(torch.cat([text, QUESTION], 1))[:, 5:]
    torch.testing.assert_close(MODEL(QUESTION, state=apart.added_to(A, 2.0)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["layer", "channel"])
def test_distance(by: str) -> None:
    arrays = {measure: distance(A, B, measure, by) for measure in ("l2", "relative", "cosine")}
    for part in ("conv", "ssm"):
        for layer in range(3):
            for example in range(2):
                a, b = (getattr(s, part)[layer, example].double().numpy() for s in (A, B))
                axes = {"axis": -1} if by == "channel" else {}
                apart, norm = np.sqrt(((a - b) ** 2).sum(**axes)), np.sqrt((b**2).sum(**axes))
                expected = {
                    "l2": apart,
                    "relative": apart / norm,
                    "cosine": 1 - (a * b).sum(**axes) / (np.sqrt((a**2).sum(**axes)) * norm),
                }
                for measure, array in arrays.items():
                    got = array.sel(part=part, layer=layer, batch=example)
                    np.testing.assert_allclose(got.values, expected[measure], rtol=1e-9, atol=1e-12)
    assert float(distance(A, A, "relative").max()) == 0
    assert arrays["l2"].attrs["other"] == "read 9 tokens"


def test_distance_figure() -> None:
    apart = distance(A, B)
    figure = state_distance_heatmap(apart)
    np.testing.assert_allclose(figure.data[0].z, apart.mean("batch").values)
    assert "mean of 2 pairs" in figure.layout.title.text
    with pytest.raises(ValueError, match="the map shows"):
        state_distance_heatmap(distance(A, B, by="channel"))


def test_a_swapped_layer_is_the_only_one_apart() -> None:
    apart = distance(A.swap(B, layers=1), A, "l2")
    assert set(apart.where(apart > 0, drop=True)["layer"].values) == {1}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: average([]), "the list is empty"),
        (lambda: average([A, B], [1.0]), "need as many finite weights"),
        (lambda: interpolate(A, B, float("nan")), "need as many finite weights"),
        (lambda: average([A, B], [1.0, -1.0]), "whose sum is not 0"),
        (lambda: average([A, B[0]]), "batches of 2 and 1"),
        (lambda: interpolate(A, hooked(seed=1).read(QUESTION), 0.5), "the states are of two models"),
        (lambda: difference(A, hooked(num_hidden_layers=2).read(QUESTION)), "the states are of two models"),
        (lambda: difference(A, B).added_to(hooked(seed=1).read(QUESTION)), "the difference is of"),
        (lambda: difference(A, B).added_to(A[0]), "holds a batch of 2, the state one of 1"),
        (lambda: MODEL(QUESTION, state=difference(A, B)), "takes a ModelState.*StateDifference"),
        (lambda: distance(A, B, "manhattan"), "measure must be"),
        (lambda: distance(A, B, by="head"), "measure must be"),
    ],
)
def test_bad_arguments(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask()
