"""`ssminterp states`: texts read into cartridges, kept in a folder, and asked about."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ssminterp.cartridges import CartridgeLibrary
from ssminterp.models import HookedMamba

app = typer.Typer(
    help="States as cartridges: read a text once, keep what the model made of it, ask about it later.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="folder of cartridges")]
Name = Annotated[str, typer.Argument(help="name of the cartridge in the folder")]
Model = Annotated[str, typer.Option(help="bundled name, local folder or hub name")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA if there is one by default")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved)")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub name")]


@app.command("list")
def list_states(folder: Folder) -> None:
    """List the cartridges of a folder: what each has read, by which model, and files that are damaged."""
    try:
        table = CartridgeLibrary(folder).table()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if table.empty:
        typer.echo(f"{folder} holds no cartridges")
        return
    for row in table.to_dict("records"):
        if row["problem"]:
            typer.echo(f"{row['name']}: damaged: {row['problem']}")
            continue
        typer.echo(
            f"{row['name']}: {int(row['n_tokens']):,} tokens, batch {int(row['batch'])}, {row['megabytes']:.2f} MB, "
            f"{row['model']} [{row['fingerprint']}], {row['history']}"
        )


@app.command("read")
def read_state(
    folder: Folder,
    name: Name,
    text: Annotated[str | None, typer.Option(help="the text to read")] = None,
    file: Annotated[Path | None, typer.Option(help="a text file of any length to read instead, UTF-8")] = None,
    after: Annotated[str | None, typer.Option(help="a cartridge of the folder to go on from")] = None,
    model: Model = "tiny-mamba",
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
    chunk: Annotated[int, typer.Option(min=1, help="tokens read at once")] = 2048,
    overwrite: Annotated[bool, typer.Option(help="replace a cartridge of that name")] = False,
) -> None:
    """Read a text of any length into a cartridge and keep it in the folder."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give the text to read, either as --text or as --file")
    try:
        library = CartridgeLibrary(folder)
        if library.path(name).exists() and not overwrite:
            raise ValueError(f"{folder} holds a cartridge called {name!r} already: pass --overwrite, or another name")
        hooked = HookedMamba.from_pretrained(model, device=device, dtype=dtype, revision=revision)
        before = None if after is None else library.read(after, hooked)
        with ExitStack() as stack:
            lines = iter([text or ""]) if file is None else stack.enter_context(file.open(encoding="utf-8"))
            state = hooked.read(lines, state=before, chunk=chunk)
        path = library.add(name, state, overwrite=overwrite)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{state.n_tokens:,} tokens in {path.stat().st_size / 1e6:.2f} MB: {path}")


@app.command("apply")
def apply_state(
    folder: Folder,
    name: Name,
    question: Annotated[str, typer.Argument(help="the text that the model goes on from")],
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 1,
    model: Model = "tiny-mamba",
    device: Device = None,
    dtype: Dtype = "float32",
    revision: Revision = None,
) -> None:
    """Put a cartridge under a question and print what the model says next, and what it says without the cartridge."""
    try:
        hooked = HookedMamba.from_pretrained(model, device=device, dtype=dtype, revision=revision)
        state = CartridgeLibrary(folder).read(name, hooked)
        if state.batch != 1:
            raise ValueError(f"{name!r} holds a batch of {state.batch} texts: only one can be asked here")
        answers = [hooked.generate(question, new_tokens, state=given, do_sample=False) for given in (state, None)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"with {name}: {answers[0]}")
    typer.echo(f"without: {answers[1]}")
