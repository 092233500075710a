"""Cells of a heat map that a reader can click, and the one that was."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ssminterp.plots.theme import FONT


def clickable(figure: go.Figure, chosen: tuple[int, int] | None = None) -> go.Figure:
    """A copy of a heat map with a transparent marker over every cell, for hosts that report clicks on points only.

    The markers show the heat map's hover, and begin their `customdata` with row and column of the cell. The cell
    `chosen` has a frame.

    Raises ValueError if the figure holds no heat map, and if `chosen` lies outside it.
    """
    figure = go.Figure(figure)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    if len(maps) != 1:
        raise ValueError(f"the figure holds {len(maps)} heat maps: only one can be made clickable")
    (heat,) = maps
    z = np.asarray(heat.z, dtype=float)
    n_rows, n_columns = z.shape
    rows, columns = (index.ravel() for index in np.indices(z.shape))
    x = np.arange(n_columns) if heat.x is None else np.asarray(heat.x)
    y = np.arange(n_rows) if heat.y is None else np.asarray(heat.y)
    details = np.empty((z.size, 0), dtype=object)
    if heat.customdata is not None:
        details = np.asarray(heat.customdata, dtype=object).reshape(z.size, -1)
    own = [] if heat.text is None else [np.asarray(heat.text, dtype=object).reshape(z.size)]
    figure.add_trace(
        go.Scatter(
            x=x[columns],
            y=y[rows],
            mode="markers",
            marker={"size": 22, "symbol": "square", "opacity": 0},
            customdata=np.column_stack([rows, columns, z.ravel(), *own, details]),
            hovertemplate=_for_markers(heat.hovertemplate or "%{x}, %{y}: %{z}", details.shape[1], len(own), heat),
            showlegend=False,
            name="",
        )
    )
    figure.update_traces(hoverinfo="skip", hovertemplate=None, selector={"type": "heatmap"})
    figure.update_layout(hovermode="closest", clickmode="event+select", dragmode=False)
    for axis, values in ((figure.layout.xaxis, x), (figure.layout.yaxis, y)):
        _end_at_the_cells(axis, values)
    if chosen is not None:
        _frame(figure, chosen, z.shape, (x, y))
    return figure


def _end_at_the_cells(axis: go.layout.XAxis | go.layout.YAxis, values: np.ndarray) -> None:
    """Keep the axis from making room for the markers beside the outermost cells."""
    places = np.arange(len(values)) if _is_category(axis, values) else np.asarray(values, dtype=float)
    half = (places[1] - places[0]) / 2 if len(places) > 1 else 0.5
    ends = [places[0] - half, places[-1] + half]
    axis.range = ends[::-1] if axis.autorange == "reversed" else ends
    axis.autorange = None


def _is_category(axis: go.layout.XAxis | go.layout.YAxis, values: np.ndarray) -> bool:
    return axis.type == "category" or np.asarray(values).dtype.kind not in "iuf"


def _for_markers(template: str, n_details: int, n_own: int, heat: go.Heatmap) -> str:
    """The heat map's template with z and customdata where the markers have them: after row and column."""
    first = 3 + n_own
    if n_details == 1 and np.asarray(heat.customdata).ndim == 2:
        template = template.replace("%{customdata}", f"%{{customdata[{first}]}}")
    for i in reversed(range(n_details)):
        template = template.replace(f"%{{customdata[{i}]", f"%{{customdata[@{first + i}]")
    template = template.replace("[@", "[")
    return template.replace("%{z", "%{customdata[2]").replace("%{text", "%{customdata[3]")


def _frame(
    figure: go.Figure, chosen: tuple[int, int], shape: tuple[int, ...], labels: tuple[np.ndarray, np.ndarray]
) -> None:
    """A frame around one cell, in places of a category axis or in numbers."""
    row, column = chosen
    if not (0 <= row < shape[0] and 0 <= column < shape[1]):
        raise ValueError(f"there is no cell {chosen} in a map of {shape[0]} × {shape[1]}")
    at_x, at_y = (
        float(i) if _is_category(axis, values) else float(values[i])
        for values, i, axis in ((labels[0], column, figure.layout.xaxis), (labels[1], row, figure.layout.yaxis))
    )
    figure.add_shape(
        type="rect",
        x0=at_x - 0.5,
        x1=at_x + 0.5,
        y0=at_y - 0.5,
        y1=at_y + 0.5,
        line={"color": FONT["color"], "width": 2.5},
    )
