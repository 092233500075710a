"""`ssminterp models`: which checkpoints can be loaded, and how large they are."""

from __future__ import annotations

import typer
from huggingface_hub import constants

from ssminterp.models.catalogue import Listed, available_models

_PLACES = {
    "bundled": "Bundled, always there:",
    "cached": "In the local cache ({cache}), there without a network:",
    "hub": "Known on the hub (any other Mamba, Falcon-Mamba or adapter of one loads by its name too):",
}


def models() -> None:
    """List the models that are bundled, in the local cache, and known by name, with their sizes."""
    listed = available_models()
    width = max(len(model.name) for model in listed)
    for place, title in _PLACES.items():
        here = [model for model in listed if model.place == place]
        if here:
            typer.echo(title.format(cache=constants.HF_HUB_CACHE))
            typer.echo("".join(f"  {_line(model, width)}\n" for model in here))


def _line(model: Listed, width: int) -> str:
    if model.parameters is None:
        return f"{model.name:{width}}  adapter  {_bytes(model.bytes)} on disk"
    in_memory = f"{_bytes(4 * model.parameters)} in float32, {_bytes(2 * model.parameters)} in bfloat16"
    on_disk = f"; {_bytes(model.bytes)} on disk" if model.bytes else ""
    return f"{model.name:{width}}  {_count(model.parameters)} parameters  {in_memory}{on_disk}"


def _count(number: int) -> str:
    return f"{number / 1e9:6.2f} B" if number >= 1e9 else f"{number / 1e6:6.2f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:5.2f} GB" if number >= 1e9 else f"{number / 1e6:5.1f} MB"
