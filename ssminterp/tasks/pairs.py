"""A task's prompts of one layout, and pairs of prompts of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ssminterp.tasks.batch import TaskBatch
from ssminterp.tasks.prompts import Example, Prompt, make_batch, next_tokens

# How many prompts are drawn to find enough of one layout, in turn.
DRAWN = (4, 16, 64, 256)


def aligned(make: Any, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0, **options: Any) -> TaskBatch:
    """`n` pairs of a task whose tokens stand in the same places, so that a position means the same in all of them.

    make: the task, one of `TASKS.values()`. options: its own.

    Raises ValueError if n is no positive number, and what the task raises.
    """
    if n < 1:
        raise ValueError(f"n={n} pairs were asked for: at least 1")
    for factor in DRAWN:
        batch = make(tokenizer, n=n * factor, seed=seed, **options)
        layouts: dict[tuple[object, ...], list[int]] = {}
        for row, (roles, length) in enumerate(zip(_roles(batch), batch.lengths.tolist(), strict=True)):
            layouts.setdefault((batch.templates[row], length, *roles), []).append(row)
        largest = max(layouts.values(), key=len)
        if len(largest) >= n:
            return batch[largest[:n]]
    raise ValueError(
        f"the largest group of alike prompts has {len(largest)} of {n}: ask for fewer, or use roles, which need none"
    )


def _roles(batch: TaskBatch) -> list[list[int]]:
    return torch.stack(list(batch.roles.values()), 1).tolist()


def own_pairs(
    tokenizer: PreTrainedTokenizerBase,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[int | str],
    wrong_answers: Sequence[int | str],
) -> TaskBatch:
    """Pairs of prompts written by hand, as a task with the one role `end`.

    answers, wrong_answers: for each pair a token id, or a word that is one token after the prompt.

    Raises ValueError if the lists differ in length, a pair's two prompts have different numbers of tokens, a word is
    unknown or not one token, or both answers of a pair are the same.
    """
    counts = {len(clean), len(corrupted), len(answers), len(wrong_answers)}
    if len(counts) > 1:
        raise ValueError(
            f"there are {len(clean)} clean and {len(corrupted)} corrupted prompts, {len(answers)} answers and "
            f"{len(wrong_answers)} wrong answers: write as many of each"
        )
    examples = []
    for good, bad, answer, wrong in zip(clean, corrupted, answers, wrong_answers, strict=True):
        right_id, wrong_id = (_answer(tokenizer, good, one) for one in (answer, wrong))
        if right_id == wrong_id:
            raise ValueError(f"answer and wrong answer of {good!r} are the same token: there is nothing to compare")
        examples.append(Example(Prompt(good), Prompt(bad), [right_id], [wrong_id], "own"))
    return make_batch("own", tokenizer, examples)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: int | str) -> int:
    if isinstance(answer, int):
        return answer
    word = answer.strip()
    for form in (f" {word}", word):
        found = next_tokens(tokenizer, prompt, [form])
        if found:
            return next(iter(found.values()))
    raise ValueError(f"the answer {answer!r} is not one token after {prompt!r}: name a word that is")
