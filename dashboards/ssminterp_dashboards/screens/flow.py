"""The page Flow: how the answer comes about over tokens and layers, which token tells which, and an edge cut."""

from __future__ import annotations

import streamlit as st
import xarray as xr

from ssminterp.analysis import edge_table, strongest_paths
from ssminterp.plots import answer_bars, clickable, contribution_heatmap, flow_figure, knockout_curves
from ssminterp_dashboards import links, models, results, results_flow, snippets, views
from ssminterp_dashboards.choices import choose_layer, choose_token, readable
from ssminterp_dashboards.errors import panel
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.results_flow import Decay, Edge, Question
from ssminterp_dashboards.text import plain

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
MAPS = {"answer": "what it brings to the answer", "attention": "hidden attention α"}
DECAYS: tuple[Decay, ...] = ("kept", "skipped")
# Edges are drawn one by one, and pairs of tokens × layers are many.
MOST_EDGES, MOST_TOKENS = 400, 256


def page() -> None:
    loaded, prompt = models.current(), st.session_state["prompt"]
    _, texts = results.tokens(loaded.key, prompt)
    if len(texts) > MOST_TOKENS:
        raise ValueError(
            f"The prompt has {len(texts)} tokens, and this page follows up to {MOST_TOKENS}: shorten it, or use "
            "ssminterp.analysis.flow_contributions."
        )
    asked = ask(loaded, prompt)
    graph(loaded, prompt, asked)
    st.divider()
    left, right = st.columns([7, 6], gap="large")
    with left:
        layer = choose_layer(loaded)
    with right:
        edge = choose_edge(loaded, prompt, texts, asked, layer)
        if edge is not None:
            cut(loaded, prompt, edge)
    with left:
        pairs(loaded, prompt, asked, layer, edge)
    if edge is not None:
        by_layer(loaded, prompt, asked, edge)


def ask(loaded: Loaded, prompt: str) -> Question:
    """The two tokens whose logits are compared at the end."""
    answer, instead = links.choice("answer", ""), links.choice("instead", "")
    own = results_flow.question(loaded.key, prompt, "", "")
    left, right = st.columns(2, gap="large")
    left.text_input("Why does it say", key="answer", placeholder=f"{own.answer_text}, which the model says itself")
    right.text_input(
        "and not", key="instead", placeholder=f"{own.instead_text}, the likeliest other word of the prompt"
    )
    return results_flow.question(loaded.key, prompt, answer or "", instead or "")


@panel
def graph(loaded: Loaded, prompt: str, asked: Question) -> None:
    """The strong edges over tokens and layers."""
    threshold = links.choice("threshold", 0.1, THRESHOLDS)
    st.select_slider(
        "Show edges that carry at least this part of the answer",
        THRESHOLDS,
        format_func=lambda part: f"{part:.0%}",
        key="threshold",
    )
    found = results_flow.graph(loaded.key, prompt, asked, threshold)
    if found.number_of_edges() > MOST_EDGES:
        st.info(f"{found.number_of_edges()} edges are more than can be read: raise the threshold.")
        return
    if not found.number_of_edges():
        st.info("No path to the answer has only edges this strong: lower the threshold.")
        return
    code = (
        f"flow = flow_contributions(model, {prompt!r}, {asked.answer}, {asked.instead})\n"
        f"graph = flow_graph(flow, threshold={threshold})\nprint(strongest_paths(graph).to_string())\n"
        "figure = flow_figure(graph)"
    )
    names = "flow_contributions, flow_graph, strongest_paths"
    views.show(
        flow_figure(found),
        "flow_graph",
        loaded,
        data=edge_table(found).to_xarray(),
        snippet=snippets.code(loaded, code, analysis=names, plots="flow_figure"),
        note="Norms, Δ, B, C and gates are held at what they were, so the edges add up to the whole exactly.",
    )
    paths = strongest_paths(found, 5)[["path", "strength", "share", "sign"]]
    st.dataframe(
        paths.assign(sign=paths["sign"].map({1: "for", -1: "against"})),
        hide_index=True,
        column_config={
            "path": st.column_config.TextColumn("Strongest paths", width="large"),
            "strength": st.column_config.NumberColumn("logits, at the weakest edge", format="%.2f"),
            "share": st.column_config.NumberColumn("of the whole", format="percent"),
            "sign": "the answer",
        },
    )


