"""Step sizes, half-lives and survival: what a layer keeps, and how long."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from xarray import DataArray

from ssminterp.plots.contributions import one_example
from ssminterp.plots.theme import DIVERGING, themed

# White to teal, the upper half of the diverging colours: for what is never negative.
SEQUENTIAL = DIVERGING[3:]
SYMBOLS = {"delta": "Δ", "delta_max": "Δ", "decay": "A̅", "decay_min": "A̅"}
QUANTILES = (0.99, 0.9, 0.5, 0.1)


def step_heatmap(steps: DataArray, title: str | None = None) -> go.Figure:
    """A summary of step sizes or decays for every layer and token.

    steps: a variable of `step_sizes`, dims (layer, position); a batch of one example is shown too.

    Raises ValueError if the array has other dims.
    """
    steps = one_example(steps)
    if set(steps.dims) != {"layer", "position"}:
        raise ValueError(f"the map shows (layer, position), got {steps.dims}")
    numbers = steps.transpose("layer", "position").values
    low, high = (float(q) for q in np.quantile(numbers, [0.01, 0.99]))
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=steps["position"].values,
            y=steps["layer"].values,
            zmin=low,
            zmax=high,
            colorscale=SEQUENTIAL,
            hovertemplate="layer %{y}<br>%{x}<br>%{z:.4g}<extra></extra>",
            colorbar={"title": {"text": SYMBOLS.get(str(steps.name), str(steps.name))}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="layer", dtick=1)
    rows, columns = numbers.shape
    figure.update_layout(height=240 + 34 * rows, width=min(1200, max(620, 200 + 34 * columns)))
    meaning = {"delta": "mean Δ over channels", "delta_max": "largest Δ of any channel"}
    meaning |= {"decay": "mean A̅ over the state", "decay_min": "smallest A̅ of the state"}
    subtitle = f"{meaning.get(str(steps.name), steps.name)} · {steps.attrs['model']} ({steps.attrs['dtype']})"
    return themed(figure, title or "How far each token moves the state on", subtitle)


def half_life_heatmap(lives: DataArray, title: str | None = None) -> go.Figure:
    """Half-lives of every coordinate of the state, channels ordered from the longest memory to the shortest.

    lives: from `half_lives`, dims (channel, coordinate); a batch of one example is shown too.

    Raises ValueError if the array has other dims.
    """
    lives = one_example(lives)
    if set(lives.dims) != {"channel", "coordinate"}:
        raise ValueError(f"the map shows (channel, coordinate), got {lives.dims}")
    numbers = lives.transpose("coordinate", "channel").values
    order = np.argsort(-numbers.max(0), kind="stable")
    powers = np.log10(numbers[:, order])
    ticks = np.arange(np.floor(powers.min()), np.ceil(powers.max()) + 1)
    figure = go.Figure(
        go.Heatmap(
            z=powers,
            y=lives["coordinate"].values,
            customdata=np.stack([numbers[:, order], np.broadcast_to(lives["channel"].values[order], powers.shape)], -1),
            colorscale=SEQUENTIAL,
            hovertemplate="channel %{customdata[1]}, coordinate %{y}<br>%{customdata[0]:.3g} tokens<extra></extra>",
            colorbar={
                "title": {"text": "half-life in tokens", "side": "right"},
                "tickvals": ticks,
                "ticktext": [f"{10**tick:g}" for tick in ticks],
                "thickness": 14,
            },
        )
    )
    figure.update_xaxes(title="channel, by rank: longest memory first")
    figure.update_yaxes(title="coordinate of the state", dtick=1 if numbers.shape[0] <= 16 else 4)
    figure.update_layout(height=max(320, 200 + 18 * numbers.shape[0]), width=820)
    subtitle = f"layer {lives.attrs['layer']} · ln 2 / (|A| · mean Δ) · {lives.attrs['model']} ({lives.attrs['dtype']})"
    return themed(figure, title or "How long the state holds what it is told", subtitle)


def horizon_heatmap(horizons: DataArray, title: str | None = None, most_columns: int = 400) -> go.Figure:
    """How long every channel of every layer remembers, each layer's channels from the longest memory to the shortest.

    horizons: from `horizons`, dims (layer, channel). most_columns: of more channels, as many are shown, evenly spaced
        in rank; the first and the last among them.

    Raises ValueError if the array has other dims.
    """
    if set(horizons.dims) != {"layer", "channel"}:
        raise ValueError(f"the map shows (layer, channel), got {horizons.dims}: average the examples")
    numbers = horizons.transpose("layer", "channel").values
    n_channels = numbers.shape[1]
    ranks = np.unique(np.linspace(0, n_channels - 1, min(n_channels, most_columns)).round().astype(int))
    order = np.argsort(-numbers, axis=1, kind="stable")[:, ranks]
    shown = np.take_along_axis(numbers, order, 1)
    powers = np.log10(shown)
    ticks = np.arange(np.floor(powers.min()), np.ceil(powers.max()) + 1)
    figure = go.Figure(
        go.Heatmap(
            z=powers,
            x=ranks + 1,
            y=horizons["layer"].values,
            customdata=np.stack([shown, horizons["channel"].values[order]], -1),
            colorscale=SEQUENTIAL,
            hovertemplate="layer %{y}, channel %{customdata[1]}<br>%{customdata[0]:.3g} tokens<extra></extra>",
            colorbar={
                "title": {"text": "half-life<br>in tokens"},
                "tickvals": ticks,
                "ticktext": [f"{10**tick:g}" for tick in ticks],
                "thickness": 14,
            },
        )
    )
    figure.update_xaxes(title="channel, by rank: longest memory first")
    figure.update_yaxes(title="layer", dtick=1 if numbers.shape[0] <= 24 else 4)
    figure.update_layout(height=min(1000, 220 + 30 * numbers.shape[0]))
    part = f"{len(ranks)} of " if len(ranks) < n_channels else ""
    subtitle = (
        f"the slowest coordinate of each channel, at its mean Δ · {part}{n_channels} channels per layer · "
        f"{horizons.attrs['model']} ({horizons.attrs['dtype']})"
    )
    return themed(figure, title or "How long every channel remembers", subtitle)


def survival_curves(survival: DataArray, title: str | None = None) -> go.Figure:
    """What is left of one token's writing at each later token, as quantiles over channels and coordinates.

    survival: from `survival`, dims (target, channel, coordinate); a batch of one example is shown too.

    Raises ValueError if the array has other dims.
    """
    survival = one_example(survival)
    if set(survival.dims) != {"target", "channel", "coordinate"}:
        raise ValueError(f"the curves show (target, channel, coordinate), got {survival.dims}")
    quantiles = survival.quantile(QUANTILES, dim=("channel", "coordinate"))
    shades = ["#01665e", "#5ab4ac", "#d8b365", "#8c510a"]
    figure = go.Figure(
        [
            go.Scatter(
                x=survival["target"].values,
                y=quantiles.sel(quantile=quantile).values,
                mode="lines+markers",
                line={"color": shade},
                name=f"{quantile:.0%} of coordinates hold less",
            )
            for quantile, shade in zip(QUANTILES, shades, strict=True)
        ]
    )
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="part that is left", range=[0, 1.03])
    figure.update_layout(height=460, width=min(1200, max(760, 260 + 34 * survival.sizes["target"])))
    attrs = survival.attrs
    subtitle = (
        f"layer {attrs['layer']}, {survival.sizes['channel']} channels × {survival.sizes['coordinate']} coordinates · "
        f"{attrs['model']} ({attrs['dtype']})"
    )
    return themed(figure, title or f"What is left of “{attrs['source']}”", subtitle)


def spectrum_figure(spectrum: DataArray, title: str | None = None) -> go.Figure:
    """The rates of decay |A| of every layer, as boxes on a logarithmic axis.

    spectrum: from `spectrum`, dims (layer, channel, coordinate).

    Raises ValueError if the array has other dims.
    """
    if set(spectrum.dims) != {"layer", "channel", "coordinate"}:
        raise ValueError(f"the boxes show (layer, channel, coordinate), got {spectrum.dims}")
    figure = go.Figure(
        [
            go.Box(
                y=-spectrum.sel(layer=layer).values.ravel(), name=str(layer), marker_color="#01665e", boxpoints=False
            )
            for layer in spectrum["layer"].values
        ]
    )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="|A|, rate of decay per unit of Δ", type="log", dtick=1)
    figure.update_layout(height=440, width=min(1200, max(620, 160 + 46 * spectrum.sizes["layer"])), showlegend=False)
    subtitle = (
        f"{spectrum.sizes['channel']} channels × {spectrum.sizes['coordinate']} coordinates per layer; quartiles and "
        f"range · {spectrum.attrs['model']} ({spectrum.attrs['dtype']})"
    )
    return themed(figure, title or "The spectrum of A", subtitle)
