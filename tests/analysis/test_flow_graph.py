"""Graphs of strong edges and their strongest paths, on flows written by hand."""

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import hooked, random_tokens

from ssminterp.analysis import edge_table, flow_contributions, flow_graph, strongest_paths

TOKENS = ["0 John", "1 and", "2 gave", "3 to"]


def by_hand() -> xr.Dataset:
    """John → (tap one back of layer 0) and → (state of layer 1) to, 6 of 10, and against it: gave → (x of layer 1)."""
    layers, n, total = 2, len(TOKENS), 10.0
    values = {
        "residual": np.zeros((layers, n)),
        "conv": np.zeros((layers, n, 2)),
        "state": np.zeros((layers, n, n)),
        "skip": np.zeros((layers, n)),
    }
    values["conv"][0, 1, 1] = values["conv"][1, 1, 0] = 7.0
    values["skip"][0, 1] = 4.0
    values["state"][0, 1, 1] = 2.0
    values["state"][1, 3, 1] = 6.5
    values["conv"][1, 2, 0] = values["state"][1, 3, 2] = -3.0
    values["residual"][0, 0] = 9.0
    dims = {
        "residual": ("layer", "position"),
        "conv": ("layer", "position", "back"),
        "state": ("layer", "target", "source"),
        "skip": ("layer", "position"),
    }
    flow = xr.Dataset(
        {name: (dims[name], value) for name, value in values.items()} | {"total": total},
        coords=dict.fromkeys(("position", "target", "source"), TOKENS),
    )
    return flow.assign_attrs(of="logit of Mary", end="3 to", weights="contribution", model="m", dtype="float32")


def test_strong_edges_that_lead_to_the_answer_are_kept() -> None:
    graph = flow_graph(by_hand(), 0.25)
    weights = {(s, r): round(w, 3) for s, r, w in graph.edges(data="weight")}
    assert weights == {
        ("0 John · embedding", "1 and · x of layer 0"): 7.0,
        ("1 and · x of layer 0", "1 and · after layer 0"): 6.0,
        ("1 and · after layer 0", "1 and · x of layer 1"): 7.0,
        ("1 and · x of layer 1", "3 to · after layer 1"): 6.5,
        ("2 gave · after layer 0", "2 gave · x of layer 1"): -3.0,
        ("2 gave · x of layer 1", "3 to · after layer 1"): -3.0,
    }
    assert graph.edges["1 and · x of layer 1", "3 to · after layer 1"] == {
        "kind": "state",
        "layer": 1,
        "source": 1,
        "target": 3,
        "weight": 6.5,
        "share": 0.65,
        "label": "state of layer 1: 1 and → 3 to, +6.5 (65%)",
    }
    assert graph.nodes["1 and · x of layer 1"] == {"token": "1 and", "position": 1, "role": "x", "layer": 1}
    assert flow_graph(by_hand(), 0.25, connected=False).number_of_edges() == 7
    assert flow_graph(by_hand(), 0.65).number_of_edges() == 2
    assert flow_graph(by_hand(), 1.5).number_of_nodes() == 0


def test_edges_as_a_table_the_strongest_first() -> None:
    graph = flow_graph(by_hand(), 0.1)
    table = edge_table(graph)
    assert len(table) == graph.number_of_edges()
    assert (np.diff(table["weight"].abs()) <= 0).all()
    for edge in table.itertuples():
        assert graph.edges[edge.sender, edge.receiver]["share"] == edge.share
    assert edge_table(nx.DiGraph()).empty


def test_a_path_is_as_strong_as_its_weakest_edge() -> None:
    table = strongest_paths(flow_graph(by_hand(), 0.25))
    assert table.to_dict("records") == [
        {
            "start": "0 John · embedding",
            "strength": 6.0,
            "share": 0.6,
            "sign": 1,
            "path": "0 John → (conv of layer 0) 1 and → (x of layer 0) → (state of layer 1) 3 to",
        },
        {
            "start": "2 gave · after layer 0",
            "strength": 3.0,
            "share": 0.3,
            "sign": 1,
            "path": "2 gave → (state of layer 1) 3 to",
        },
    ]
    assert len(strongest_paths(flow_graph(by_hand(), 0.25), n=1)) == 1
    assert strongest_paths(flow_graph(by_hand(), 2.0)).empty
    with pytest.raises(ValueError, match="n must be at least 1"):
        strongest_paths(flow_graph(by_hand()), 0)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 3))
def test_a_higher_threshold_keeps_a_part(a: float, b: float, seed: int) -> None:
    flow = flow_contributions(hooked(seed=seed), random_tokens(1, 6, seed), 3, 4)
    low, high = (flow_graph(flow, threshold) for threshold in sorted((a, b)))
    assert set(high.edges) <= set(low.edges)
    assert nx.is_directed_acyclic_graph(low)
    end = f"{flow.attrs['end']} · after layer 2"
    assert all(nx.has_path(high, node, end) for node in high)
    assert all(
        abs(weight) >= high.graph["threshold"] * abs(high.graph["total"]) for *_, weight in high.edges(data="weight")
    )


def test_with_no_threshold_every_edge_to_the_answer_is_there(tmp_path: Path) -> None:
    flow = flow_contributions(hooked(), random_tokens(1, 4), 3, 4)
    graph = flow_graph(flow, 0.0)
    last = [edge for *_, edge in graph.edges(data=True) if edge["layer"] == 2 and edge["kind"] in ("state", "own")]
    assert sorted(edge["source"] for edge in last) == [0, 1, 2, 3]
    into_end = sum(edge["weight"] for *_, edge in graph.in_edges(f"{flow.attrs['end']} · after layer 2", data=True))
    assert into_end == pytest.approx(flow["total"].item(), rel=1e-4)
    graph.graph.pop("tokens")
    nx.write_graphml(graph, tmp_path / "flow.graphml")


def test_bad_input_is_named(as_users_run_it: None) -> None:
    model = hooked()
    with pytest.raises(ValueError, match="holds 2 examples"):
        flow_graph(flow_contributions(model, random_tokens(2, 4), 3, 4))
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="threshold is a share"):
            flow_graph(by_hand(), threshold)
    with pytest.raises(ValueError, match="lacks conv"):
        flow_graph(by_hand().drop_vars("conv"))
    with pytest.raises(ValueError, match="total is nan"):
        flow_graph(by_hand().assign(total=float("nan")))
