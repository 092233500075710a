"""Curves of knockouts: what is lost when a window of layers must not carry a source to its target."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from xarray import DataArray, Dataset

from ssminterp.plots.curves import BASELINE, curve
from ssminterp.plots.theme import themed


def knockout_curves(sweep: DataArray | Dataset, title: str | None = None) -> go.Figure:
    """The metric by window of layers, a curve for each source and a panel for each metric, with the baseline.

    sweep: from `knockout_sweep`, dims (source, layer); of one metric or several. Examples are averaged.

    Raises ValueError if an array has other dims.
    """
    of_dataset = (
        {str(name): array for name, array in sweep.items() if "source" in array.dims}
        if isinstance(sweep, Dataset)
        else {str(sweep.name): sweep}
    )
    panels = {
        name: array.mean("example", keep_attrs=True) if "example" in array.dims else array
        for name, array in of_dataset.items()
    }
    for array in panels.values():
        if set(array.dims) != {"source", "layer"}:
            raise ValueError(f"the curves show (source, layer), got {array.dims}")
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (name, array) in enumerate(panels.items(), start=1):
        for line in _curves(array, show_names=row == 1):
            figure.add_trace(line, row, 1)
        figure.add_hline(array.attrs["baseline"], row=row, col=1, line=BASELINE)
        figure.update_yaxes(title=name.replace("_", " "), row=row, col=1, automargin=True)
    shown = next(iter(panels.values()))
    attrs = shown.attrs
    every = slice(None, None, 1 if shown.sizes["layer"] <= 24 else 4)
    middles, windows = _windows(shown)
    figure.update_xaxes(tickvals=middles[every], ticktext=windows[every])
    figure.update_xaxes(title="layers whose states the target reads without the source", row=len(panels), col=1)
    figure.update_layout(
        height=150 + 250 * len(panels),
        width=min(1200, max(760, 300 + 22 * shown.sizes["layer"])),
        legend={"title": {"text": "not read by the target"}},
    )
    subtitle = (
        f"target: {attrs['targets']} · decay {attrs['decay']} · dotted: no knockout · {attrs['examples']} prompts · "
        f"{attrs['model']} ({attrs['dtype']})"
    )
    return themed(figure, title or "Where the target reads each source", subtitle)


def _windows(array: DataArray) -> tuple[list[float], list[str]]:
    """The middle of each window, and its first and last layer."""
    pairs = list(zip(array["layer"].values.tolist(), array["last_layer"].values.tolist(), strict=True))
    return [(a + b) / 2 for a, b in pairs], [str(a) if a == b else f"{a}–{b}" for a, b in pairs]


def _curves(array: DataArray, show_names: bool) -> list[go.Scatter]:
    middles, windows = _windows(array)
    hover = "%{fullData.name}, layers %{customdata}<br>%{y:.3f}<extra></extra>"
    look = {"customdata": windows, "hovertemplate": hover, "showlegend": show_names}
    return [
        curve(i, str(source), middles, array.sel(source=source).values, **look)
        for i, source in enumerate(array["source"].values)
    ]
