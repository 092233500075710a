"""Prompts of one layout, and pairs of one's own."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ssminterp.tasks import TASKS, aligned_task, own_pairs

CLEAN = ["Then, Shelby and Emma had fun at the school. Shelby gave an apple to"]
CORRUPTED = ["Then, Emma and Shelby had fun at the school. Emma gave an apple to"]


@pytest.mark.parametrize("task", list(TASKS))
def test_all_prompts_have_one_layout(task: str, word_level: PreTrainedTokenizerFast) -> None:
    batch = aligned_task(task, word_level, n=5, seed=3)
    assert len(batch) == 5
    assert len(set(batch.templates)) == 1
    assert batch.lengths.unique().numel() == 1
    for positions in batch.roles.values():
        assert positions.unique().numel() == 1


def test_bad_requests_are_named(word_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="unknown task 'oi'"):
        aligned_task("oi", word_level)
    with pytest.raises(ValueError, match="at least 1"):
        aligned_task("ioi", word_level, n=0)


def test_own_pairs_take_words_or_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    emma, shelby = (tokenizer(f"to {name}", add_special_tokens=False)["input_ids"] for name in ("Emma", "Shelby"))
    if len(emma) != 2 or len(shelby) != 2:
        pytest.skip("this tokenizer has the names in pieces")
    batch = own_pairs(tokenizer, CLEAN, CORRUPTED, [" Emma"], [shelby[-1]])
    assert (batch.answers.item(), batch.wrong_answers.item()) == (emma[-1], shelby[-1])
    assert batch.roles["end"].tolist() == [batch.clean.shape[1] - 1]
    logits = torch.zeros(1, batch.clean.shape[1], len(tokenizer))
    logits[0, -1, emma[-1]] = 2.0
    assert batch.metric("logit_diff")(logits).item() == 2.0


@pytest.mark.parametrize(
    ("corrupted", "answers", "wrong", "message"),
    [
        (["Emma gave an apple to"], ["Emma"], ["Shelby"], "differ in length"),
        (CORRUPTED, ["Emma"], ["Emma"], "same token"),
        (CORRUPTED, ["Emma"], ["Xylophonist"], "not one token"),
        (CORRUPTED, [], ["Shelby"], "0 answers"),
    ],
)
def test_bad_pairs_are_named(
    corrupted: list[str], answers: list[str], wrong: list[str], message: str, word_level: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        own_pairs(word_level, CLEAN, corrupted, answers, wrong)
