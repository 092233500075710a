"""Whole layers: metrics without each, and how often a layer is in a set."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from xarray import Dataset

from ssminterp.plots.curves import BASELINE, COLOURS, curve, layer_axis
from ssminterp.plots.theme import themed


def layer_curves(ablations: Mapping[str, Dataset], metric: str, title: str | None = None) -> go.Figure:
    """A metric by the layer that is ablated, a curve for each way to ablate, with the unchanged model's value.

    ablations: {name: from `ablate_layers`}, of the same model and prompts. metric: one of their variables.

    Raises ValueError if there are none, or one lacks the metric.
    """
    if not ablations:
        raise ValueError("there is nothing to show: pass at least one result of ablate_layers")
    lacking = [name for name, found in ablations.items() if metric not in found]
    if lacking:
        raise ValueError(f"{lacking} have no variable {metric!r}: name one that all of them have")
    figure, first = go.Figure(), next(iter(ablations.values()))
    for i, (name, found) in enumerate(ablations.items()):
        figure.add_trace(curve(i, name, found["layer"].values.tolist(), found[metric].values))
    baseline = first[metric].attrs["baseline"]
    figure.add_hline(baseline, line=BASELINE)
    layer_axis(figure, first["layer"].values.tolist(), "ablated layer")
    figure.update_yaxes(title=metric.replace("_", " "), rangemode="tozero")
    subtitle = (
        f"{metric.replace('_', ' ')} of the unchanged model {baseline:.2f} (dotted) · {first.attrs['examples']} "
        f"prompts · {first.attrs['model']} ({first.attrs['dtype']})"
    )
    return themed(figure, title or "What is lost without each layer", subtitle)


def share_bars(shares: pd.Series, subtitle: str, title: str | None = None) -> go.Figure:
    """In what share of the sets each layer is. shares: by layer, 0 to 1."""
    figure = go.Figure(
        go.Bar(
            x=[str(layer) for layer in shares.index],
            y=shares.to_numpy(),
            marker_color=COLOURS[0],
            hovertemplate="layer %{x}: %{y:.0%} of the sets<extra></extra>",
        )
    )
    figure.update_xaxes(title="layer", type="category", nticks=24)
    figure.update_yaxes(title="share of the sets", range=[0, 1.05], tickformat=".0%")
    figure.update_layout(height=380, width=min(1200, max(620, 260 + 40 * len(shares))))
    return themed(figure, title or "Layers in the minimal sets", subtitle)
