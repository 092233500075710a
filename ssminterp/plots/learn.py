"""The scan by hand, as pictures: one idea each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from xarray import DataArray, Dataset

from ssminterp.plots.theme import DIVERGING, FONT, themed

TEAL, LIGHT_TEAL, BROWN, SAND = DIVERGING[-1], DIVERGING[-2], DIVERGING[0], DIVERGING[1]
# All but white, for as many tokens as the made-up sentence has.
SHADES = [*DIVERGING[:3], *DIVERGING[4:]]
LEGEND_BELOW = {"orientation": "h", "y": -0.22, "yanchor": "top"}


def state_steps(steps: Dataset, position: int | None = None, coordinate: int = 0) -> go.Figure:
    """What one coordinate of the state keeps and takes in at each token, and what it then is.

    steps: from `learn.recurrence`. position: the step to mark. coordinate: of the state.
    """
    one = steps.isel(coordinate=coordinate)
    tokens = one["position"].values
    figure = go.Figure(
        [
            go.Bar(x=tokens, y=one["kept"].values, name="kept of the old state, A̅ h", marker_color=SAND),
            go.Bar(x=tokens, y=one["written"].values, name="written now, B̅ x", marker_color=LIGHT_TEAL),
            go.Scatter(
                x=tokens,
                y=one["state"].values,
                name="the state after the token, h",
                mode="lines+markers",
                line={"color": TEAL, "width": 2},
                marker={"size": 9},
            ),
        ]
    )
    figure.update_traces(hovertemplate="%{x}<br>%{y:.4g}", selector={"type": "bar"})
    figure.update_layout(barmode="relative", height=380, legend=LEGEND_BELOW)
    if position is not None:
        figure.add_vrect(position - 0.5, position + 0.5, fillcolor=TEAL, opacity=0.1, line_width=0, layer="below")
    figure.update_xaxes(title="token", type="category")
    figure.update_yaxes(title="h", zeroline=True)
    title = "h ← A̅ h + B̅ x"
    return themed(figure, title, f"coordinate {coordinate} of {steps.sizes['coordinate']} · {steps.attrs['source']}")


def state_map(steps: Dataset, position: int | None = None) -> go.Figure:
    """All coordinates of a channel's state after each token.

    steps: from `learn.recurrence`. position: the token to mark.
    """
    numbers = steps["state"].transpose("coordinate", "position").values
    limit = max(float(np.abs(numbers).max()), 1e-12)
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=steps["position"].values,
            y=steps["coordinate"].values,
            customdata=np.broadcast_to(steps["A"].values[:, None], numbers.shape),
            zmin=-limit,
            zmax=limit,
            colorscale=DIVERGING,
            hovertemplate="%{x}, coordinate %{y}<br>h = %{z:.4g}<br>A = %{customdata:.3g}<extra></extra>",
            colorbar={"title": {"text": "h", "side": "top"}, "thickness": 14},
        )
    )
    if position is not None:
        figure.add_vrect(position - 0.5, position + 0.5, line={"color": BROWN, "width": 2}, fillcolor="rgba(0,0,0,0)")
    figure.update_xaxes(title="token", type="category", tickangle=-45, automargin=True)
    figure.update_yaxes(title="coordinate of the state", dtick=1 if numbers.shape[0] <= 16 else 4)
    figure.update_layout(height=220 + 16 * numbers.shape[0])
    return themed(figure, "The state of one channel", str(steps.attrs["source"]))


def forgetting_figure(delta: float, A: float, tokens: int = 12) -> go.Figure:
    """What a step size does to the past and to the present: what is left after k tokens; A̅ and B̅ for every Δ.

    delta: Δ > 0, the same at every token. A: < 0.

    Raises ValueError for a Δ that is not positive or an A that is not negative.
    """
    if delta <= 0 or A >= 0:
        raise ValueError(f"Δ must be positive and A negative, got Δ={delta:g} and A={A:g}")
    ages, steps = np.arange(tokens + 1), np.linspace(0.01, 4, 200)
    half_life = np.log(2) / (delta * -A)
    figure = make_subplots(1, 2)
    figure.add_bar(x=ages, y=np.exp(delta * A * ages), marker_color=SAND, name="A̅ᵏ", row=1, col=1, showlegend=False)
    if half_life <= tokens:
        figure.add_vline(half_life, line={"color": BROWN, "dash": "dot"}, row=1, col=1)
        figure.add_annotation(
            x=half_life,
            y=0.97,
            text=f" half is left after {half_life:.3g}",
            showarrow=False,
            xanchor="left",
            row=1,
            col=1,
        )
    figure.add_scatter(x=steps, y=np.exp(steps * A), name="A̅ = exp(Δ A): kept", line_color=SAND, row=1, col=2)
    figure.add_scatter(x=steps, y=steps, name="B̅ = Δ: let in (B = 1)", line_color=TEAL, row=1, col=2)
    figure.add_vline(delta, line={"color": BROWN, "dash": "dot"}, row=1, col=2)
    figure.update_xaxes(title="k, tokens since it was written", dtick=1, row=1, col=1)
    figure.update_xaxes(title="Δ, the step size", row=1, col=2)
    figure.update_yaxes(range=[0, 1.05], title="part that is left", row=1, col=1)
    figure.update_yaxes(range=[0, 4.2], title="factor", row=1, col=2)
    figure.update_layout(height=380, legend=LEGEND_BELOW)
    kept, let_in = np.exp(delta * A), delta
    subtitle = f"Δ = {delta:g}, A = {A:g}: each token keeps {kept:.1%} of the state and lets in {let_in:.3g} of itself"
    return themed(figure, "Forgetting and absorbing", subtitle)


def three_ways(terms: DataArray, ways: Mapping[str, DataArray]) -> go.Figure:
    """One output, computed in several ways: bars of what each source token brings, a dot and a ring for other ways.

    terms: from `learn.unrolled`. ways: y, dim (position), of at most two ways, by their names.

    Raises ValueError for more than two ways.
    """
    if len(ways) > 2:
        raise ValueError(f"the figure has a dot and a ring, got {len(ways)} ways: {', '.join(ways)}")
    bars = [
        go.Bar(
            x=terms["target"].values,
            y=terms.sel(source=source).values,
            name=f"from {source}",
            marker_color=SHADES[i % len(SHADES)],
            hovertemplate=f"from {source}<br>to %{{x}}<br>%{{y:.4g}}<extra></extra>",
            legendgroup="terms",
            legendgrouptitle_text="unrolled sum, the parts",
        )
        for i, source in enumerate(terms["source"].values)
    ]
    ink, paper = FONT["color"], DIVERGING[3]
    looks = (
        {"size": 8, "color": ink},
        {"size": 19, "color": paper, "line": {"color": ink, "width": 2}},
    )
    markers = [
        go.Scatter(
            x=y["position"].values,
            y=y.values,
            name=name,
            mode="markers",
            marker=look,
            hovertemplate=f"{name}<br>%{{x}}<br>y = %{{y:.6g}}<extra></extra>",
            legendgroup="ways",
            legendgrouptitle_text="y by",
        )
        for (name, y), look in zip(ways.items(), looks, strict=False)
    ]
    # The dot lies on the ring.
    figure = go.Figure([*bars, *reversed(markers)])
    figure.update_layout(barmode="relative", height=420)
    figure.update_xaxes(title="token", type="category")
    figure.update_yaxes(title="y")
    return themed(figure, "One output, however it is computed", str(terms.attrs["source"]))


def held_at_the_end(terms: Mapping[str, DataArray]) -> go.Figure:
    """What each token still brings to y at the last token, as a part of all that is brought, for channels to compare.

    terms: from `learn.unrolled`, by a name for the legend.
    """
    colours = (TEAL, SAND, BROWN)
    figure = go.Figure(
        [
            go.Bar(
                x=values["source"].values,
                y=_parts(values.isel(target=-1).values),
                name=name,
                marker_color=colours[i % 3],
                hovertemplate=f"{name}<br>from %{{x}}<br>%{{y:.1%}}<extra></extra>",
            )
            for i, (name, values) in enumerate(terms.items())
        ]
    )
    last = next(iter(terms.values()))["target"].values[-1]
    figure.update_layout(barmode="group", height=380, legend=LEGEND_BELOW)
    figure.update_xaxes(title="source: the token that wrote", type="category")
    figure.update_yaxes(title=f"part of y at {last}", tickformat=".0%")
    return themed(
        figure, "What is still there at the end", " · ".join(f"{k}: {v.attrs['source']}" for k, v in terms.items())
    )


def _parts(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.abs(values).sum()), 1e-12)
