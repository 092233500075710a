"""The page Memory: how long every channel remembers, what survives of a token, and memories taken out and put back."""

from __future__ import annotations

import streamlit as st

from ssminterp.plots import (
    answer_bars,
    clickable,
    horizon_heatmap,
    recall_lines,
    step_heatmap,
    survival_curves,
)
from ssminterp_dashboards import header, links, models, results, results_memory, snippets, views
from ssminterp_dashboards.choices import choose_layer, choose_token, take_layer
from ssminterp_dashboards.errors import panel, rerun_whole_page
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.text import plain, size

VIEWS = {"time": "How long it remembers", "cartridges": "Cartridges"}
THRESHOLDS = (2.5, 3.5, 5.0, 10.0)
TEXT, OTHER, QUESTION = "Given red: tiger, iron: lamp.", "Given red: lamp, iron: tiger.", "Now red:"
# In the session: each is kept as its text, and read again when it is needed.
MOST_KEPT = 12


def page() -> None:
    loaded = models.current()
    view = links.choice("memory", "time", VIEWS)
    st.segmented_control(
        "View", list(VIEWS), format_func=VIEWS.get, key="memory", required=True, label_visibility="collapsed"
    )
    if view == "cartridges":
        cartridges(loaded)
    elif header.ask_prompt():
        times(loaded, st.session_state["prompt"])


