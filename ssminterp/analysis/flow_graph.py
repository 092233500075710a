"""The strong edges of a flow as a networkx graph, and its strongest paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import networkx as nx
import numpy as np
import pandas as pd
import xarray as xr

Kind: TypeAlias = Literal["residual", "conv", "state", "own"]


class WeightedEdge(NamedTuple):
    """From (position, depth) or from x of a layer, to one of these."""

    sender: str
    receiver: str
    kind: Kind
    layer: int
    source: int
    target: int
    weight: float


def flow_graph(flow: xr.Dataset, threshold: float = 0.1, *, connected: bool = True) -> nx.DiGraph:
    """The edges whose weight is at least `threshold` times the total, of either sign, as a graph.

    flow: of one example, from `flow_contributions` or `flow_patches`; average a batch whose prompts are built alike by
        `flow.mean("batch", keep_attrs=True)`.
    threshold: share of the total, at least 0.
    connected: keep only what is on a path to the answer, found from there downwards as Ferrando & Voita do.

    Nodes are strings. "4 Mary · embedding" and "4 Mary · after layer 2" are a token's residual stream, with attributes
    `role` ("residual"), `token` ("4 Mary"), `position`, `depth` (layers before it) and `weight`; the role of "4 Mary ·
    x of layer 2" is "x", and it has `layer`. Edges have `kind`, `layer`, `source`, `target` (positions), `weight`,
    `share` (of the total) and `label`. Kinds are "residual", "conv", "state" (to later tokens) and "own" (x to its own
    token: D·x and what the token reads of its own write). graph.graph holds what the flow's attributes say, `tokens`,
    `n_layers`, `total` and `threshold`.

    Raises ValueError for a batch of several examples, a threshold that is negative or no number, a flow that is not
    finite, and a total of 0.
    """
    flow = one_flow(flow)
    total = float(flow["total"])
    if not threshold >= 0:
        raise ValueError(f"threshold is a share of the total, at least 0, got {threshold}")
    if not np.isfinite(total) or total == 0:
        raise ValueError(f"the flow's total is {total}: edges can be no share of it")
    tokens = [str(token) for token in flow["source"].values]
    n_layers = flow.sizes["layer"]
    graph = nx.DiGraph(
        **{str(name): value for name, value in flow.attrs.items()},
        total=total,
        threshold=float(threshold),
        tokens=tokens,
        n_layers=n_layers,
    )
    for edge in _edges(flow, tokens):
        if abs(edge.weight) >= threshold * abs(total) and edge.weight != 0:
            _add(graph, edge, tokens, total)
    if connected:
        end = str(flow.attrs.get("end") or "")
        ends = [_resid(token, n_layers) for token in tokens if end in ("", token)]
        graph.remove_nodes_from(set(graph) - _leading_to(graph, ends))
    _weigh_nodes(graph, flow)
    return graph


def edge_table(graph: nx.DiGraph) -> pd.DataFrame:
    """The edges of a graph of `flow_graph` as rows, the strongest first: sender, receiver and the edges' attributes."""
    table = nx.to_pandas_edgelist(graph, "sender", "receiver")
    columns = ["sender", "receiver", "kind", "layer", "source", "target", "weight", "share"]
    return table.reindex(columns=columns).sort_values("weight", key=abs, ascending=False, ignore_index=True)


def one_flow(flow: xr.Dataset) -> xr.Dataset:
    """The flow without its batch axis. Raises ValueError if it holds several examples, or is no flow."""
    missing = [name for name in ("residual", "conv", "state", "skip", "total") if name not in flow]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}: pass what flow_contributions or flow_patches gave")
    if "batch" not in flow.dims:
        return flow
    if flow.sizes["batch"] > 1:
        raise ValueError(
            f"the flow holds {flow.sizes['batch']} examples: select one with isel(batch=0), or average prompts that "
            'are built alike with mean("batch", keep_attrs=True)'
        )
    return flow.isel(batch=0, drop=True)


