"""The look that all figures share, light and dark, and how they are written to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

# Brown to teal through white: told apart by readers who see no red and green (ColorBrewer BrBG).
DIVERGING = ["#8c510a", "#d8b365", "#f6e8c3", "#ffffff", "#c7eae5", "#5ab4ac", "#01665e"]
# The same hues through the dark page's own colour: far from zero is bright.
DIVERGING_DARK = ["#f2c57c", "#b9822f", "#5b3f16", "#182022", "#12504a", "#2a968b", "#8fe6da"]
FONT = {"family": "Source Sans, Inter, Helvetica, Arial, sans-serif", "size": 13, "color": "#1f2933"}
DARK = {"text": "#dfe6e4", "label": "#243032", "grid": "#2a3436"}
# Text, faint marks, and the blue and green of Okabe & Ito.
IN_DARK = {"#1f2933": "#dfe6e4", "#d3d9e0": "#2a3436", "#0072b2": "#56b4e9", "#009e73": "#3cc79b"}
_SUBTITLE = "<br><sub>"


def themed(figure: go.Figure, title: str, subtitle: str) -> go.Figure:
    """The figure with the shared fonts, margins, title and subtitle, and a word on labels like "5 ⟨varies⟩"."""
    figure.update_layout(
        template="plotly_white",
        font=FONT,
        title={"text": f"{title}{_SUBTITLE}{subtitle}</sub>", "x": 0.02, "xanchor": "left", "font": {"size": 17}},
        margin={"l": 70, "r": 30, "t": 90, "b": 90},
    )
    along = [trace.x for trace in figure.data if "x" in trace and trace.x is not None]
    labels = [label for array in along for label in array] + list(figure.layout.xaxis.ticktext or ())
    if any("⟨" in label for label in labels if isinstance(label, str)):
        for axis in figure.select_xaxes(lambda axis: bool(axis.title.text)):
            axis.title.text += " (⟨…⟩: not the same in all prompts)"
    return figure


def title_and_subtitle(figure: go.Figure) -> tuple[str, str]:
    """The two texts that `themed` was given; empty where a figure has none."""
    title, _, subtitle = (figure.layout.title.text or "").partition(_SUBTITLE)
    return title, subtitle.removesuffix("</sub>")


def in_dark(figure: go.Figure) -> go.Figure:
    """The figure changed for a dark page: text, grid, and the shared colours by their dark counterparts."""
    figure.update_layout(
        template="plotly_dark",
        font_color=DARK["text"],
        hoverlabel={"bgcolor": DARK["label"], "font": {"color": DARK["text"]}},
    )
    figure.update_xaxes(gridcolor=DARK["grid"], zerolinecolor=DARK["grid"])
    figure.update_yaxes(gridcolor=DARK["grid"], zerolinecolor=DARK["grid"])
    figure.update_shapes(line_color=DARK["text"])
    scales = {tuple(DIVERGING): DIVERGING_DARK, tuple(DIVERGING[3:]): DIVERGING_DARK[3:]}
    colours = dict(zip(DIVERGING, DIVERGING_DARK, strict=True)) | IN_DARK
    for trace in figure.data:
        if "colorscale" in trace and trace.colorscale is not None:
            found = scales.get(tuple(colour for _, colour in trace.colorscale))
            if found is not None:
                trace.colorscale = found
        for part in ("marker", "line"):
            if part in trace and trace[part].color is not None:
                trace[part].color = _in_dark(trace[part].color, colours)
        if "marker" in trace and trace.marker.line.color is not None:
            trace.marker.line.color = _in_dark(trace.marker.line.color, colours)
    for note in figure.layout.annotations:
        note.font.color = _in_dark(note.font.color, colours)
        if note.bgcolor is not None:
            note.bgcolor = DARK["label"]
    return figure


def _in_dark(colour: object, colours: dict[str, str]) -> object:
    if isinstance(colour, str):
        return colours.get(colour, colour)
    if isinstance(colour, list | tuple):
        return [_in_dark(one, colours) for one in colour]
    return colour


def without_markup(figure: go.Figure) -> go.Figure:
    """The figure with every label shown as it is: plotly takes some HTML in labels, and tokens may look like it."""
    for trace in figure.data:
        for part in ("x", "y", "text", "customdata", "labels", "hovertext"):
            if part in trace and trace[part] is not None:
                trace[part] = _escaped(trace[part])
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if axis.ticktext is not None:
            axis.ticktext = _escaped(axis.ticktext)
    return figure


def _escaped(labels: object) -> object:
    array = np.asarray(labels)
    if array.dtype.kind not in "OUS":
        return labels
    escape = np.vectorize(lambda v: v.replace("<", "&lt;") if isinstance(v, str) else v, otypes=[object])
    return escape(array.astype(object)) if array.size else labels


def save_html(figure: go.Figure, path: str | Path, shared_script: bool = False) -> Path:
    """Write a figure as a page that works offline. Returns the path.

    shared_script: keep plotly.js in one file beside the pages instead of 4 MB inside each.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs="directory" if shared_script else True)
    return path