@panel
def pairs(loaded: Loaded, prompt: str, asked: Question, layer: int, edge: Edge | None) -> None:
    """What each token tells each later one in one layer; a click chooses the edge to cut."""
    kind = links.choice("flow_map", "answer", MAPS)
    st.segmented_control("Token to token", list(MAPS), format_func=MAPS.get, key="flow_map", required=True)
    if kind == "answer":
        values = results_flow.flow(loaded.key, prompt, asked)["state"].sel(layer=layer)
        values = values.rename("logits").assign_attrs(layer=layer)
        title = f"What layer {layer} carries of {asked.answer_text} − {asked.instead_text}, in logits"
        code = (
            f"flow = flow_contributions(model, {prompt!r}, {asked.answer}, {asked.instead})\n"
            f'state = flow["state"].sel(layer={layer}).rename("logits").assign_attrs(layer={layer})\n'
            "figure = contribution_heatmap(state, clip=1.0)"
        )
        snippet = snippets.code(loaded, code, analysis="flow_contributions", plots="contribution_heatmap")
    else:
        values = results_flow.attention(loaded.key, prompt, layer)
        title = f"Hidden attention of layer {layer}, mean over channels"
        code = f"figure = contribution_heatmap(hidden_attention(model, {prompt!r}, {layer}))"
        snippet = snippets.code(loaded, code, analysis="hidden_attention", plots="contribution_heatmap")
    shown = readable(values, "flow_all")
    figure = contribution_heatmap(shown, title=title, clip=1.0 if kind == "answer" else 0.99)
    views.show(
        clickable(figure, _cell_of(shown, edge)),
        "flow_pairs",
        loaded,
        data=values,
        snippet=snippet,
        note="Click a cell to cut that edge.",
        on_click=lambda row, column: _take_edge(shown, row, column),
    )


def _cell_of(shown: xr.DataArray, edge: Edge | None) -> tuple[int, int] | None:
    """Row and column of an edge, if the map shows it."""
    if edge is None:
        return None
    rows, columns = (_positions(shown, dim) for dim in ("target", "source"))
    return (
        (rows.index(edge.target), columns.index(edge.source))
        if edge.target in rows and edge.source in columns
        else None
    )


def _positions(shown: xr.DataArray, dim: str) -> list[int]:
    """The positions in labels like "4 Emma"."""
    return [int(str(label).split()[0]) for label in shown[dim].values]


def _take_edge(shown: xr.DataArray, row: int, column: int) -> None:
    target, source = _positions(shown, "target")[row], _positions(shown, "source")[column]
    if source <= target:
        st.session_state["source"], st.session_state["token"] = source, target


def choose_edge(loaded: Loaded, prompt: str, texts: list[str], asked: Question, layer: int) -> Edge | None:
    """What to cut, and in which layers; to begin with, what the last token reads most of the answer from."""
    st.markdown("#### Cut an edge")
    reads = results_flow.flow(loaded.key, prompt, asked)["state"].sel(layer=layer).isel(target=-1)
    source = choose_token(texts, "The source: what this token wrote", "source", first=int(abs(reads).argmax("source")))
    target = choose_token(texts, "is not read by the target")
    n_layers = loaded.model.cfg.n_layers
    everywhere = links.choice("cut", "layer", ("layer", "all"))
    st.segmented_control(
        "from the state of",
        ("layer", "all"),
        format_func=lambda cut: f"layer {layer}" if cut == "layer" else f"all {n_layers} layers",
        key="cut",
        required=True,
    )
    decay: Decay = links.choice("decay", "kept", DECAYS)
    st.segmented_control(
        "Decay at the source",
        DECAYS,
        key="decay",
        required=True,
        help="Kept: the state fades at the source as it did. Skipped: to the target it is as if the source were not "
        "there at all (Δ = 0).",
    )
    if source > target:
        st.info("The source comes after the target, which cannot read it: choose an earlier source.")
        return None
    return Edge(source, target, (layer,) if everywhere == "layer" else tuple(range(n_layers)), decay)


def _knockout(edge: Edge) -> str:
    layers = edge.layers[0] if len(edge.layers) == 1 else f"range({len(edge.layers)})"
    return f"knockout({layers}, sources={edge.source}, targets={edge.target}, decay={edge.decay!r})"


@panel
def cut(loaded: Loaded, prompt: str, edge: Edge) -> None:
    """The answer with and without the edge."""
    found = results_flow.cut(loaded.key, prompt, edge)
    code = (
        f'runs = {{"as it is": [], "edge cut": [{_knockout(edge)}]}}\n'
        f"figure = answer_bars(intervened_answers(model, {prompt!r}, runs, k=3))"
    )
    views.show(
        answer_bars(found, title="The answer, with the edge and without"),
        "flow_cut",
        loaded,
        data=found,
        snippet=snippets.code(
            loaded, code, analysis="intervened_answers", interventions="knockout", plots="answer_bars"
        ),
    )


@panel
def by_layer(loaded: Loaded, prompt: str, asked: Question, edge: Edge) -> None:
    """The same cut in one layer at a time."""
    found = results_flow.by_layer(loaded.key, prompt, asked, edge)
    (source,) = found["source"].values
    code = (
        f"def difference(logits):\n    return logits[:, -1, {asked.answer}] - logits[:, -1, {asked.instead}]\n\n\n"
        f"sources = {{{str(source)!r}: {edge.source}}}\n"
        f"sweep = knockout_sweep(model, {prompt!r}, difference, sources, {edge.target}, decay={edge.decay!r})\n"
        "figure = knockout_curves(sweep)"
    )
    views.show(
        knockout_curves(found, title="The same cut, in one layer at a time"),
        "flow_layers",
        loaded,
        data=found,
        snippet=snippets.code(loaded, code, analysis="knockout_sweep", plots="knockout_curves"),
        note=f"{plain(asked.answer_text)} − {plain(asked.instead_text)} after the last token of the prompt.",
    )


page()
