"""The page State: what a layer's state would say and holds, whose it is, for how long, and where two prompts part."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from ssminterp.plots import (
    clickable,
    compare_curves,
    contribution_heatmap,
    half_life_heatmap,
    norm_curve,
    norm_heatmap,
    state_heatmap,
    state_words_figure,
    step_heatmap,
)
from ssminterp_dashboards import links, models, results, results_state, snippets, views
from ssminterp_dashboards.choices import choose_layer, choose_token, readable, take_layer
from ssminterp_dashboards.errors import panel
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.text import plain

READERS = {"own": "the token itself", "last": "the last token"}
SHARES: dict[Literal["read_out", "norm"], str] = {"read_out": "what is read", "norm": "what is stored"}
N_CHANNELS = (20, 40, 80, 160)


def page() -> None:
    loaded, prompt = models.current(), st.session_state["prompt"]
    _, texts = results.tokens(loaded.key, prompt)
    left, right = st.columns([1, 2], gap="large")
    with left:
        layer = choose_layer(loaded)
    with right:
        position = choose_token(texts)
    left, right = st.columns([7, 6], gap="large")
    with left:
        words(loaded, prompt, texts, layer, position)
    with right:
        contents(loaded, prompt, layer, position)
    st.divider()
    sizes(loaded, prompt, layer, position)
    st.divider()
    left, right = st.columns([7, 6], gap="large")
    with left:
        shares(loaded, prompt, layer)
    with right:
        decays(loaded, prompt, layer)


@panel
def words(loaded: Loaded, prompt: str, texts: list[str], layer: int, position: int) -> None:
    """The state lens of every layer at one token; a click chooses the layer."""
    reader = links.choice("reader", "own", READERS)
    st.segmented_control("As read by", list(READERS), format_func=READERS.get, key="reader", required=True)
    read_at = len(texts) - 1 if reader == "last" else None
    found = results_state.words(loaded.key, prompt, position, read_at)
    code = f"words = state_words(model, {prompt!r}, {position}, read_at={read_at})\nfigure = state_words_figure(words)"
    views.show(
        clickable(state_words_figure(found), (layer, 0)),
        "state_words",
        loaded,
        data=found,
        snippet=snippets.code(loaded, code, analysis="state_words", plots="state_words_figure"),
        note="Click a row to choose its layer.",
        on_click=take_layer,
    )


@panel
def contents(loaded: Loaded, prompt: str, layer: int, position: int) -> None:
    """The state after one token, channel by channel."""
    n = links.choice("state_channels", 40, N_CHANNELS)
    st.segmented_control("Channels, the largest first", N_CHANNELS, key="state_channels", required=True)
    state = results_state.state(loaded.key, prompt, layer, position)
    code = f"state = states_at(model, {prompt!r}, {layer}, {position})\nfigure = state_heatmap(state[0, 0], n={n})"
    views.show(
        state_heatmap(state, n),
        "state_contents",
        loaded,
        data=state,
        snippet=snippets.code(loaded, code, analysis="states_at", plots="state_heatmap"),
    )


@panel
def sizes(loaded: Loaded, prompt: str, layer: int, position: int) -> None:
    """How large the state is, and what another prompt changes."""
    second = links.choice("second", "")
    st.text_input(
        "Compare with another prompt",
        key="second",
        placeholder="the same words with one changed, for example",
        help="Both are read from the start; the view shows where they part, and how far apart the states then are.",
    )
    left, right = st.columns([6, 7], gap="large")
    with left:
        norms = results_state.norms(loaded.key, prompt)
        code = f"figure = norm_heatmap(state_norms(model, {prompt!r}))"
        views.show(
            clickable(norm_heatmap(norms), (layer, position)),
            "state_norms",
            loaded,
            data=norms,
            snippet=snippets.code(loaded, code, analysis="state_norms", plots="norm_heatmap"),
            note="Click a cell to choose its layer and token.",
            on_click=_take_cell,
        )
    with right:
        if not (second or "").strip():
            code = f"figure = norm_curve(state_norms(model, {prompt!r}), {layer})"
            views.show(
                norm_curve(norms, layer, title=f"Layer {layer}, token by token"),
                "state_curve",
                loaded,
                data=norms.sel(layer=layer),
                snippet=snippets.code(loaded, code, analysis="state_norms", plots="norm_curve"),
            )
            return
        compared = results_state.compared(loaded.key, prompt, second)
        code = f"compared = compare_states(model, {prompt!r}, {second!r})\nfigure = compare_curves(compared, {layer})"
        views.show(
            compare_curves(compared, layer),
            "state_compared",
            loaded,
            data=compared,
            snippet=snippets.code(loaded, code, analysis="compare_states", plots="compare_curves"),
            note=f"Second: {plain(second)}",
        )


def _take_cell(row: int, column: int) -> None:
    st.session_state["layer"], st.session_state["token"] = row, column


@panel
def shares(loaded: Loaded, prompt: str, layer: int) -> None:
    """Whose the state is, at every token."""
    by: Literal["read_out", "norm"] = links.choice("share", "read_out", SHARES)
    st.segmented_control("Share of", list(SHARES), format_func=SHARES.get, key="share", required=True)
    values = results_state.shares(loaded.key, prompt, layer, by)
    part = readable(values, "share_all")
    code = f"shares = state_shares(model, {prompt!r}, {layer}, by={by!r})\nfigure = contribution_heatmap(shares)"
    views.show(
        contribution_heatmap(part, title="Whose the state is"),
        "state_shares",
        loaded,
        data=values,
        snippet=snippets.code(loaded, code, analysis="state_shares", plots="contribution_heatmap"),
        note="Each row sums to 1: of the state at this token, how much came from which token.",
    )


@panel
def decays(loaded: Loaded, prompt: str, layer: int) -> None:
    """How long the state holds what it is told."""
    lives = results_state.lives(loaded.key, prompt, layer)
    code = f"figure = half_life_heatmap(half_lives(model, {prompt!r}, {layer}))"
    views.show(
        half_life_heatmap(lives, title="Half-lives"),
        "state_lives",
        loaded,
        data=lives,
        snippet=snippets.code(loaded, code, analysis="half_lives", plots="half_life_heatmap"),
    )
    kept = results_state.decays(loaded.key, prompt)
    code = f'figure = step_heatmap(step_sizes(model, {prompt!r})["decay"])'
    views.show(
        step_heatmap(kept["decay"], title="What each token leaves of the state"),
        "state_decay",
        loaded,
        data=kept,
        snippet=snippets.code(loaded, code, analysis="step_sizes", plots="step_heatmap"),
    )


page()
