"""Answers to one question over several states, and over some layers of one."""

import numpy as np
import pytest
import torch
from tiny_models import hooked, random_tokens

from ssminterp import HookedMamba
from ssminterp.cartridges import answer_by_layers, answers, blank
from ssminterp.plots import answer_bars, recall_lines

MODEL = HookedMamba.from_pretrained("tiny-mamba", device="cpu")
PAIRS, SWAPPED, QUESTION = "Given red: tiger, iron: lamp.", "Given red: lamp, iron: tiger.", "Now red:"


def test_answers_are_those_of_the_text_in_one_piece() -> None:
    states = {"one": MODEL.read(PAIRS), "other": MODEL.read(SWAPPED), "none": None}
    found = answers(MODEL, QUESTION, states, k=3)
    with torch.no_grad():
        for run, text in (("one", f"{PAIRS} {QUESTION}"), ("other", f"{SWAPPED} {QUESTION}"), ("none", QUESTION)):
            whole = MODEL(text)[0, -1].softmax(-1)
            np.testing.assert_allclose(found.sel(run=run), whole[found["id"].values], atol=1e-5)
            assert set(whole.topk(3).indices.tolist()) <= set(found["id"].values.tolist())
    assert found.idxmax("token").values.tolist()[:2] == ["tiger", "lamp"]
    assert (np.diff(found.max("run")) <= 0).all()
    figure = answer_bars(found)
    np.testing.assert_array_equal(figure.data[1].x, found.sel(run="other"))


def test_swapped_layers_are_those_named_and_layer_2_decides() -> None:
    own, other = MODEL.read(PAIRS), MODEL.read(SWAPPED)
    found = answer_by_layers(MODEL, QUESTION, own, other)
    assert found.attrs["metric"] == "probability of “tiger”"
    with torch.no_grad():
        mixed = MODEL(QUESTION, state=other.swap(own, [0, 1, 2]))[0, -1].softmax(-1)
    tiger = int(MODEL.to_tokens("tiger")[0, 0])
    moved = found["moved"].isel(example=0)
    assert float(moved.sel(swap="this layer and those before", layer=2)) == pytest.approx(float(mixed[tiger]), rel=1e-4)
    assert float(moved.sel(swap="only this layer", layer=2)) > 0.9
    assert float(moved.sel(swap="all but this layer", layer=2)) < 0.1
    assert "“Now red:” · the other layers hold another cartridge" in recall_lines(found).layout.title.text
    alone = answer_by_layers(MODEL, QUESTION, own, answer="lamp")
    np.testing.assert_allclose(
        alone["baseline"].values[0],
        answer_by_layers(MODEL, QUESTION, own, blank(own), "lamp")["baseline"].values[0],
        atol=1e-7,
    )


def test_what_cannot_be_answered_is_refused(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        answers(MODEL, QUESTION, {})
    with pytest.raises(ValueError, match="no tokens"):
        answers(MODEL, "", {"none": None})
    with pytest.raises(ValueError, match="this state was read by"):
        answers(MODEL, QUESTION, {"other": hooked().read(random_tokens(1, 4))})
    with pytest.raises(ValueError, match="is 2 tokens"):
        answer_by_layers(MODEL, QUESTION, MODEL.read(PAIRS), answer="red tiger")
    with pytest.raises(ValueError, match="up to 4 runs"):
        answer_bars(answers(MODEL, QUESTION, {str(i): None for i in range(5)}))
