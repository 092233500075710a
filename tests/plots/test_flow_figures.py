"""The figure of a flow graph: every edge a line as wide as it is strong, tokens below and layers upwards."""

import networkx as nx
import pytest
from tiny_models import hooked, random_tokens

from ssminterp.analysis import flow_contributions, flow_graph
from ssminterp.plots import flow_figure
from ssminterp.plots.flow import COLOURS


@pytest.fixture
def graph() -> nx.DiGraph:
    return flow_graph(flow_contributions(hooked(), random_tokens(1, 5), 3, 4), 0.05)


def test_every_edge_is_drawn_by_its_kind_width_and_sign(graph: nx.DiGraph) -> None:
    figure = flow_figure(graph)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]
    assert len(lines) == graph.number_of_edges() > 10
    edges = sorted(graph.edges(data=True), key=lambda edge: abs(edge[2]["weight"]))
    for line, (_, receiver, edge) in zip(lines, edges, strict=True):
        assert line.line.color == COLOURS[edge["kind"]]
        assert (line.line.dash == "dot") == (edge["weight"] * graph.graph["total"] < 0)
        of_node = graph.nodes[receiver]
        if of_node["role"] == "residual":
            assert (line.x[-1], line.y[-1]) == (of_node["position"], of_node["depth"])
        assert list(line.y) == sorted(line.y)
    widths = [line.line.width for line in lines]
    assert widths == sorted(widths)
    hover = next(trace for trace in figure.data if trace.marker.opacity == 0)
    assert list(hover.text) == [label for *_, label in graph.edges(data="label")]


def test_titles_and_axes_say_what_is_shown(graph: nx.DiGraph) -> None:
    figure = flow_figure(graph)
    for part in (f"{graph.number_of_edges()} edges of at least 5%", "contribution", graph.graph["of"]):
        assert part in figure.layout.title.text
    assert list(figure.layout.xaxis.ticktext) == graph.graph["tokens"]
    assert list(figure.layout.yaxis.ticktext) == ["embedding", "after layer 0", "after layer 1", "after layer 2"]


def test_of_many_tokens_those_are_named_that_the_graph_passes_through() -> None:
    graph = flow_graph(flow_contributions(hooked(), random_tokens(1, 60), 3, 4), 0.2)
    axis = flow_figure(graph).layout.xaxis
    assert set(axis.tickvals) == {position for _, position in graph.nodes(data="position")}
    assert 0 < len(axis.ticktext) < 60
    assert all(label.startswith(f"{place} ") for place, label in zip(axis.tickvals, axis.ticktext, strict=True))


def test_an_empty_graph_shows_tokens_and_layers() -> None:
    graph = flow_graph(flow_contributions(hooked(), random_tokens(1, 5), 3, 4), 1e9)
    figure = flow_figure(graph)
    assert "0 edges" in figure.layout.title.text
    assert len(figure.layout.xaxis.ticktext) == 5


def test_other_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="draw what flow_graph gave"):
        flow_figure(nx.DiGraph())
