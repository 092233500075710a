"""Bare questions over cartridges: what tiny-mamba answers, and which layers it needs for it."""

import numpy as np
import pytest
import torch

from ssminterp import HookedMamba
from ssminterp.cartridges import accuracy_by_layers
from ssminterp.plots import recall_lines
from ssminterp.tasks import make_task
from ssminterp.tasks.batch import TaskBatch

MODEL = HookedMamba.from_pretrained("tiny-mamba", device="cpu")


@pytest.fixture(scope="module")
def pairs() -> TaskBatch:
    return make_task("key_value", MODEL.tokenizer, n=24, split="held_out")


def test_a_cartridge_of_pairs_answers_bare_questions(pairs: TaskBatch) -> None:
    recall = accuracy_by_layers(MODEL, pairs, pairs.role("query") - 1).mean("example")
    without, whole, at_once = recall["baseline"].values
    assert (without, whole, at_once) == (0.0, 1.0, 1.0)
    moved = recall["moved"].to_pandas()
    # Layer 2 alone cannot be missed, and with the layers below it it is enough.
    assert moved.loc["all but this layer", 2] == 0
    assert moved.loc["this layer and those before", 1] == 0
    assert moved.loc["this layer and those before", 2] == 1
    assert (moved.loc[["only this layer", "this layer and those after"], [3, 4, 5]] == 0).all(axis=None)


def test_each_cell_is_the_run_it_names(pairs: TaskBatch) -> None:
    """By hand, one prompt at a time, from states built of hooks' recordings rather than of swaps."""
    few = pairs[:3]
    start = int(few.role("query")[0]) - 1
    recall = accuracy_by_layers(MODEL, few, few.role("query") - 1, base="corrupted", metric="logit_diff")
    layers_of = {
        "only this layer": [3],
        "this layer and those before": [0, 1, 2, 3],
        "this layer and those after": [3, 4, 5],
        "all but this layer": [0, 1, 2, 4, 5],
    }
    with torch.no_grad():
        for example in range(3):
            clean, corrupted = (tokens[example : example + 1] for tokens in (few.clean, few.corrupted))
            own, other = (MODEL.read(tokens[:, :start]) for tokens in (clean, corrupted))
            for swap, layers in layers_of.items():
                mixed = other.swap(own, layers)
                assert [bool((mixed.ssm[i] == own.ssm[i]).all()) for i in range(6)] == [i in layers for i in range(6)]
                at_end = MODEL(clean[:, start:], state=mixed)[0, -1]
                expected = at_end[few.answers[example]] - at_end[few.wrong_answers[example]]
                got = recall["moved"].sel(swap=swap, layer=3, example=example)
                np.testing.assert_allclose(got, expected, atol=1e-3)


def test_prompts_of_several_lengths() -> None:
    batch = make_task("passkey", MODEL.tokenizer, n=4, distance=30)
    assert len(set(batch.lengths.tolist())) > 1
    question = batch.role("end") - 7
    assert MODEL.to_str_tokens(batch.clean[0, question[0] : question[0] + 1])[0].strip() == "What"
    recall = accuracy_by_layers(MODEL, batch, question)
    assert recall["baseline"].mean("example").values.tolist()[1:] == [1.0, 1.0]
    assert not np.isnan(recall["moved"].values).any()


def test_figure(pairs: TaskBatch) -> None:
    recall = accuracy_by_layers(MODEL, pairs[:4], pairs[:4].role("query") - 1)
    figure = recall_lines(recall)
    lines = {trace.name: trace for trace in figure.data}
    assert (
        list(lines["all but this layer"].y)
        == recall["moved"].mean("example").sel(swap="all but this layer").values.tolist()
    )
    assert "the whole cartridge (1.00)" in lines
    assert "key_value, 4 bare questions" in figure.layout.title.text
    with pytest.raises(ValueError, match="accuracy_by_layers returns"):
        recall_lines(recall.drop_vars("moved"))


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_arguments(pairs: TaskBatch) -> None:
    good = pairs.role("query") - 1
    for question, options, message in (
        (good, {"base": "clean"}, "base must be"),
        (good, {"metric": "kl"}, "needs clean_logits"),
        (good * 0, {}, "begins at position 0"),
        (good + 5, {}, "must lie inside its prompt"),
        (good[:3], {}, "names 3 positions for a batch of 24"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy_by_layers(MODEL, pairs, question, **options)
