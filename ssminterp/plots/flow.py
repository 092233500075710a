"""The flow graph: tokens below, layers upwards, the strong edges drawn as wide as they are strong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from ssminterp.plots.theme import themed

# Okabe and Ito's colours, which readers with any colour vision can tell apart.
COLOURS = {"residual": "#9aa5b1", "conv": "#e69f00", "state": "#0072b2", "own": "#009e73"}
MEANINGS = {
    "residual": "residual stream",
    "conv": "conv, into x",
    "state": "state, to a later token",
    "own": "x to its own token",
}
# x stands to the right of its token's residual stream, above the layer before; the state's edges run above it.
X_SHIFT, X_HEIGHT = 0.28, 0.35
LOWEST_LANE, HIGHEST_LANE = 0.5, 0.85
NARROWEST, WIDEST = 1.0, 9.0
N_LABELS = 8
MOST_LABELS = 40


def flow_figure(graph: nx.DiGraph, title: str | None = None) -> go.Figure:
    """The graph of `flow_graph`: a column for every token, a row after every layer.

    Width is an edge's weight, colour its kind, and dashes say that it works against the answer. The strongest edges
    that lead from token to token have their weight beside them; hover for the others.

    Raises ValueError if the graph is not one of `flow_graph`.
    """
    missing = [name for name in ("tokens", "n_layers", "total", "threshold", "of") if name not in graph.graph]
    if missing:
        raise ValueError(f"the graph lacks {', '.join(missing)}: draw what flow_graph gave")
    about = graph.graph
    tokens, n_layers = list(about["tokens"]), int(about["n_layers"])
    figure = go.Figure([_grid(len(tokens), n_layers)])
    strongest = max((abs(weight) for *_, weight in graph.edges(data="weight")), default=1.0)
    in_order = sorted(graph.edges(data=True), key=lambda edge: abs(edge[2]["weight"]))
    ways = _ways(graph)
    figure.add_traces([_edge_trace(graph, edge, ways[edge[:2]], strongest) for edge in in_order])
    figure.add_traces([_hover_points(graph, ways), _node_trace(graph)])
    figure.add_traces(
        _legend({edge["kind"] for *_, edge in in_order}, any(e["weight"] * about["total"] < 0 for *_, e in in_order))
    )
    _annotate(figure, in_order, ways)
    # Of many tokens, those that the graph passes through.
    through = {position for _, position in graph.nodes(data="position")}
    named = [i for i in range(len(tokens)) if len(tokens) <= MOST_LABELS or i in through]
    figure.update_xaxes(tickvals=named, ticktext=[tokens[i] for i in named], tickangle=-45, title="token")
    figure.update_xaxes(showgrid=False, zeroline=False, range=[-0.6, len(tokens) - 0.2])
    rows = ["embedding", *(f"after layer {layer}" for layer in range(n_layers))]
    figure.update_yaxes(tickvals=list(range(n_layers + 1)), ticktext=rows, zeroline=False, range=[-0.4, n_layers + 0.5])
    figure.update_layout(height=max(420, 230 + 84 * n_layers), width=min(1600, max(820, 340 + 54 * len(tokens))))
    end = f" at {about['end']}" if about.get("end") else ""
    subtitle = (
        f"{about['of']}{end}: {about['total']:.2f} · {graph.number_of_edges()} edges of at least "
        f"{about['threshold']:.0%} of it · {about.get('weights', 'weight')} · {about['model']} ({about['dtype']})"
    )
    return themed(figure, title or "How the answer comes about", subtitle)


def _place(graph: nx.DiGraph, node: str) -> tuple[float, float]:
    of_node = graph.nodes[node]
    if of_node["role"] == "x":
        return of_node["position"] + X_SHIFT, of_node["layer"] + X_HEIGHT
    return float(of_node["position"]), float(of_node["depth"])


Way: TypeAlias = list[tuple[float, float]]


def _ways(graph: nx.DiGraph) -> dict[tuple[str, str], Way]:
    """The points that every edge's line goes through.

    Each edge of a state has a lane of its own: from the earliest source the highest, so that they do not cross.
    """
    ways = {(s, r): [_place(graph, s), _place(graph, r)] for s, r in graph.edges()}
    by_layer: dict[int, list[tuple[int, int, str, str]]] = {}
    for sender, receiver, edge in graph.edges(data=True):
        if edge["kind"] == "state":
            by_layer.setdefault(edge["layer"], []).append((edge["source"], -edge["target"], sender, receiver))
    for layer, edges in by_layer.items():
        lanes = np.linspace(HIGHEST_LANE, LOWEST_LANE, len(edges)) if len(edges) > 1 else [HIGHEST_LANE]
        for (*_, sender, receiver), lane in zip(sorted(edges), lanes, strict=True):
            start, end = ways[sender, receiver]
            height = layer + float(lane)
            ways[sender, receiver] = [start, (start[0] + 0.2, height), (end[0] - 0.3, height), end]
    return ways


def _middle(way: Way) -> tuple[float, float]:
    """The middle of the longest stretch."""
    stretches = sorted(pairwise(way), key=lambda pair: abs(pair[1][0] - pair[0][0]))
    (x0, y0), (x1, y1) = stretches[-1]
    return (x0 + x1) / 2, (y0 + y1) / 2


def _grid(n_tokens: int, n_layers: int) -> go.Scatter:
    columns, rows = np.meshgrid(np.arange(n_tokens), np.arange(n_layers + 1))
    return go.Scatter(
        x=columns.ravel(),
        y=rows.ravel(),
        mode="markers",
        marker={"size": 3, "color": "#d3d9e0"},
        hoverinfo="skip",
        showlegend=False,
    )


def _edge_trace(graph: nx.DiGraph, edge: tuple[str, str, dict[str, Any]], way: Way, strongest: float) -> go.Scatter:
    weight, kind = edge[2]["weight"], edge[2]["kind"]
    return go.Scatter(
        x=[x for x, _ in way],
        y=[y for _, y in way],
        mode="lines",
        line={
            "width": NARROWEST + (WIDEST - NARROWEST) * abs(weight) / strongest,
            "color": COLOURS[kind],
            "dash": "solid" if weight * graph.graph["total"] > 0 else "dot",
        },
        opacity=0.8,
        hoverinfo="skip",
        showlegend=False,
    )


def _hover_points(graph: nx.DiGraph, ways: dict[tuple[str, str], Way]) -> go.Scatter:
    """Lines have no hover text between their ends: an unseen point on each edge has it."""
    middles = [_middle(ways[edge]) for edge in graph.edges()]
    return go.Scatter(
        x=[x for x, _ in middles],
        y=[y for _, y in middles],
        mode="markers",
        marker={"size": 14, "opacity": 0},
        text=[label for *_, label in graph.edges(data="label")],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _node_trace(graph: nx.DiGraph) -> go.Scatter:
    places = [_place(graph, node) for node in graph]
    in_x = [role == "x" for _, role in graph.nodes(data="role")]
    weights = [weight for _, weight in graph.nodes(data="weight")]
    return go.Scatter(
        x=[x for x, _ in places],
        y=[y for _, y in places],
        mode="markers",
        marker={
            "size": [8 if x else 10 for x in in_x],
            "symbol": ["diamond" if x else "circle" for x in in_x],
            "color": ["#ffffff" if x else "#1f2933" for x in in_x],
            "line": {"color": "#1f2933", "width": 1.5},
        },
        text=[
            node if weight is None else f"{node}<br>carries {weight:+.3g}"
            for node, weight in zip(graph, weights, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _legend(kinds: set[str], has_negative: bool) -> list[go.Scatter]:
    def entry(name: str, colour: str, dash: str) -> go.Scatter:
        line = {"color": colour, "dash": dash, "width": 4}
        return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name, hoverinfo="skip")

    shown = [entry(MEANINGS[kind], colour, "solid") for kind, colour in COLOURS.items() if kind in kinds]
    return [*shown, entry("against the answer", "#1f2933", "dot")] if has_negative else shown


def _annotate(
    figure: go.Figure, in_order: list[tuple[str, str, dict[str, Any]]], ways: dict[tuple[str, str], Way]
) -> None:
    """Weights beside the strongest edges that lead from token to token."""
    moving = [edge for edge in in_order if edge[2]["source"] != edge[2]["target"]]
    for sender, receiver, edge in moving[-N_LABELS:]:
        x, y = _middle(ways[sender, receiver])
        figure.add_annotation(
            x=x,
            y=y,
            text=f"{edge['weight']:+.3g}",
            showarrow=False,
            bgcolor="rgba(255, 255, 255, 0.85)",
            font={"color": COLOURS[edge["kind"]], "size": 12},
        )
