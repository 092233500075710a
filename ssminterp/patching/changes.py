"""What a pass changes at one hook of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.models import HookPoint
from ssminterp.models.hook_points import HookSpec
from ssminterp.patching.base_rows import BaseRows
from ssminterp.patching.moved import Place
from ssminterp.patching.request import Sweep
from ssminterp.patching.sites import Sites


class Changes(NamedTuple):
    """What is changed at one hook of one layer: a tile of rows for each selection.

    cells: the number of each cell. selections: which selection of the sweep each is.
    source: [n, *features], the new values' source at each of the sites. is_raw: whether it is not Δ but what Δ is made
        of, which a patch of all of it can put in as well.
    """

    point: HookPoint
    cells: Sequence[int]
    selections: Sequence[int]
    source: Tensor
    sites: Sites
    is_raw: bool = False

    @property
    def spec(self) -> HookSpec:
        return self.point.spec

    def applied(self, sweep: Sweep, base: BaseRows) -> Float[Tensor, "tiles n *features"]:
        """The rows' new values at their sites. What the base holds there is computed only if that matters."""
        tiles = len(self.cells)
        mask = self._masks(sweep, self.source.device)
        if mask is None and sweep.intervention == "patch":
            return self.source.expand(tiles, *self.source.shape)
        now = base.value(self.spec.short)
        now = now.expand(tiles, *now.shape)
        new = self._new_value(sweep, now, self.source.expand_as(now))
        return new if mask is None else torch.where(mask, new, now)

    def _new_value(self, sweep: Sweep, now: Tensor, source: Tensor) -> Tensor:
        examples, columns = (index.repeat(len(self.cells)) for index in (self.sites.example, self.sites.column))
        place = Place(self.point, examples, columns)
        return sweep.new_value(now.flatten(0, 1), source.flatten(0, 1), place).unflatten(0, now.shape[:2])

    def _masks(self, sweep: Sweep, device: torch.device) -> Tensor | None:
        """[cells, 1, *features]: what each cell changes; None if all change everything."""
        selections = [sweep.selections[i] for i in self.selections]
        if all(selection.is_everything for selection in selections):
            return None
        masks = [selection.mask(self.spec, device) for selection in selections]
        return torch.stack(torch.broadcast_tensors(*masks))[:, None]


def cells_by_place(sweep: Sweep, cells: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Cells by number of the hook and layer."""
    _, n_layers, _, n_selections = sweep.grid
    grouped: dict[tuple[int, int], list[int]] = {}
    for cell in cells:
        hook, rest = divmod(cell, n_layers * n_selections)
        grouped.setdefault((hook, sweep.layers[rest // n_selections]), []).append(cell)
    return grouped
