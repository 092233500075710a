"""The study of indirect object identification as tables and as a page."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import pandas as pd
import plotly.graph_objects as go
from xarray import DataArray

from ssminterp.analysis import flow_graph, strongest_paths
from ssminterp.patching import strongest_edges
from ssminterp.plots import (
    flow_figure,
    knockout_curves,
    layer_curves,
    patching_heatmap,
    save_report,
    share_bars,
    tap_heatmap,
)
from ssminterp.studies.ioi import INSIDE, IOIStudy
from ssminterp.studies.ioi_summary import PAPER, beside_the_paper, disagreements, share_in_sets, summary


def study_tables(study: IOIStudy) -> dict[str, pd.DataFrame]:
    """Every table of the study by its heading, the summary first; the paper's figures only for its checkpoint."""
    tables = {"Summary": summary(study)}
    if PAPER in study.model_name:
        tables["Beside the paper's figures (arXiv:2407.14008)"] = beside_the_paper(study)
    ablations = {
        "zero": study.zero,
        "resampled": study.resample,
        "conv resampled": study.conv,
        "mean by position": study.alike,
    }
    by_layer = pd.DataFrame({"layer": study.zero["layer"].values})
    for name, found in ablations.items():
        for metric in ("accuracy", "probability"):
            by_layer[f"{metric}, {name}"] = found[metric].values
    moved = "share of the way back to the clean answer"
    return tables | {
        "Where two tools disagree": disagreements(study),
        "The unchanged model": study.baseline,
        "Prompts, one of each kind": study.example,
        "Without each layer": by_layer,
        "Layers that suffice to pass names on, by how names change": study.minimal_sets.assign(
            layers=study.minimal_sets["layers"].map(lambda layers: ", ".join(map(str, layers)))
        ),
        "Layers removed one after the other": study.removal,
        f"Patches in layer {study.key_layer}: {moved}": _frame(study.sites.sel(layer=study.key_layer), "hook"),
        f"Taps of its conv: {moved}": _frame(study.taps, "tokens back"),
        "Exchange of the names' averages": study.substitution,
        "The end does not read a name: accuracy": _frame(study.knockouts["accuracy"], "source"),
        "Strongest edges by attribution (EAP-IG), in logit difference": strongest_edges(study.edges, 12),
        "Strongest paths by contribution": strongest_paths(flow_graph(study.flow, 0.1)),
        "Strongest paths by patching": strongest_paths(flow_graph(study.patched_flow, 0.1)),
    }


def _frame(values: DataArray, rows: str) -> pd.DataFrame:
    """An array of two dims as a table with the labels of the first in a column called `rows`."""
    first, second = values.dims
    table = pd.DataFrame(values.values, columns=[str(label) for label in values[second].values])
    table.insert(0, rows, values[first].values)
    return table


def as_text(table: pd.DataFrame, widest: int = 80) -> str:
    """A table for the terminal: columns, or where a text is longer than `widest` a paragraph for each row."""
    texts = [str(cell) for column in table.select_dtypes(exclude="number") for cell in table[column]]
    if max(map(len, texts), default=0) <= widest:
        return table.to_string(index=False, float_format="{:.3f}".format)
    first, *others = table.columns
    rows = []
    for row in table.to_dict("records"):
        cells = {name: f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in table.columns}
        parts = [
            fill(f"{name}: {cells[name]}", 110, initial_indent="    ", subsequent_indent="      ") for name in others
        ]
        rows.append("\n".join([f"- {cells[first]}", *parts]))
    return "\n".join(rows)


def study_figures(study: IOIStudy) -> list[go.Figure]:
    """Every figure of the study."""
    ablations = {
        "output zeroed": study.zero,
        "output of the corrupted run": study.resample,
        "its mean by position": study.alike,
        "conv of the corrupted run": study.conv,
    }
    limit = float(abs(study.sites).max())
    sets = f"{len(study.minimal_sets)} ways to change the names · {study.model_name}"
    return [
        flow_figure(flow_graph(study.flow), "How the answer comes about: exact contributions"),
        flow_figure(flow_graph(study.patched_flow), "How the answer comes about: each edge patched"),
        layer_curves(ablations, "accuracy"),
        share_bars(share_in_sets(study), sets),
        *(patching_heatmap(study.sites.sel(hook=hook)).update_traces(zmin=-limit, zmax=limit) for hook in INSIDE),
        tap_heatmap(study.taps),
        knockout_curves(study.knockouts),
    ]


def save_ioi_report(study: IOIStudy, path: str | Path) -> Path:
    """Write the page. Returns its path."""
    title = f"Indirect object identification in {study.model_name}"
    return save_report(path, title, study_tables(study), study_figures(study))
