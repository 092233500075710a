"""The page Prompt: tokens, next-token predictions, the logit lens, and the step sizes of every layer and token."""

from __future__ import annotations

import streamlit as st

from ssminterp.plots import clickable, lens_heatmap, prediction_bars, step_heatmap
from ssminterp_dashboards import links, models, results, snippets, views
from ssminterp_dashboards.errors import panel
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.text import plain, token_chip

STEPS = {
    "delta": "mean Δ",
    "delta_max": "largest Δ",
    "decay": "mean Ā",
    "decay_min": "smallest Ā",
}


def page() -> None:
    loaded, prompt = models.current(), st.session_state["prompt"]
    with st.expander("Pick a prompt from a task", icon=":material/library_books:"):
        pick_prompt(loaded)
    _, texts = results.tokens(loaded.key, prompt)
    position = choose_token(texts)
    left, right = st.columns([5, 9], gap="large")
    with left:
        predictions(loaded, prompt, position)
    with right:
        step_strip(loaded, prompt)
    lens(loaded, prompt)


def pick_prompt(loaded: Loaded) -> None:
    """A task's prompts; choosing one makes it the prompt."""
    names = results.task_names()
    task = st.pills("Task", names, default=names[0], key="pick_task", label_visibility="collapsed", required=True)
    for i, text in enumerate(results.task_prompts(loaded.key, task)):
        short = text if len(text) < 150 else f"{text[:90]} … {text[-50:]}"
        st.button(plain(short), key=f"pick_{i}", type="tertiary", on_click=_take, args=(text,))


def _take(prompt: str) -> None:
    st.session_state["prompt"] = prompt
    st.session_state["token"] = None


def choose_token(texts: list[str]) -> int:
    """The chips of all tokens; the chosen one's position, the last by default."""
    links.choice("token", len(texts) - 1, range(len(texts)))
    return st.pills(
        f"{len(texts)} tokens: choose one to see what the model expects after it",
        range(len(texts)),
        format_func=lambda i: token_chip(i, texts[i]),
        key="token",
        required=True,
    )


@panel
def predictions(loaded: Loaded, prompt: str, position: int) -> None:
    """What comes next after one token."""
    top = results.lens(loaded.key, prompt)
    figure = prediction_bars(top.isel(layer=-1, position=position))
    views.show(figure, "predictions", loaded, data=top.isel(layer=-1), snippet=snippets.predictions(loaded, prompt))


@panel
def lens(loaded: Loaded, prompt: str) -> None:
    """The best word after every layer at every token; a click chooses the token."""
    top = results.lens(loaded.key, prompt)
    figure = clickable(lens_heatmap(top, title="Logit lens: the best word after each layer"))
    views.show(figure, "lens", loaded, data=top, snippet=snippets.lens(loaded, prompt), on_click=_choose_cell)


def _choose_cell(row: int, column: int) -> None:
    st.session_state["token"] = column


@panel
def step_strip(loaded: Loaded, prompt: str) -> None:
    """How far each token moves each layer's state on."""
    kind = links.choice("step", "delta", STEPS)
    st.segmented_control(
        "Step sizes",
        list(STEPS),
        format_func=STEPS.get,
        key="step",
        required=True,
        label_visibility="collapsed",
    )
    steps = results.steps(loaded.key, prompt)
    figure = step_heatmap(steps[kind])
    views.show(figure, "steps", loaded, data=steps, snippet=snippets.steps(loaded, prompt, kind))


page()
