"""`ssminterp ioi`: where does a Mamba keep the name it is about to say?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from xarray import DataArray

from ssminterp.models import HookedMamba
from ssminterp.patching import Metric, patch_sweep, position_columns, strongest
from ssminterp.plots import patching_heatmap, save_html, save_report
from ssminterp.tasks import TaskBatch, make_task

HOOKS = "resid_pre,mixer_out,x,delta,B,C,state,gate"
PROMPTS_BY_TOKEN = 8


def ioi(
    model: Annotated[str, typer.Option(help="bundled name, local folder or hub name")] = "tiny-mamba",
    n: Annotated[int, typer.Option(min=1, help="prompt pairs")] = 16,
    hooks: Annotated[str, typer.Option(help="short hook names, separated by commas")] = HOOKS,
    positions: Annotated[str, typer.Option(help="'roles', 'tokens' or 'both'")] = "both",
    out: Annotated[Path, typer.Option(help="folder for the figures")] = Path("out/ioi"),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved)")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA if there is one by default")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub name")] = None,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
) -> None:
    """Indirect object identification: patch clean into corrupted at every layer and position, and draw what matters.

    Writes one heat map per hook, index.html with all of them, and the numbers as netCDF; prints the strongest sites.
    """
    if positions not in ("roles", "tokens", "both"):
        raise typer.BadParameter(f"--positions must be 'roles', 'tokens' or 'both', got {positions!r}")
    try:
        hooked = HookedMamba.from_pretrained(model, device=device, dtype=dtype, revision=revision)
        _run(hooked, n, hooks.split(","), positions, out, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _run(model: HookedMamba, n: int, hooks: list[str], positions: str, out: Path, seed: int) -> None:
    assert model.tokenizer is not None
    batch = make_task("ioi", model.tokenizer, n=n, seed=seed).to(model.device)
    _print_example(model, batch)
    sweeps = {}
    if positions in ("roles", "both"):
        metric = _metric(model, batch)
        sweeps["role"] = patch_sweep(model, batch.clean, batch.corrupted, hooks, metric, positions=batch.roles)
    if positions in ("tokens", "both"):
        # Prompts of one template: a token position means the same in all of them.
        alike = make_task("ioi", model.tokenizer, n=min(n, PROMPTS_BY_TOKEN), templates=batch.templates[:1], seed=seed)
        alike = alike.to(model.device)
        columns = position_columns(model, alike.clean, roles=alike.roles)
        metric = _metric(model, alike)
        sweeps["token"] = patch_sweep(model, alike.clean, alike.corrupted, hooks, metric, positions=columns)
    for kind, sweep in sweeps.items():
        typer.echo(f"\nStrongest site of each hook by {kind} (moved: 0 = corrupted, 1 = clean):")
        typer.echo(strongest_of_each(sweep).to_string(index=False, float_format="{:.3f}".format))
    _write(sweeps, hooks, out)
    typer.echo(f"\nFigures: {out / 'index.html'}")


def strongest_of_each(sweep: DataArray) -> pd.DataFrame:
    """The strongest site of every hook, so that the residual stream does not hide the rest."""
    sites = pd.concat([strongest(sweep, n=1, hooks=[hook]) for hook in sweep["hook"].values.tolist()])
    return sites.sort_values("moved", key=abs, ascending=False, ignore_index=True)


@torch.no_grad()
def _metric(model: HookedMamba, batch: TaskBatch) -> Metric:
    return batch.metric("normalised_logit_diff", model(batch.clean), model(batch.corrupted))


@torch.no_grad()
def _print_example(model: HookedMamba, batch: TaskBatch) -> None:
    accuracy = batch.metric("accuracy")(model(batch.clean)).mean()
    typer.echo(f"{model.cfg.model_name}: {accuracy:.0%} of {len(batch)} clean prompts answered right")
    typer.echo(f"clean:     {batch.clean_prompts[0]} → {model.to_str_tokens(batch.answers[:1])[0]}")
    typer.echo(f"corrupted: {batch.corrupted_prompts[0]} → {model.to_str_tokens(batch.wrong_answers[:1])[0]}")


def _write(sweeps: dict[str, DataArray], hooks: list[str], out: Path) -> None:
    figures = []
    for kind, sweep in sweeps.items():
        out.mkdir(parents=True, exist_ok=True)
        sweep.to_netcdf(out / f"by_{kind}.nc")
        for hook in hooks:
            figure = patching_heatmap(sweep.sel(hook=hook))
            save_html(figure, out / f"{hook}_by_{kind}.html", shared_script=True)
            figures.append(figure)
    tables = {f"Strongest site of each hook by {kind}": strongest_of_each(sweep) for kind, sweep in sweeps.items()}
    save_report(out / "index.html", "Where is the name? Indirect object identification", tables, figures)
