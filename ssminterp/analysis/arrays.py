"""Labelled results of analyses, and the checking of what they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.patching.columns import position_columns
from ssminterp.positions import Positions, resolve_positions
from ssminterp.versions import versions

# Labels by dim, in order; an int instead of labels counts from 0.
Coords: TypeAlias = Mapping[str, Sequence[object] | int]


def provenance(model: HookedMamba) -> dict[str, str]:
    """Which model and versions an array was made with."""
    return {
        "model": model.cfg.model_name,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        **versions(),
    }


def labelled(
    values: Tensor,
    model: HookedMamba,
    coords: Coords,
    name: str,
    **attributes: str | int | float,
) -> xr.DataArray:
    """An array with one dim per coordinate.

    attributes: what the numbers are, beside the provenance.
    """
    labels = {dim: np.arange(given) if isinstance(given, int) else list(given) for dim, given in coords.items()}
    return xr.DataArray(
        values.detach().cpu().numpy(), dims=list(coords), coords=labels, name=name, attrs=attributes | provenance(model)
    )


def position_labels(
    model: HookedMamba, tokens: Int[Tensor, "batch pos"], positions: Positions | None = None
) -> list[str]:
    """Unique labels like "5 Mary"; where examples differ, "5 ⟨varies⟩"."""
    return [column.label for column in position_columns(model, tokens, positions)]


def resolve_indices(axis: str, wanted: int | Sequence[int] | None, size: int) -> list[int]:
    """Channels, coordinates or layers as a list, all of them for None.

    Raises ValueError if one is out of range or named twice, or none is left.
    """
    indices = list(range(size)) if wanted is None else [int(i) for i in np.atleast_1d(wanted)]
    outside = [i for i in indices if not 0 <= i < size]
    if outside:
        raise ValueError(f"{axis} {outside} do not exist: the model has {size} (0 to {size - 1})")
    if not indices:
        raise ValueError(f"{axis} is empty: name at least one, or leave it out for all {size}")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{axis}={indices} names one twice")
    return indices


def resolve_pairs(
    targets: Positions | None, sources: Positions | None, length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Target and source positions. Where one is None: all positions that the other allows.

    Raises ValueError for positions out of range, a source after every target, and a target before every source.
    """
    to, since = resolve_positions(targets, length), resolve_positions(sources, length)
    if to is None:
        to = tuple(range(0 if since is None else min(since), length))
    if since is None:
        since = tuple(range(max(to) + 1))
    late, early = [s for s in since if s > max(to)], [t for t in to if t < min(since)]
    if late:
        raise ValueError(f"sources {late} lie after every target; the last target is {max(to)}")
    if early:
        raise ValueError(f"targets {early} lie before every source; the first source is {min(since)}")
    return to, since
