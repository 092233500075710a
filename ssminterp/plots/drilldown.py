"""One cell of a patching map from near: tokens that gain and lose, channels and state coordinates."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from xarray import DataArray, Dataset

from ssminterp.patching.results import changed_and_source
from ssminterp.plots.theme import DIVERGING, themed

BEFORE, AFTER = DIVERGING[1], DIVERGING[-1]


def changed_tokens_figure(changed: Dataset, title: str | None = None) -> go.Figure:
    """The logits of the tokens that a cell changes most, before and after: the largest change on top.

    changed: from `changed_tokens`, dims (token).

    Raises ValueError if the arrays have other dims.
    """
    if changed["change"].dims != ("token",):
        raise ValueError(f"the figure shows (token), got {changed['change'].dims}")
    rows = list(range(changed.sizes["token"]))
    names = [str(token).strip() or repr(str(token)) for token in changed["token"].values]
    sides = (("before", "before", BEFORE, "circle-open"), ("after", "after the change", AFTER, "circle"))
    figure = go.Figure(
        [
            go.Scatter(
                x=changed[side].values,
                y=rows,
                mode="markers",
                marker={"color": colour, "size": 11, "symbol": symbol, "line": {"width": 2}},
                name=label,
                customdata=np.column_stack([np.array(names, dtype=object), changed[f"probability_{side}"].values]),
                hovertemplate="%{customdata[0]}<br>logit %{x:.2f}<br>probability %{customdata[1]:.2%}<extra></extra>",
            )
            for side, label, colour, symbol in sides
        ]
    )
    for row in rows:
        ends = [float(changed[side].values[row]) for side in ("before", "after")]
        figure.add_shape(type="line", x0=ends[0], x1=ends[1], y0=row, y1=row, line={"color": AFTER, "width": 2})
    figure.update_shapes(layer="below")
    figure.update_yaxes(tickvals=rows, ticktext=names, autorange="reversed", automargin=True)
    figure.update_xaxes(title="logit at the last token")
    figure.update_layout(height=170 + 26 * len(rows), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    attrs = changed.attrs
    subtitle = (
        f"{attrs['hook']} of layer {attrs['layer']} at {attrs['position']} · prompt pair {attrs['example']}, "
        f"the {attrs['changed_run']} run · {attrs['model']} ({attrs['dtype']})"
    )
    return themed(figure, title or "Tokens that it changes most", subtitle)


def parts_bars(
    exact: DataArray, estimated: DataArray | None = None, n: int | None = None, title: str | None = None
) -> go.Figure:
    """How far each part of a cell alone moves the metric from the changed run (0) to the source run (1).

    exact: of one cell, by channel or by coordinate, from `patch_sweep`. estimated: the same parts from
        `attribution_patch`, shown as marks. n: only the largest ones, ordered; None keeps all in their order.

    Raises ValueError if the arrays have other dims, or the baselines are equal.
    """
    if exact.dims not in (("channel",), ("coordinate",)):
        raise ValueError(f"the bars show (channel) or (coordinate), got {exact.dims}")
    (dim,) = map(str, exact.dims)
    moved = share_moved(exact)
    if n is not None:
        moved = moved[np.argsort(-np.abs(moved.values), kind="stable")[:n]]
    labels = [str(label) for label in moved[dim].values]
    colours = [DIVERGING[-1] if value >= 0 else DIVERGING[0] for value in moved.values]
    hover = f"{dim} %{{x}}<br>%{{y:.3f}}<extra></extra>"
    figure = go.Figure(go.Bar(x=labels, y=moved.values, marker_color=colours, name="exact patch", hovertemplate=hover))
    if estimated is not None:
        marks = share_moved(estimated.sel({dim: labels}))
        figure.add_trace(
            go.Scatter(
                x=labels,
                y=marks.values,
                mode="markers",
                name="attribution (one gradient)",
                marker={"color": DIVERGING[1], "symbol": "diamond", "size": 8},
                hovertemplate=f"attribution · {hover}",
            )
        )
    figure.update_xaxes(title=f"{dim}{', the largest first' if n is not None else ''}", type="category")
    figure.update_yaxes(title=f"share of the way to {changed_and_source(exact)[1]}")
    figure.update_layout(
        height=340, showlegend=estimated is not None, legend={"orientation": "h", "y": 1.03, "yanchor": "bottom"}
    )
    return themed(figure, title or f"Each {dim} alone", _where(exact))


def share_moved(values: DataArray) -> DataArray:
    """Values of a sweep, or an attribution's changes, as shares of the way from the changed run (0) to the source (1).

    Raises ValueError if the two baselines are equal.
    """
    start, goal = (values.attrs[run] for run in changed_and_source(values))
    if start == goal:
        raise ValueError(f"clean and corrupted baselines are both {goal}: there is no effect to show")
    return ((values - start) / (goal - start)).assign_attrs(values.attrs)


def channel_map(estimated: DataArray, n: int = 16, title: str | None = None) -> go.Figure:
    """What each channel and coordinate of a state brings to the metric, the strongest `n` channels on top.

    estimated: of one cell, dims (channel, coordinate), from `attribution_patch(…, by="state")`.

    Raises ValueError if the array has other dims, or n is no positive number.
    """
    if set(estimated.dims) != {"channel", "coordinate"}:
        raise ValueError(f"the map shows (channel, coordinate), got {estimated.dims}")
    if n < 1:
        raise ValueError(f"n={n} channels were asked for: at least 1")
    shares = share_moved(estimated).transpose("channel", "coordinate")
    order = np.argsort(-np.abs(shares.values).sum(1), kind="stable")[:n]
    numbers = shares.values[order]
    limit = max(float(np.abs(numbers).max()), 1e-12)
    goal = changed_and_source(estimated)[1]
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=[str(i) for i in shares["coordinate"].values],
            y=[str(channel) for channel in shares["channel"].values[order]],
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            hovertemplate="channel %{y}, coordinate %{x}<br>%{z:.4f}<extra></extra>",
            colorbar={"title": {"text": f"share of the<br>way to {goal}"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="coordinate of the state", type="category")
    figure.update_yaxes(title="channel, strongest on top", type="category", autorange="reversed")
    figure.update_layout(height=210 + 20 * len(order))
    total = float(np.abs(shares.values).sum())
    part = float(np.abs(numbers).sum()) / total if total else 0.0
    subtitle = (
        f"{len(order)} of {shares.sizes['channel']} channels, {part:.0%} of all attribution · {_where(estimated)}"
    )
    return themed(figure, title or "Where in the state: attribution", subtitle)


def _where(values: DataArray) -> str:
    attrs = values.attrs
    place = [f"{dim} {values[dim].item()}" for dim in ("hook", "layer", "position") if dim in values.coords]
    return f"{' · '.join(place)} · {attrs['examples']} prompt pairs · {attrs['model']} ({attrs['dtype']})"
