"""Lenses: the words that the residual stream or the state would say."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go
from xarray import DataArray, Dataset

from ssminterp.plots.memory import SEQUENTIAL
from ssminterp.plots.theme import DIVERGING, themed


def lens_heatmap(
    top: Dataset, colour: Literal["probability", "logit"] = "probability", title: str | None = None
) -> go.Figure:
    """The top tokens of a lens as words in a map: best token by (layer, position), or all by (rank, position).

    top: from `top_tokens` of a logit lens, dims (layer, position, rank), or a state lens, dims (position, rank); a
        batch of one example is shown too.
    colour: what colours the cells; a state lens is best coloured by its logits.

    Raises ValueError if the arrays have other dims.
    """
    if "batch" in top.dims:
        if top.sizes["batch"] > 1:
            raise ValueError(f"the lens holds {top.sizes['batch']} examples: select one")
        top = top.isel(batch=0, drop=True)
    dims = set(top["token"].dims)
    if dims not in ({"layer", "position", "rank"}, {"position", "rank"}):
        raise ValueError(f"the map shows (layer, position, rank) or (position, rank), got {top['token'].dims}")
    rows = "layer" if "layer" in dims else "rank"
    words = _with_numbers(top, colour)
    words = words.transpose("position", rows, "rank") if rows == "layer" else words
    shown = top if rows == "rank" else top.sel(rank=1)
    numbers = shown[colour].transpose(rows, "position").values
    # The best tokens of a cell, for the hover: as many as the array has.
    best = words.values if rows == "layer" else words.transpose("position", "rank").values[:, None]
    hover = np.vectorize("<br>".join, signature="(n)->()")(best.astype(object)).T
    low = 0.0 if colour == "probability" or numbers.min() >= 0 else -float(np.abs(numbers).max())
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=top["position"].values,
            y=[str(row) for row in top[rows].values],
            text=shown["token"].transpose(rows, "position").values,
            texttemplate="%{text}",
            customdata=np.broadcast_to(hover, numbers.shape),
            zmin=low,
            zmax=max(float(np.abs(numbers).max()), 1e-12),
            colorscale=DIVERGING if low < 0 else SEQUENTIAL,
            hovertemplate=f"{rows} %{{y}}, %{{x}}<br><br>%{{customdata}}<extra></extra>",
            colorbar={"title": {"text": colour, "side": "right"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    reverse = {"autorange": "reversed"} if rows == "rank" else {}
    figure.update_yaxes(title="after layer" if rows == "layer" else "rank", type="category", **reverse)
    n_rows, n_columns = numbers.shape
    figure.update_layout(height=240 + 32 * n_rows, width=max(560, 220 + 68 * n_columns))
    attrs = top.attrs
    subtitle = f"{attrs['model']} ({attrs['dtype']})"
    if attrs["lens"] == "state_lens":
        subtitle = f"state of layer {attrs['layer']}, read at {attrs['read_at']} · {subtitle}"
    return themed(figure, title or str(attrs["lens"]).replace("_", " ").capitalize(), subtitle)


def _with_numbers(top: Dataset, colour: str) -> DataArray:
    """The tokens with their numbers, as a hover shows them."""
    form = "{} {:.1%}" if colour == "probability" else "{} {:.2f}"
    written = np.vectorize(lambda token, number: form.format(token.replace("<", "&lt;"), number), otypes=[object])
    return top["token"].copy(data=written(top["token"].values, top[colour].values))


def prediction_bars(top: Dataset, title: str | None = None) -> go.Figure:
    """The most probable next tokens at one place, as bars: the best on top.

    top: from `top_tokens` of a logit lens at one layer and position, dims (rank).

    Raises ValueError if the arrays have other dims.
    """
    if set(top["token"].dims) != {"rank"}:
        raise ValueError(f"the bars show (rank), got {top['token'].dims}: select an example, a layer and a position")
    probabilities = top["probability"].values
    figure = go.Figure(
        go.Bar(
            x=probabilities,
            y=[
                f"{rank}. {token.strip() or repr(token)}"
                for rank, token in zip(top["rank"].values, top["token"].values, strict=True)
            ],
            orientation="h",
            text=[f"{p:.1%}" if p >= 1e-3 else f"{p:.0e}" for p in probabilities],
            textposition="outside",
            cliponaxis=False,
            marker_color=DIVERGING[-1],
            customdata=top["logit"].values,
            hovertemplate="%{y}<br>probability %{x:.4f}<br>logit %{customdata:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(
        title="probability of being the next token", tickformat=".0%", range=[0, 1.12 * max(probabilities)]
    )
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, showgrid=False)
    figure.update_layout(height=150 + 27 * len(probabilities), width=560, bargap=0.3)
    attrs = top.attrs
    layer = str(top["layer"].item()) if "layer" in top.coords else ""
    subtitle = f"after “{top['position'].item()}”" + (f", layer {layer}" if layer else "")
    return themed(figure, title or "What comes next", f"{subtitle} · {attrs['model']} ({attrs['dtype']})")
