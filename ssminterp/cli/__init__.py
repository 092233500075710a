"""The `ssminterp` command."""

from __future__ import annotations

import typer

from ssminterp.checkpoints import BUNDLED
from ssminterp.cli import states
from ssminterp.cli.dashboard import dashboard
from ssminterp.cli.ioi import ioi

app = typer.Typer(
    help="See how a state space model thinks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(ioi)
app.command()(dashboard)
app.add_typer(states.app, name="states")


@app.command()
def models() -> None:
    """List the models that come with the package."""
    for name in BUNDLED:
        typer.echo(name)


__all__ = ["app"]
