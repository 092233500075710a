"""Results of the models, kept for all tabs: every function says in its arguments all that its result depends on."""

from __future__ import annotations

import streamlit as st
import xarray as xr

from ssminterp.analysis import lens_summary, step_sizes
from ssminterp.tasks import make_task
from ssminterp_dashboards import models
from ssminterp_dashboards.models import ModelKey

# A map of layers × tokens is unreadable, and slow to draw, long before this.
MAX_TOKENS = 1024
N_RESULTS = 64
TASK_LABELS = {
    "ioi": "Indirect object (IOI): who is given the thing?",
    "ioi_ensign": "Indirect object, three names",
    "induction": "Induction: a list that repeats",
    "key_value": "Recall: the value of a key",
    "facts": "Facts: capitals",
    "greater_than": "Greater than: years",
    "pronouns": "Pronouns",
    "passkey": "Passkey in a long text",
}


@st.cache_data(max_entries=N_RESULTS, show_spinner=False)
def tokens(key: ModelKey, prompt: str) -> tuple[list[int], list[str]]:
    """Ids and texts of a prompt's tokens.

    Raises ValueError for an empty prompt, unknown words (named, with the nearest known ones) and too many tokens.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty: type a sentence, or pick one from a task.")
    with models.load(key).ready() as model:
        ids = model.to_tokens(prompt)
        if ids.shape[1] > MAX_TOKENS:
            raise ValueError(
                f"The prompt has {ids.shape[1]:,} tokens, and these pages show up to {MAX_TOKENS:,}: shorten it, or "
                "use ssminterp in Python."
            )
        return ids[0].tolist(), model.to_str_tokens(ids)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def lens(key: ModelKey, prompt: str, k: int = 10) -> xr.Dataset:
    """The best `k` tokens after every layer at every position: (layer, position, rank), of one example."""
    with models.load(key).ready() as model:
        return lens_summary(model, prompt, k=k).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def steps(key: ModelKey, prompt: str) -> xr.Dataset:
    """Step sizes and decays of every layer at every position: (layer, position), of one example."""
    with models.load(key).ready() as model:
        return step_sizes(model, prompt).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner=False)
def task_prompts(key: ModelKey, task: str, n: int = 8, seed: int = 0) -> list[str]:
    """Clean prompts of a task for the model's tokenizer. Raises ValueError if the tokenizer does not fit the task."""
    with models.load(key).ready() as model:
        if model.tokenizer is None:
            raise ValueError("This model has no tokenizer, so it has no tasks.")
        return make_task(task, model.tokenizer, n=n, seed=seed).clean_prompts


def task_label(task: str) -> str:
    """A task in words."""
    return TASK_LABELS.get(task, task)
