"""Probes and substitutions by layer."""

from __future__ import annotations

import plotly.graph_objects as go
from xarray import Dataset

from ssminterp.plots.curves import BASELINE, COLOURS, curve, layer_axis
from ssminterp.plots.theme import themed

TESTS = {
    "becomes_new": "answers with the new token",
    "as_if_replaced": "answers as if the token were replaced",
    "changes": "answers otherwise than before",
}


def probe_curves(probes: Dataset, title: str | None = None) -> go.Figure:
    """Accuracy on held-out examples by layer, a curve for each position; dashed, that of the control task.

    probes: from `probe`, one hook of it, dims (layer, position).

    Raises ValueError if it has other dims.
    """
    if "hook" in probes.dims and probes.sizes["hook"] == 1:
        probes = probes.isel(hook=0)
    if set(probes["accuracy"].dims) != {"layer", "position"}:
        raise ValueError(f"the curves show (layer, position), got {probes['accuracy'].dims}: select one hook")
    layers, figure = probes["layer"].values.tolist(), go.Figure()
    for i, position in enumerate(str(label) for label in probes["position"].values):
        at = probes.sel(position=position)
        figure.add_trace(curve(i, position, layers, at["accuracy"].values))
        if "control_accuracy" in probes:
            dashed = {"color": COLOURS[i % len(COLOURS)], "dash": "dash", "width": 1.5}
            hover = f"control at {position}, layer %{{x}}<br>%{{y:.3f}}<extra></extra>"
            control = at["control_accuracy"].values
            look = {"mode": "lines", "line": dashed, "hovertemplate": hover, "showlegend": False}
            figure.add_trace(curve(i, position, layers, control, **look))
    attrs = probes.attrs
    figure.add_hline(attrs["chance"], line=BASELINE)
    layer_axis(figure, layers)
    figure.update_yaxes(title="accuracy on held-out examples", range=[0, 1.03])
    figure.update_layout(legend={"title": {"text": "probed at"}})
    dashes = f" · dashed: control task ({attrs['controls']} drawn)" if attrs["controls"] else ""
    subtitle = (
        f"{attrs['method']}, {len(attrs['classes'])} classes, {attrs['examples']} examples, {attrs['folds']} folds · "
        f"dotted: chance{dashes} · {attrs['model']} ({attrs['dtype']})"
    )
    return themed(figure, title or f"What a linear probe reads from {probes['hook'].item()}", subtitle)


def substitution_curves(found: Dataset, test: str = "becomes_new", title: str | None = None) -> go.Figure:
    """Share of examples by layer, a curve for each position; dashed, when the token itself is replaced.

    found: from `substitution_test`; examples are averaged. test: "becomes_new", "as_if_replaced" or "changes".

    Raises ValueError for another test.
    """
    if test not in TESTS:
        raise ValueError(f"test must be one of {', '.join(TESTS)}, got {test!r}")
    found = found.mean("example", keep_attrs=True) if "example" in found.dims else found
    layers, figure = found["layer"].values.tolist(), go.Figure()
    for i, position in enumerate(str(label) for label in found["position"].values):
        at = found.sel(position=position)
        figure.add_trace(curve(i, position, layers, at[test].values))
        if test == "becomes_new":
            dashed = {"color": COLOURS[i % len(COLOURS)], "dash": "dash", "width": 1.5}
            figure.add_hline(float(at["replaced_becomes_new"]), line=dashed)
    attrs = found.attrs
    layer_axis(figure, layers, "layer in which the averages are exchanged")
    figure.update_yaxes(title="share of examples", range=[-0.03, 1.03])
    figure.update_layout(legend={"title": {"text": "token at"}})
    away = f"{attrs['offset']} after the token" if attrs["offset"] else "at the token"
    where = f"average {attrs['hook']} {away}"
    dashes = " · dashed: the token itself replaced" if test == "becomes_new" else ""
    subtitle = f"{where} · {attrs['examples']} prompts{dashes} · {attrs['model']} ({attrs['dtype']})"
    return themed(figure, title or f"With one average for another, the model {TESTS[test]}", subtitle)