def times(loaded: Loaded, prompt: str) -> None:
    """Timescales, survival and sinks."""
    _, texts = results.tokens(loaded.key, prompt)
    left, right = st.columns([6, 7], gap="large")
    with left:
        layer = choose_layer(loaded)
        horizons(loaded, prompt)
    with right:
        source = choose_token(texts, "What is left of which token", "source", first=len(texts) // 4)
        survival(loaded, prompt, layer, source)
    st.divider()
    left, right = st.columns([7, 6], gap="large")
    with left:
        steps(loaded, prompt)
    with right:
        sinks(loaded, prompt)


@panel
def horizons(loaded: Loaded, prompt: str) -> None:
    """The half-lives of all channels of all layers; a click chooses the layer."""
    values = results_memory.horizons(loaded.key, prompt)
    code = f"figure = horizon_heatmap(horizons(model, {prompt!r}))"
    views.show(
        clickable(horizon_heatmap(values)),
        "memory_horizons",
        loaded,
        data=values,
        snippet=snippets.code(loaded, code, analysis="horizons", plots="horizon_heatmap"),
        note="Click a row to choose its layer.",
        on_click=take_layer,
    )


@panel
def survival(loaded: Loaded, prompt: str, layer: int, source: int) -> None:
    """What is left of a token at each later one."""
    left = results_memory.survival(loaded.key, prompt, layer, source)
    code = f"figure = survival_curves(survival(model, {prompt!r}, layer={layer}, source={source}))"
    views.show(
        survival_curves(left),
        "memory_survival",
        loaded,
        data=left,
        snippet=snippets.code(loaded, code, analysis="survival", plots="survival_curves"),
    )


@panel
def steps(loaded: Loaded, prompt: str) -> None:
    """Δ of every layer and token, among which sinks stand out."""
    values = results.steps(loaded.key, prompt)
    code = f'figure = step_heatmap(step_sizes(model, {prompt!r})["delta"])'
    views.show(
        step_heatmap(values["delta"]),
        "memory_steps",
        loaded,
        data=values["delta"],
        snippet=snippets.code(loaded, code, analysis="step_sizes", plots="step_heatmap"),
    )


@panel
def sinks(loaded: Loaded, prompt: str) -> None:
    """Tokens whose step is out of the ordinary for their layer."""
    st.markdown("#### Sinks: tokens with an outlying step")
    threshold = links.choice("sink", 3.5, THRESHOLDS)
    st.segmented_control("At least so many robust deviations away", THRESHOLDS, key="sink", required=True)
    found = results_memory.sinks(loaded.key, prompt, threshold)
    if found.empty:
        st.info("No token of this prompt takes an outlying step: lower the threshold, or try a longer prompt.")
        return
    st.dataframe(
        found.rename(columns={"position": "token", "delta": "mean Δ", "score": "deviations"}),
        hide_index=True,
        height=min(38 + 35 * len(found), 330),
    )
    st.caption(
        "Above zero: the state is reset and the token absorbed. Below: the token is passed by. The score is 0.6745 · "
        "(log Δ − median) / MAD among the tokens of the layer (Iglewicz & Hoaglin 1993)."
    )
    begin = f"found = sinks(model, {prompt!r}, threshold={threshold})  # a table\n"
    code = begin + f'figure = step_heatmap(step_sizes(model, {prompt!r})["delta"])'
    views.take_along(
        "memory_sinks",
        None,
        found.to_xarray(),
        snippets.code(loaded, code, analysis="sinks, step_sizes", plots="step_heatmap"),
    )


def cartridges(loaded: Loaded) -> None:
    """Texts read into states, and a question asked of them."""
    st.markdown(
        "A state has a fixed size, whatever was read into it: a **cartridge**. Read a text into one, then ask a "
        "question that is bare of the text. The second text is what the other layers hold while you swap."
    )
    text, other = links.choice("cartridge", TEXT), links.choice("other", OTHER)
    question, n_layers = links.choice("question", QUESTION), loaded.model.cfg.n_layers
    left, right = st.columns(2, gap="large")
    with left:
        st.text_area("Text of the cartridge", key="cartridge", height=90)
    with right:
        st.text_area("Second text", key="other", height=90, placeholder="Empty: nothing read")
    left, right = st.columns([1, 1], gap="large", vertical_alignment="bottom")
    with left:
        st.text_input("Question", key="question")
    with right:
        every = [str(layer) for layer in range(n_layers)]
        names = links.choice("swap", every[: n_layers // 2], every)
        st.pills("Layers to take from the cartridge", every, selection_mode="multi", key="swap")
    text, other, question = text or "", other or "", question or ""
    # What cannot be read is said once, here, and not by every view.
    for written in (text, other) if other.strip() else (text,):
        results_memory.cartridge(loaded.key, written)
    keep(loaded, text)
    if not question.strip():
        st.info("Type a question above: how a sentence about the text begins.", icon=":material/edit:")
        return
    results.tokens(loaded.key, question)
    layers = tuple(sorted(int(name) for name in names))
    left, right = st.columns(2, gap="large")
    with left:
        compare(loaded, text, other, question, layers)
    with right:
        swaps(loaded, text, other, question)


@panel
def compare(loaded: Loaded, text: str, other: str, question: str, layers: tuple[int, ...]) -> None:
    """With the cartridge, with some of its layers, and without."""
    found = results_memory.answered(loaded.key, text, other, question, layers)
    code = (
        f"{_states(text, other)}runs = {{\n"
        '    "the cartridge": cartridge,\n'
        f'    "some layers of it": other.swap(cartridge, layers={list(layers)}),\n'
        '    "without": other,\n}\n'
        f"figure = answer_bars(answers(model, {question!r}, runs, k=3))"
    )
    views.show(
        answer_bars(found),
        "memory_answers",
        loaded,
        data=found,
        snippet=snippets.code(loaded, code, cartridges="answers, blank", plots="answer_bars"),
    )


@panel
def swaps(loaded: Loaded, text: str, other: str, question: str) -> None:
    """Which layers the answer is in."""
    found = results_memory.by_layers(loaded.key, text, other, question)
    code = f"{_states(text, other)}figure = recall_lines(answer_by_layers(model, {question!r}, cartridge, other))"
    views.show(
        recall_lines(found),
        "memory_swaps",
        loaded,
        data=found,
        snippet=snippets.code(loaded, code, cartridges="answer_by_layers, blank", plots="recall_lines"),
    )


def _states(text: str, other: str) -> str:
    second = f"model.read({other!r})" if other.strip() else "blank(cartridge)"
    return f"cartridge = model.read({text!r})\nother = {second}\n"


@panel
def keep(loaded: Loaded, text: str) -> None:
    """The cartridges of this session."""
    kept: list[str] = st.session_state.setdefault("kept", [])
    state = results_memory.cartridge(loaded.key, text)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Keep this cartridge", icon=":material/save:", disabled=text in kept, on_click=_keep, args=(text,))
        st.download_button(
            "Cartridge (safetensors)",
            lambda: results_memory.as_file(state),
            file_name="cartridge.safetensors",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
        st.caption(f"{state.n_tokens:,} tokens in {size(state.ssm.nbytes + state.conv.nbytes)}, whatever their number.")
    if not kept:
        return
    with st.expander(f"Kept in this session: {len(kept)}", icon=":material/inventory_2:", expanded=True):
        for i, one in enumerate(kept):
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(plain(one if len(one) < 90 else f"{one[:60]} … {one[-25:]}"))
                st.button("Use", key=f"use_{i}", on_click=_use, args=("cartridge", one))
                st.button("Use as second", key=f"second_{i}", on_click=_use, args=("other", one))
                st.button("Drop", key=f"drop_{i}", type="tertiary", on_click=_drop, args=(one,))


def _keep(text: str) -> None:
    st.session_state["kept"] = [*st.session_state["kept"], text][-MOST_KEPT:]


def _use(place: str, text: str) -> None:
    st.session_state[place] = text
    rerun_whole_page()


def _drop(text: str) -> None:
    st.session_state["kept"].remove(text)


page()
