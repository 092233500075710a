"""Intervention objects in sweeps: `steer`, `scale`, `ablate`, `freeze`, `patch`, moved over the grid."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ssminterp.interventions.base import HookEdit
from ssminterp.interventions.edits import Edit
from ssminterp.models import FwdHook, HookedMamba, HookPoint
from ssminterp.patching.columns import Column


class Place(NamedTuple):
    """Where rows of values stand: the hook, and each row's example and number of its column."""

    point: HookPoint
    examples: Int[Tensor, " rows"]
    columns: Int[Tensor, " rows"]


class MovedEdit:
    """An intervention that a sweep puts at each hook, layer and column of its grid in turn.

    Raises ValueError, before any cell is run, if the intervention has positions of its own, is not meant for a hook of
    the grid, or has values that do not fit there.
    """

    def __init__(
        self, edit: HookEdit, model: HookedMamba, points: Sequence[HookPoint], columns: Sequence[Column]
    ) -> None:
        if edit.where.positions is not None:
            raise ValueError(f"{edit!r} has positions of its own, but a sweep moves it over positions: leave them out")
        meant = set(model.hook_names(edit.names))
        foreign = [point.name for point in points if point.name not in meant]
        if foreign:
            raise ValueError(
                f"{edit!r} is not for {', '.join(foreign[:3])}, which the sweep puts it at: give it the names '*'"
            )
        self.edit = edit
        self.model = model
        positions = torch.stack([column.positions for column in columns], dim=1)  # batch, columns
        where = replace(edit.where, positions=positions)
        self._edits: dict[str, tuple[Edit, Tensor | None]] = {
            point.name: (edit.make_edit(point, model, where), where.feature_mask(point, model)) for point in points
        }
        self._examples = where.batch_mask(len(positions))

    @property
    def name(self) -> str:
        return repr(self.edit)

    def digest(self) -> str:
        """Tells it from interventions of the same name with other values."""
        found = hashlib.sha256()
        for edit, _ in self._edits.values():
            for value in edit.values():
                found.update(value.detach().double().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def new_value(self, now: Tensor, place: Place) -> Tensor:
        """now: [rows, *features]."""
        edit, features = self._edits[place.point.name]
        rows, columns = place.examples.to(now.device), place.columns.to(now.device)
        new = edit.pairs(rows, columns)(now[:, None])[:, 0].to(now.dtype)
        if features is not None:
            new = torch.where(features.to(now.device), new, now)
        if self._examples is not None:
            chosen = self._examples.to(now.device)[rows]
            new = torch.where(chosen.reshape(-1, *(1,) * (now.dim() - 1)), new, now)
        return new

    def fwd_hooks(self, point: HookPoint, column: Column) -> list[FwdHook]:
        """The hook functions that carry it out in one cell."""
        where = replace(self.edit.where, positions=column.positions[:, None])
        return replace(self.edit, names=point.name, where=where).fwd_hooks(self.model)
