"""Rows of different lengths as they lie in memory, without padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class Packing:
    """How the rows of a tile lie in memory: position by position, and at each position the rows that go so far.

    lengths: of the rows, none longer than the one before it. So the rows that go as far as position t are the first
    ones, and position t of row i is the tile's token starts[t] + i.

    Raises ValueError for lengths that grow, and for a row of length 0.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        if not self.lengths or self.lengths[-1] < 1 or self.lengths != sorted(self.lengths, reverse=True):
            raise ValueError(f"lengths must be at least 1 and never grow from row to row, got {self.lengths}")
        counts = np.searchsorted(-np.array(self.lengths), -np.arange(self.lengths[0]), side="left")
        self.starts = [0, *accumulate(counts.tolist())]
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @property
    def n(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return self.lengths[0]

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def tokens_before(self, position: int) -> int:
        """How many tokens lie at earlier positions."""
        return self.starts[min(position, self.longest)]

    def reach_of(self, tokens: int) -> int:
        """How many positions the first tokens are of."""
        return bisect_left(self.starts, tokens)

    def from_position(self, first: int) -> Packing:
        """What is left of the rows from a position on, of those that go so far."""
        return Packing([length - first for length in self.lengths if length > first])

    @cached_property
    def positions(self) -> Int[Tensor, " tokens"]:
        """The position of every token."""
        counts = torch.tensor(self.starts).diff()
        return torch.arange(self.longest).repeat_interleave(counts)

    @cached_property
    def rows(self) -> Int[Tensor, " tokens"]:
        """The row of every token."""
        return torch.arange(self.tokens) - torch.tensor(self.starts)[self.positions]

    @cached_property
    def padded(self) -> Int[Tensor, "n longest"]:
        """The token at each position of each row; behind a row's end, any one."""
        starts = torch.tensor(self.starts[:-1])
        return (starts + torch.arange(self.n)[:, None]).clamp(max=self.tokens - 1)

    @cached_property
    def arrays(self) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.int32]]]:
        """starts and lengths."""
        return np.array(self.starts, np.int32), np.array(self.lengths, np.int32)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """starts, lengths, rows and positions as int32 on a device."""
        if device not in self._on:
            tensors = (torch.tensor(self.starts), torch.tensor(self.lengths), self.rows, self.positions)
            sizes = [len(tensor) for tensor in tensors]
            whole = torch.cat(tensors).int().to(device, non_blocking=True)  # one copy, which nothing waits for
            a, b, c, d = whole.split(sizes)
            self._on[device] = (a, b, c, d)
        return self._on[device]