def strongest_paths(graph: nx.DiGraph, n: int = 10) -> pd.DataFrame:
    """The strongest path to the answer from every node that nothing leads to, strongest first.

    Those nodes are embeddings, or where an edge below the threshold was left out. A path is as strong as its weakest
    edge. Columns: start (a node), strength (that edge's weight without its sign), share (of the total), sign (the
    product of the edges' signs) and path, in which only steps through a mixer are named.

    Raises ValueError if n is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    onward: dict[str, tuple[float, str | None]] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        ways = [
            (min(onward[after][0], abs(graph.edges[node, after]["weight"])), after)
            for after in graph.successors(node)
            if after in onward
        ]
        if graph.nodes[node].get("depth") == graph.graph["n_layers"]:
            onward[node] = (float("inf"), None)
        elif ways:
            onward[node] = max(ways)
    starts = [node for node, (_, after) in onward.items() if after and not graph.in_degree(node)]
    table = pd.DataFrame([_path_row(graph, node, onward) for node in starts], columns=PATH_COLUMNS)
    return table.sort_values("strength", ascending=False, ignore_index=True, kind="stable").head(n)


PATH_COLUMNS = ["start", "strength", "share", "sign", "path"]


def _path_row(graph: nx.DiGraph, start: str, onward: dict[str, tuple[float, str | None]]) -> list[object]:
    strength, after = onward[start]
    node, sign, moves = start, 1.0, [str(graph.nodes[start]["token"])]
    while after is not None:
        edge = graph.edges[node, after]
        sign *= np.sign(edge["weight"])
        if edge["source"] != edge["target"]:
            moves.append(f"({edge['kind']} of layer {edge['layer']}) {graph.nodes[after]['token']}")
        elif edge["kind"] == "own":
            moves.append(f"(x of layer {edge['layer']})")
        node, after = after, onward[after][1]
    return [start, strength, strength / abs(graph.graph["total"]), int(sign), " → ".join(moves)]


def _edges(flow: xr.Dataset, tokens: list[str]) -> Iterator[WeightedEdge]:
    """Every edge that there is."""
    residual, conv, skip = (flow[name].values for name in ("residual", "conv", "skip"))
    state = flow["state"].transpose("layer", "target", "source").values
    for layer in range(flow.sizes["layer"]):
        for t, token in enumerate(tokens):
            before, x, after = _resid(token, layer), _x(token, layer), _resid(token, layer + 1)
            yield WeightedEdge(before, after, "residual", layer, t, t, float(residual[layer, t]))
            for back in range(min(flow.sizes["back"], t + 1)):
                sender = _resid(tokens[t - back], layer)
                yield WeightedEdge(sender, x, "conv", layer, t - back, t, float(conv[layer, t, back]))
            for s in range(t):
                yield WeightedEdge(_x(tokens[s], layer), after, "state", layer, s, t, float(state[layer, t, s]))
            yield WeightedEdge(x, after, "own", layer, t, t, float(skip[layer, t] + state[layer, t, t]))


def _resid(token: str, depth: int) -> str:
    return f"{token} · after layer {depth - 1}" if depth else f"{token} · embedding"


def _x(token: str, layer: int) -> str:
    return f"{token} · x of layer {layer}"


def _add(graph: nx.DiGraph, edge: WeightedEdge, tokens: list[str], total: float) -> None:
    from_x, to_x = edge.kind in ("state", "own"), edge.kind == "conv"
    for node, position, in_x, depth in (
        (edge.sender, edge.source, from_x, edge.layer),
        (edge.receiver, edge.target, to_x, edge.layer + 1),
    ):
        place = {"role": "x", "layer": edge.layer} if in_x else {"role": "residual", "depth": depth}
        graph.add_node(node, token=tokens[position], position=position, **place)
    share = edge.weight / total
    moved = "" if edge.source == edge.target else f"{tokens[edge.source]} → {tokens[edge.target]}, "
    label = f"{edge.kind} of layer {edge.layer}: {moved or tokens[edge.source] + ', '}{edge.weight:+.3g} ({share:.0%})"
    of_edge = {"kind": edge.kind, "layer": edge.layer, "source": edge.source, "target": edge.target}
    graph.add_edge(edge.sender, edge.receiver, **of_edge, weight=edge.weight, share=share, label=label)


def _leading_to(graph: nx.DiGraph, ends: list[str]) -> set[str]:
    """The nodes from which one of `ends` can be reached, and these."""
    found: set[str] = set()
    for node in ends:
        if node in graph:
            found |= {node} | nx.ancestors(graph, node)
    return found


def _weigh_nodes(graph: nx.DiGraph, flow: xr.Dataset) -> None:
    """`weight` of the residual nodes, where the flow has it."""
    if "node" not in flow:
        return
    weights = flow["node"].transpose("depth", "position").values
    for _, of_node in graph.nodes(data=True):
        if of_node["role"] == "residual":
            of_node["weight"] = float(weights[of_node["depth"], of_node["position"]])
