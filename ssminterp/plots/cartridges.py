"""Cartridges: what is answered with some layers of one, and where two differ."""

from __future__ import annotations

import plotly.graph_objects as go
from xarray import DataArray, Dataset

from ssminterp.plots.memory import SEQUENTIAL
from ssminterp.plots.theme import DIVERGING, themed

_COLOURS = {
    "only this layer": "#8c510a",
    "this layer and those before": "#5ab4ac",
    "this layer and those after": "#d8b365",
    "all but this layer": "#01665e",
}
_DASHES = {"the whole cartridge": "dash", "without the cartridge": "dot"}


def recall_lines(recall: Dataset, title: str | None = None) -> go.Figure:
    """How well bare questions are answered when only some layers hold the cartridge, one line for each way to choose.

    recall: from `accuracy_by_layers`.

    Raises ValueError for another dataset.
    """
    if not {"moved", "baseline"} <= set(recall.data_vars):
        raise ValueError(f"the lines show what accuracy_by_layers returns, got {list(recall.data_vars)}")
    means = recall.mean("example")
    layers = recall["layer"].values
    figure = go.Figure(
        [
            go.Scatter(
                x=layers,
                y=means["moved"].sel(swap=swap).values,
                mode="lines+markers",
                name=str(swap),
                line={"color": _COLOURS[str(swap)]},
                hovertemplate=f"{swap}: %{{x}}<br>%{{y:.3f}}<extra></extra>",
            )
            for swap in recall["swap"].values
        ]
    )
    for run, dash in _DASHES.items():
        level = float(means["baseline"].sel(run=run))
        figure.add_scatter(
            x=layers,
            y=[level] * len(layers),
            mode="lines",
            name=f"{run} ({level:.2f})",
            line={"color": "#7b8794", "dash": dash},
            hoverinfo="skip",
        )
    named = {"top1": "share answered right", "accuracy": "share answered right, among the candidates"}
    attrs = recall.attrs
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(title=named.get(attrs["metric"], attrs["metric"]))
    figure.update_layout(height=460, width=860, legend={"title": {"text": "layers taken from the cartridge"}})
    others = {"corrupted": "the corrupted prompt's text"}.get(attrs["base"], attrs["base"])
    n = recall.sizes["example"]
    questions = f", {n} bare questions" if n > 1 else ""
    subtitle = f"{attrs['task']}{questions} · the other layers hold {others} · {attrs['model']}"
    return themed(figure, title or "Which layers of a cartridge answer the question", subtitle)


def answer_bars(answers: DataArray, title: str | None = None) -> go.Figure:
    """What comes after a question, asked of several states, beside each other: the most probable answers on top.

    answers: from `cartridges.answers`, dims (run, token), of at most four runs.

    Raises ValueError for an array of other dims, and for more runs.
    """
    if set(answers.dims) != {"run", "token"} or answers.sizes["run"] > len(_COLOURS):
        raise ValueError(f"the bars show up to {len(_COLOURS)} runs by (run, token), got {dict(answers.sizes)}")
    colours = [DIVERGING[i] for i in (-1, 1, -2, 0)]
    figure = go.Figure(
        [
            go.Bar(
                x=answers.sel(run=run).values,
                y=answers["token"].values,
                orientation="h",
                name=str(run),
                marker_color=colour,
                text=[f"{p:.1%}" if p >= 1e-3 else "" for p in answers.sel(run=run).values],
                textposition="outside",
                cliponaxis=False,
                hovertemplate=f"{run}<br>%{{y}}: %{{x:.4g}}<extra></extra>",
            )
            for run, colour in zip(answers["run"].values, colours, strict=False)
        ]
    )
    figure.update_xaxes(title="probability of being the next token", tickformat=".0%", range=[0, 1.15])
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    rows = answers.sizes["token"] * answers.sizes["run"]
    figure.update_layout(
        height=200 + 17 * rows, barmode="group", legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    )
    subtitle = f"after “{answers.attrs['question']}” · {answers.attrs['model']} ({answers.attrs['dtype']})"
    return themed(figure, title or "What the question is answered", subtitle)


def state_distance_heatmap(distances: DataArray, title: str | None = None) -> go.Figure:
    """How far two states lie apart in every layer, conv windows and SSM states in a row each.

    distances: from `distance` by layer; of a batch the mean is shown.

    Raises ValueError if the array has other dims.
    """
    if set(distances.dims) != {"part", "layer", "batch"}:
        raise ValueError(f"the map shows (part, layer, batch), got {distances.dims}")
    numbers = distances.mean("batch").transpose("part", "layer")
    units = {"l2": "‖a − b‖", "relative": "‖a − b‖ / ‖b‖", "cosine": "1 − cos(a, b)"}
    unit = units[distances.attrs["measure"]]
    figure = go.Figure(
        go.Heatmap(
            z=numbers.values,
            x=[str(layer) for layer in numbers["layer"].values],
            y=[{"conv": "conv windows", "ssm": "SSM states"}[str(part)] for part in numbers["part"].values],
            text=numbers.values,
            texttemplate="%{text:.2g}",
            zmin=0,
            zmax=max(float(numbers.max()), 1e-12),
            colorscale=SEQUENTIAL,
            hovertemplate="%{y}, layer %{x}<br>%{z:.4g}<extra></extra>",
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
        )
    )
    figure.update_xaxes(title="layer", type="category")
    figure.update_layout(height=280, width=max(620, 240 + 44 * numbers.sizes["layer"]))
    subtitle = f"{unit}, mean of {distances.sizes['batch']} pairs · {distances.attrs['model']}"
    return themed(figure, title or "How far two states lie apart", subtitle)
