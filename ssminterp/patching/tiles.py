"""Rows of a pass as they lie in memory: tiles of one row per site, a tile for every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Rows:
    """Rows on their way through the layers.

    hidden: room for residual streams, the base rows' first, of as many tiles as the pass will have.
    cells: those of the tiles that are in use, without the base.
    first, first_cells: rows that differ from the base at position 0 alone, [tiles, n, d_model].
    """

    def __init__(
        self, base: Float[Tensor, "tokens d_model"], n: int, hidden: Float[Tensor, "tiles tokens d_model"]
    ) -> None:
        self.hidden = hidden
        self.hidden[0] = base
        self.cells: list[int] = []
        self.first = base.new_empty(0, n, base.shape[-1])
        self.first_cells: list[int] = []

    @property
    def used(self) -> Tensor:
        return self.hidden[: 1 + len(self.cells)]

    def added(self, cells: Sequence[int]) -> Tensor:
        """Tiles for more cells, in which nothing stands yet."""
        start = 1 + len(self.cells)
        self.cells += cells
        return self.hidden[start : start + len(cells)]

    def put_first(self, local: Pile) -> None:
        """Go on with other rows that differ from the base at position 0 alone."""
        self.first_cells, self.first = local.cells, self.first[:0] if local.tensor is None else local.tensor


class Pile:
    """Tiles of several groups of changes that have come to the same stage: [tiles, n, *features]."""

    def __init__(self, cells: Sequence[int] = (), tensor: Tensor | None = None) -> None:
        self.cells = list(cells)
        self.tensor = tensor

    @property
    def tiles(self) -> int:
        return len(self.cells)

    def __bool__(self) -> bool:
        return bool(self.cells)

    def add(self, cells: Sequence[int], tensor: Tensor) -> None:
        before = self.tensor if self.cells else None
        self.tensor = tensor if before is None else torch.cat([before, tensor.to(before)])
        self.cells += cells

    def map(self, stage: Callable[[Tensor], Tensor]) -> None:
        """Bring all rows to the next stage."""
        if self.tensor is not None and self.cells:
            self.tensor = stage(self.tensor)
