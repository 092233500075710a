"""The page Prompt: tokens, next-token predictions, the logit lens, and the step sizes of every layer and token."""

from __future__ import annotations

import numpy as np
import streamlit as st
import xarray as xr

from ssminterp.plots import clickable, lens_heatmap, prediction_bars, step_heatmap
from ssminterp.tasks import TASKS
from ssminterp_dashboards import links, models, results, snippets, views
from ssminterp_dashboards.errors import panel
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.text import plain, token_chip

# More tokens than this cannot be read side by side.
MOST_TOKENS = 48
STEPS = {
    "delta": "mean Δ",
    "delta_max": "largest Δ",
    "decay": "mean Ā",
    "decay_min": "smallest Ā",
}
_LARGE = "A large Δ lets the token in and lets go of what was there; a small one passes the token by."
_KEPT = "Ā is the part of the state that is kept across the token: 1 keeps all, 0 forgets."
MEANING = {"delta": _LARGE, "delta_max": _LARGE, "decay": _KEPT, "decay_min": _KEPT}


def page() -> None:
    loaded, prompt = models.current(), st.session_state["prompt"]
    with st.expander("Pick a prompt from a task", icon=":material/library_books:"):
        pick_prompt(loaded)
    _, texts = results.tokens(loaded.key, prompt)
    shown = choose_window(texts)
    position = choose_token(texts, shown)
    left, right = st.columns([5, 9], gap="large")
    with left:
        predictions(loaded, prompt, texts, position)
    with right:
        step_strip(loaded, prompt, shown)
    lens(loaded, prompt, shown, position)
    with st.container(horizontal=True):
        st.page_link("screens/patch.py", label="Where is the answer kept?", icon=":material/grid_on:")
        st.page_link("screens/learn.py", label="What is a state, what is Δ?", icon=":material/school:")


def pick_prompt(loaded: Loaded) -> None:
    """A task's prompts; choosing one makes it the prompt."""
    task = st.pills(
        "Task",
        list(TASKS),
        format_func=results.task_label,
        default="ioi",
        key="pick_task",
        label_visibility="collapsed",
        required=True,
    )
    for i, text in enumerate(results.task_prompts(loaded.key, task)):
        short = text if len(text) < 150 else f"{text[:90]} … {text[-50:]}"
        st.button(plain(short), key=f"pick_{i}", type="tertiary", on_click=_take, args=(text,))


def _take(prompt: str) -> None:
    st.session_state["prompt"] = prompt
    st.session_state["token"] = None


def choose_window(texts: list[str]) -> range:
    """The tokens that are shown: all of a short prompt, a window of a long one, its end by default."""
    if len(texts) <= MOST_TOKENS:
        return range(len(texts))
    last = len(texts) - MOST_TOKENS
    start = links.choice("from", last, range(last + 1))
    st.slider(f"{len(texts)} tokens: show {MOST_TOKENS} of them, from token", 0, last, key="from")
    return range(start, start + MOST_TOKENS)


def choose_token(texts: list[str], shown: range) -> int:
    """The chips of the tokens; the chosen one's position, the last by default."""
    links.choice("token", shown[-1], shown)
    return st.pills(
        f"{len(texts)} tokens: choose one to see what the model expects after it",
        shown,
        format_func=lambda i: token_chip(i, texts[i]),
        key="token",
        required=True,
    )


@panel
def predictions(loaded: Loaded, prompt: str, texts: list[str], position: int) -> None:
    """What comes next after one token."""
    top = results.lens(loaded.key, prompt).isel(layer=-1)
    note = "" if position + 1 == len(texts) else _said(top, position, texts[position + 1])
    figure = prediction_bars(top.isel(position=position))
    snippet = snippets.predictions(loaded, prompt, position)
    views.show(figure, "predictions", loaded, data=top, snippet=snippet, note=note)


def _said(top: xr.Dataset, position: int, token: str) -> str:
    """How the text goes on there, and how much the model expected it."""
    here = top.isel(position=position)
    found = np.flatnonzero(here["token"].values == token)
    if not len(found):
        return f"The text goes on with “{plain(token)}”, which is not among the first {here.sizes['rank']}."
    rank, probability = int(found[0]) + 1, float(here["probability"].values[found[0]])
    return f"The text goes on with “{plain(token)}”: rank {rank}, {probability:.1%}."


@panel
def lens(loaded: Loaded, prompt: str, shown: range, position: int) -> None:
    """The best word after every layer at every token; a click chooses the token."""
    top = results.lens(loaded.key, prompt)
    figure = lens_heatmap(top.isel(position=list(shown)), title="Logit lens: the best word after each layer")
    views.show(
        clickable(figure, (top.sizes["layer"] - 1, shown.index(position))),
        "lens",
        loaded,
        data=top,
        snippet=snippets.lens(loaded, prompt),
        note="What the model would say if it ended after that layer. :material/touch_app: Click a cell to see what "
        "comes after its token.",
        on_click=lambda row, column: _choose(shown[column]),
    )


def _choose(position: int) -> None:
    st.session_state["token"] = position


@panel
def step_strip(loaded: Loaded, prompt: str, shown: range) -> None:
    """How far each token moves each layer's state on."""
    kind = links.choice("step", "delta", STEPS)
    steps = results.steps(loaded.key, prompt)
    views.show(
        step_heatmap(steps[kind].isel(position=list(shown))),
        "steps",
        loaded,
        data=steps,
        snippet=snippets.steps(loaded, prompt, kind),
        note=MEANING[kind],
    )
    st.segmented_control(
        "Step sizes",
        list(STEPS),
        format_func=STEPS.get,
        key="step",
        required=True,
        label_visibility="collapsed",
    )


page()
