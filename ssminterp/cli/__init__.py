"""The `ssminterp` command."""

from __future__ import annotations

import typer

from ssminterp.cli import states
from ssminterp.cli.dashboard import dashboard
from ssminterp.cli.ioi import ioi
from ssminterp.cli.models import models

app = typer.Typer(
    help="See how a state space model thinks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(ioi)
app.command()(dashboard)
app.command()(models)
app.add_typer(states.app, name="states")

__all__ = ["app"]
