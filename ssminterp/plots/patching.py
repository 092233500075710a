"""Heat maps of activation patching."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from xarray import DataArray

from ssminterp.patching.results import changed_and_source
from ssminterp.plots.theme import DIVERGING, themed


def patching_heatmap(sweep: DataArray, title: str | None = None) -> go.Figure:
    """How far patching each layer and position moves the metric from the changed run (0) to the source run (1).

    sweep: one hook of a `patch_sweep`, dims (layer, position); its attributes name metric, baselines and model. Cells
        that are NaN, as those of a sweep that was stopped, stay empty.

    Raises ValueError if the array has other dims or its two baselines are equal.
    """
    if set(sweep.dims) != {"layer", "position"}:
        raise ValueError(f"a heat map shows (layer, position), got {sweep.dims}: select one hook, average the examples")
    clean, corrupted = sweep.attrs["clean"], sweep.attrs["corrupted"]
    if clean == corrupted:
        raise ValueError(f"clean and corrupted baselines are both {clean}: there is no effect to show")
    values = sweep.transpose("layer", "position").values
    changed, source = changed_and_source(sweep)
    moved = (values - sweep.attrs[changed]) / (sweep.attrs[source] - sweep.attrs[changed])
    limit = max(float(np.nanmax(np.abs(moved), initial=0.0)), 1e-6)
    metric = str(sweep.name)
    columns = list(range(moved.shape[1]))
    figure = go.Figure(
        go.Heatmap(
            z=moved,
            x=columns,
            y=sweep["layer"].values,
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            customdata=np.stack([values, np.broadcast_to(sweep["position"].values, values.shape)], axis=-1),
            hovertemplate=(
                f"layer %{{y}}, position %{{customdata[1]}}<br>moved %{{z:.3f}}<br>{metric} %{{customdata[0]:.3f}}"
                "<extra></extra>"
            ),
            colorbar={"title": {"text": f"share of the<br>way to {source}"}, "thickness": 14},
        )
    )
    figure.update_xaxes(
        title="position", tickvals=columns, ticktext=[str(label) for label in sweep["position"].values], tickangle=-45
    )
    figure.update_yaxes(title="layer", dtick=1)
    hook = str(sweep["hook"].item()) if "hook" in sweep.coords else "hook"
    # Tall enough for a layer's number, but no taller than a screen if that can be.
    row = max(14, min(34, 800 // moved.shape[0]))
    figure.update_layout(height=220 + row * moved.shape[0], width=max(620, 160 + 46 * moved.shape[1]))
    subtitle = (
        f"{metric}: clean {clean:.2f}, corrupted {corrupted:.2f} · "
        f"{sweep.attrs['examples']} prompt pairs · {sweep.attrs['model']} ({sweep.attrs['dtype']})"
    )
    return themed(figure, title or f"Patching {hook}, {source} into {changed}", subtitle)


def strongest_columns(sweep: DataArray, n: int) -> list[int]:
    """The `n` columns of a map in which a cell differs most from the run that was changed, in their order.

    sweep: as for `patching_heatmap`. Raises ValueError if n is no positive number.
    """
    if n < 1:
        raise ValueError(f"n={n} columns were asked for: at least 1")
    changed, _ = changed_and_source(sweep)
    size = np.nanmax(np.abs(sweep.transpose("layer", "position").values - sweep.attrs[changed]), axis=0, initial=0.0)
    return sorted(int(i) for i in np.argsort(-size, kind="stable")[:n])
