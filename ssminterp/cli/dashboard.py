"""`ssminterp dashboard`: the app in a browser."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from ssminterp.checkpoints import BUNDLED
from ssminterp.models.hub import check_local


def dashboard(
    model: Annotated[str, typer.Option(help="bundled name, local folder or hub name to start with")] = BUNDLED[0],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8501,
) -> None:
    """Look at a Mamba in the browser: prompts, states, patching maps. Served to this machine only (localhost)."""
    if find_spec("streamlit") is None:
        raise typer.BadParameter("the dashboards need streamlit: pip install 'ssminterp[dashboards]'")
    try:
        check_local(model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    from ssminterp_dashboards.launch import launch

    raise typer.Exit(launch(model, port))
