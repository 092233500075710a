"""Tasks: clean and corrupted prompts with answers, position roles and metrics, for any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from ssminterp.tasks.batch import METRIC_NAMES, TaskBatch
from ssminterp.tasks.ioi import ioi, ioi_ensign
from ssminterp.tasks.knowledge import facts, greater_than, pronouns
from ssminterp.tasks.metrics import Metric
from ssminterp.tasks.pairs import aligned, own_pairs
from ssminterp.tasks.recall import induction, key_value, passkey

TASKS: dict[str, Callable[..., TaskBatch]] = {
    "ioi": ioi,
    "ioi_ensign": ioi_ensign,
    "induction": induction,
    "key_value": key_value,
    "facts": facts,
    "greater_than": greater_than,
    "pronouns": pronouns,
    "passkey": passkey,
}

__all__ = [
    "METRIC_NAMES",
    "TASKS",
    "Metric",
    "TaskBatch",
    "aligned_task",
    "facts",
    "greater_than",
    "induction",
    "ioi",
    "ioi_ensign",
    "key_value",
    "make_task",
    "own_pairs",
    "passkey",
    "pronouns",
]


def make_task(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TaskBatch:
    """The task of that name with its own options (`n`, `seed`, …).

    Raises ValueError with the known names if there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; tasks are {', '.join(TASKS)}")
    return TASKS[name](tokenizer, **options)


def aligned_task(name: str, tokenizer: PreTrainedTokenizerBase, n: int = 8, seed: int = 0, **options: Any) -> TaskBatch:
    """`n` pairs of the task of that name whose tokens stand in the same places (see `aligned`).

    Raises ValueError with the known names if there is no such task, and if too few prompts are alike.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; tasks are {', '.join(TASKS)}")
    return aligned(TASKS[name], tokenizer, n, seed, **options)
