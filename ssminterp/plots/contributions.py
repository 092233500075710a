"""Which token contributes to which, as a target × source map."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from xarray import DataArray

from ssminterp.plots.theme import DIVERGING, themed


def contribution_heatmap(values: DataArray, title: str | None = None, clip: float = 0.99) -> go.Figure:
    """Contributions, attention weights or shares, target tokens downwards, source tokens to the right.

    values: dims (target, source); a batch of one example is shown too. Its attributes name model and layer.
    clip: the quantile of what is not zero at which colours end; 1 for the largest.

    Raises ValueError if the array has other dims.
    """
    name = str(values.name)
    values = one_example(values)
    if set(values.dims) != {"target", "source"}:
        raise ValueError(
            f"the map shows (target, source), got {values.dims}: select an example, a channel, a layer, or sum"
        )
    numbers = values.transpose("target", "source").values
    # So that one strong pair, often a token and itself, does not make all others white.
    limit = max(float(np.nanquantile(np.abs(numbers[numbers != 0]), clip)), 1e-12) if numbers.any() else 1e-12
    never_negative = float(numbers.min()) >= 0
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=values["source"].values,
            y=values["target"].values,
            zmin=0.0 if never_negative else -limit,
            zmax=limit,
            colorscale=DIVERGING[3:] if never_negative else DIVERGING,
            hovertemplate="from %{x}<br>to %{y}<br>%{z:.4g}<extra></extra>",
            colorbar={"title": {"text": name.replace("_", " "), "side": "right"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="source: the token that wrote", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="target: the token that reads", type="category", autorange="reversed", automargin=True)
    rows, columns = numbers.shape
    figure.update_layout(height=min(900, 260 + 22 * rows), width=min(1100, 400 + 28 * columns))
    subtitle = f"layer {values.attrs['layer']} · {values.attrs['model']} ({values.attrs['dtype']})"
    if "shown" in values.attrs:
        subtitle += f" · {values.attrs['shown']}"
    if float(np.abs(numbers).max()) > limit:
        end = f"{'' if never_negative else '±'}{limit:.2g}"
        subtitle += f" · colours end at {end}, the {clip:.0%} quantile; strongest {np.abs(numbers).max():.2g}"
    return themed(figure, title or name.replace("_", " ").capitalize(), subtitle)


def strongest_part(values: DataArray, most: int) -> DataArray:
    """A map of (target, source) cut down to the `most` targets and sources with the strongest values, in their order.

    What is left out is said in the figure: the attribute `shown`. A batch of one example is taken too.

    Raises ValueError if `most` is no positive number, or the array has other dims.
    """
    values = one_example(values)
    if most < 1 or set(values.dims) != {"target", "source"}:
        raise ValueError(f"at least one of each of (target, source) is kept, got {most} of {values.dims}")
    if max(values.shape) <= most:
        return values
    kept = {}
    for dim, other in (("target", "source"), ("source", "target")):
        strength = abs(values).max(other).fillna(0).values
        kept[dim] = np.sort(np.argsort(-strength, kind="stable")[:most])
    sizes = " × ".join(f"{len(kept[dim])} of {values.sizes[dim]} {dim}s" for dim in ("target", "source"))
    return values.isel(kept).assign_attrs(shown=f"the strongest {sizes}")


def one_example(values: DataArray) -> DataArray:
    """The array without its batch axis. Raises ValueError if it holds several examples."""
    if "batch" not in values.dims:
        return values
    if values.sizes["batch"] > 1:
        raise ValueError(f"the array holds {values.sizes['batch']} examples: select one or average them")
    return values.isel(batch=0, drop=True)
