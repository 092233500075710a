"""One page with tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

STYLE = """
body { font-family: Inter, Helvetica, Arial, sans-serif; color: #1f2933 }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #9aa5b1 } tr:nth-child(even) td { background: #f5f7fa }
"""


def save_report(path: str | Path, title: str, tables: Mapping[str, pd.DataFrame], figures: Sequence[go.Figure]) -> Path:
    """Write a page that works offline (plotly.js lies beside it in plotly.min.js). Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    parts = [
        f"<h2>{escape(heading)}</h2>"
        + table.to_html(index=False, border=0, justify="left", float_format="{:.3f}".format)
        for heading, table in tables.items()
    ]
    parts += [figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures]
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<style>{STYLE}</style><script src="plotly.min.js"></script></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )
    return path
