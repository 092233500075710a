"""How a view is shown: the figure in the theme of the page, where it comes from, and how to take it along."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
import xarray as xr

from ssminterp.plots.theme import in_dark, title_and_subtitle, without_markup
from ssminterp_dashboards.errors import rerun_whole_page
from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.text import plain

Data = xr.DataArray | xr.Dataset
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"], "scrollZoom": False}


def is_dark() -> bool:
    """Whether the reader's theme is the dark one."""
    return st.context.theme.type == "dark"


def show(
    figure: go.Figure,
    key: str,
    loaded: Loaded | None,
    *,
    data: Data | None = None,
    snippet: str | None = None,
    note: str = "",
    on_click: Callable[[int, int], None] | None = None,
    in_panel: bool = False,
    take: bool = True,
) -> None:
    """A figure with its title, where its numbers come from, the snippet that makes it, and downloads.

    key: unique over the page; names the files. loaded: None where no model is shown. data: the numbers of the figure.
    note: markdown, by the page.
    on_click: called with row and column of a cell, for figures of `plots.clickable`; then the whole page runs again,
        or, with `in_panel`, only the panel that the figure is in.
    take: whether the figure can be taken along; not while it is still changing.
    """
    title, subtitle = title_and_subtitle(figure)
    shown = without_markup(go.Figure(figure))
    # Without its title, which the page shows, and as wide as the page: axes make the room that they need.
    shown.update_layout(title=None, width=None, height=_height(figure), margin={"t": 12, "l": 10, "r": 10, "b": 10})
    shown.update_xaxes(automargin=True).update_yaxes(automargin=True)
    shown.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    if is_dark():
        shown = in_dark(shown)
    if title:
        st.markdown(f"#### {plain(title)}")
    revision = "" if loaded is None or loaded.revision in subtitle else f" · revision {loaded.revision}"
    st.caption(plain(subtitle + revision) + (f"  \n{note}" if note else ""))
    if on_click is None:
        st.plotly_chart(shown, key=key, theme=None, config=CONFIG, alt=f"{title}. {subtitle}")
    else:
        st.plotly_chart(
            shown,
            key=key,
            theme=None,
            config=CONFIG,
            alt=f"{title}. {subtitle}",
            selection_mode="points",
            on_select=lambda: _clicked(key, on_click, in_panel),
        )
    if take:
        take_along(key, figure, data, snippet)


def _height(figure: go.Figure) -> int:
    """The figure's height without the margins that it had for a title and for labels."""
    height, margin = figure.layout.height or 450, figure.layout.margin
    return max(240, int(height - (margin.t or 0) / 2 - (margin.b or 0) / 3))


def _clicked(key: str, on_click: Callable[[int, int], None], in_panel: bool) -> None:
    points = st.session_state[key]["selection"]["points"]
    if points:
        row, column = points[0]["customdata"][:2]
        on_click(int(row), int(column))
        if not in_panel:
            rerun_whole_page()


def take_along(key: str, figure: go.Figure | None, data: Data | None, snippet: str | None) -> None:
    """Popovers with the snippet and the downloads."""
    with st.container(horizontal=True, gap="small"):
        if snippet is not None:
            with st.popover("Reproduce in Python", icon=":material/code:", type="tertiary"):
                st.code(snippet, language="python")
        if data is None and figure is None:
            return
        with st.popover("Download", icon=":material/download:", type="tertiary"):
            files: list[tuple[str, str, str, Callable[[], bytes | str]]] = []
            if data is not None:
                files.append(("Table (CSV)", f"{key}.csv", "text/csv", lambda: as_csv(data)))
                files.append(("Labelled array (netCDF)", f"{key}.nc", "application/x-netcdf", lambda: as_netcdf(data)))
            if figure is not None:
                files.append(("Figure (HTML)", f"{key}.html", "text/html", lambda: as_html(figure)))
            for label, name, mime, make in files:
                st.download_button(label, make, file_name=name, mime=mime, key=f"get_{name}", on_click="ignore")


def as_csv(data: Data) -> str:
    """One row per number, with its labels; of arrays whose axes differ, one after the other with their names."""
    if isinstance(data, xr.DataArray):
        table = data.to_dataframe(name=str(data.name or "value")).reset_index()
    elif any(set(array.dims) == set(data.dims) for array in data.values()):
        table = data.to_dataframe().reset_index()
    else:
        parts = {str(name): array.to_dataframe(name="value").reset_index() for name, array in data.items()}
        table = pd.concat(parts, names=["quantity"]).reset_index("quantity")
    return table.to_csv(index=False)


def as_netcdf(data: Data) -> bytes:
    """The array with its labels and where it comes from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.nc"
        data.to_netcdf(path)
        return path.read_bytes()


def as_html(figure: go.Figure) -> str:
    """The figure as a page that works offline."""
    page = io.StringIO()
    without_markup(go.Figure(figure)).write_html(page, include_plotlyjs=True)
    return page.getvalue()
