"""Curves by layer that stay apart for readers who see no red and green, and in print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe & Ito 2008, told apart by their marks too.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a", "#5c5c5c"]
MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"]
BASELINE = {"dash": "dot", "color": "#52606d", "width": 1.5}


def curve(number: int, name: str, x: Sequence[float | int], y: np.ndarray, **options: Any) -> go.Scatter:
    """Curve number so and so of a figure; curves of one name share a line of the legend."""
    look = {
        "mode": "lines+markers",
        "legendgroup": name,
        "line": {"color": COLOURS[number % len(COLOURS)]},
        "marker": {"symbol": MARKS[number % len(MARKS)], "size": 8},
        "hovertemplate": f"{name}, layer %{{x}}<br>%{{y:.3f}}<extra></extra>",
    }
    return go.Scatter(x=x, y=y, name=name, **look | options)


def layer_axis(figure: go.Figure, layers: Sequence[int], title: str = "layer") -> None:
    """The x axis of curves by layer, and a width that fits."""
    figure.update_xaxes(title=title, dtick=1 if len(layers) <= 24 else 4)
    figure.update_layout(height=460, width=min(1200, max(760, 300 + 22 * len(layers))))
