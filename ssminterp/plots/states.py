"""The state itself: how large it is, what it holds after one token, and where two texts part."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from xarray import DataArray, Dataset

from ssminterp.plots.contributions import one_example
from ssminterp.plots.memory import SEQUENTIAL
from ssminterp.plots.theme import DIVERGING, themed

TEAL, BROWN = DIVERGING[-1], DIVERGING[0]


def norm_heatmap(norms: DataArray, title: str | None = None) -> go.Figure:
    """The size of every layer's state after every token, as a part of the layer's largest.

    norms: from `state_norms`, dims (layer, position); a batch of one example is shown too.

    Raises ValueError if the array has other dims.
    """
    norms = one_example(norms)
    if set(norms.dims) != {"layer", "position"}:
        raise ValueError(f"the map shows (layer, position), got {norms.dims}")
    norms = norms.transpose("layer", "position")
    numbers = norms.values
    figure = go.Figure(
        go.Heatmap(
            z=numbers / np.maximum(numbers.max(1, keepdims=True), 1e-30),
            x=norms["position"].values,
            y=norms["layer"].values,
            customdata=numbers,
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            hovertemplate="layer %{y}<br>%{x}<br>‖h‖ = %{customdata:.4g}<br>%{z:.0%} of the largest<extra></extra>",
            colorbar={"title": {"text": "of the layer's<br>largest"}, "tickformat": ".0%", "thickness": 14},
        )
    )
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="layer", dtick=1 if norms.sizes["layer"] <= 24 else 4)
    figure.update_layout(height=min(1000, 220 + 30 * norms.sizes["layer"]))
    subtitle = f"‖h‖ over channels and coordinates · {norms.attrs['model']} ({norms.attrs['dtype']})"
    return themed(figure, title or "How large the state is", subtitle)


def norm_curve(norms: DataArray, layer: int, title: str | None = None) -> go.Figure:
    """The size of one layer's state after every token.

    norms: from `state_norms`, dims (layer, position); a batch of one example is shown too.
    """
    one = one_example(norms).sel(layer=layer)
    figure = go.Figure(
        go.Scatter(
            x=one["position"].values,
            y=one.values,
            mode="lines+markers",
            line={"color": TEAL, "width": 2},
            hovertemplate="%{x}<br>‖h‖ = %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="‖h‖", rangemode="tozero")
    figure.update_layout(height=360, showlegend=False)
    subtitle = f"layer {layer}, all channels and coordinates · {norms.attrs['model']} ({norms.attrs['dtype']})"
    return themed(figure, title or "How large the state is", subtitle)


def compare_curves(compared: Dataset, layer: int, title: str | None = None) -> go.Figure:
    """The sizes of one layer's states for two texts, how far they are apart, and where the texts part.

    compared: from `compare_states`.
    """
    one = compared.sel(layer=layer)
    tokens, parts_at = one["position"].values, int(compared.attrs["parts_at"])
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.55, 0.45])
    for name, label, colour in (("norm_first", "first text", TEAL), ("norm_second", "second text", DIVERGING[1])):
        figure.add_scatter(
            x=tokens,
            y=one[name].values,
            name=label,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate="%{x}<br>‖h‖ = %{y:.4g}",
            row=1,
            col=1,
        )
    figure.add_bar(
        x=tokens,
        y=one["distance"].values,
        marker_color=BROWN,
        showlegend=False,
        hovertemplate="%{x}<br>%{y:.3g} of the mean ‖h‖<extra></extra>",
        row=2,
        col=1,
    )
    if parts_at < len(tokens):
        figure.add_vline(parts_at - 0.5, line={"color": BROWN, "dash": "dot"})
    figure.update_xaxes(type="category")
    figure.update_xaxes(title="token", tickangle=-45, automargin=True, row=2, col=1)
    figure.update_yaxes(title="‖h‖", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="distance", rangemode="tozero", row=2, col=1)
    figure.update_layout(
        height=460, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    )
    same = "the same tokens throughout" if parts_at >= len(tokens) else f"they part at position {parts_at}"
    subtitle = (
        f"layer {layer} · {same} · distance: ‖h - h′‖ over the mean ‖h‖ · "
        f"{compared.attrs['model']} ({compared.attrs['dtype']})"
    )
    return themed(figure, title or "Two texts in one layer's state", subtitle)


def state_words_figure(words: Dataset, title: str | None = None) -> go.Figure:
    """The words that every layer's state after one token comes closest to, the closest on the left.

    words: from `state_words`, dims (layer, rank); a batch of one example is shown too.

    Raises ValueError if the arrays have other dims.
    """
    logits, tokens = (one_example(words[name]) for name in ("logit", "token"))
    if set(logits.dims) != {"layer", "rank"}:
        raise ValueError(f"the words are shown by (layer, rank), got {logits.dims}")
    numbers = logits.transpose("layer", "rank").values
    limit = max(float(np.abs(numbers).max()), 1e-12)
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=words["rank"].values,
            y=words["layer"].values,
            text=tokens.transpose("layer", "rank").values,
            texttemplate="%{text}",
            textfont={"size": 12},
            zmin=-limit if numbers.min() < 0 else 0.0,
            zmax=limit,
            colorscale=DIVERGING if numbers.min() < 0 else SEQUENTIAL,
            hovertemplate="layer %{y}: %{text}<br>adds %{z:.3g} to its logit<extra></extra>",
            colorbar={"title": {"text": "adds to<br>the logit"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="rank", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    figure.update_layout(height=200 + 30 * numbers.shape[0])
    attrs = words.attrs
    subtitle = (
        f"the state after {words['position'].item()}, read at {attrs['read_at']} · {attrs['model']} ({attrs['dtype']})"
    )
    return themed(figure, title or "What each layer's state would say", subtitle)


def state_heatmap(state: DataArray, n: int = 40, title: str | None = None) -> go.Figure:
    """The state after one token, channels with the largest coordinates first.

    state: one position of `states_at`, dims (channel, coordinate); a batch of one example is shown too.
    n: channels to show; the subtitle says which part of ‖h‖² they hold.

    Raises ValueError if the array has other dims, or n is no positive number.
    """
    state = one_example(state)
    if set(state.dims) != {"channel", "coordinate"}:
        raise ValueError(f"the map shows (channel, coordinate), got {state.dims}: select one position")
    if n < 1:
        raise ValueError(f"n={n} channels were asked for: at least 1")
    numbers = state.transpose("channel", "coordinate").values
    order = np.argsort(-np.abs(numbers).max(1), kind="stable")[:n]
    shown = numbers[order].T
    limit = max(float(np.abs(shown).max()), 1e-12)
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            x=[str(channel) for channel in state["channel"].values[order]],
            y=state["coordinate"].values,
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            hovertemplate="channel %{x}, coordinate %{y}<br>h = %{z:.4g}<extra></extra>",
            colorbar={"title": {"text": "h"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="channel, the largest first", type="category", tickangle=-90, automargin=True)
    figure.update_yaxes(title="coordinate", dtick=1 if shown.shape[0] <= 16 else 4)
    figure.update_layout(height=max(340, 200 + 17 * shown.shape[0]))
    held = float((shown**2).sum() / max(float((numbers**2).sum()), 1e-30))
    at = f" after {state['position'].item()}" if "position" in state.coords else ""
    subtitle = (
        f"layer {state.attrs['layer']}{at} · {len(order)} of {numbers.shape[0]} channels, {held:.0%} of ‖h‖² · "
        f"{state.attrs['model']} ({state.attrs['dtype']})"
    )
    return themed(figure, title or "What the state holds", subtitle)
