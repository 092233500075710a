"""The inputs of a trace's invokes as one batch, and which part of it each invoke sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class TraceBatch(NamedTuple):
    """Tokens of all invokes, padded to one width, and by the first row of each invoke its own positions in them."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"] | None
    spans: dict[int, slice]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    def own(self, first_row: int | None) -> slice:
        """The positions of the invoke that begins at a row; all of them for code that sees the whole batch."""
        return slice(0, self.width) if first_row is None else self.spans[first_row]


def n_rows(text: Any) -> int:
    """How many rows of a batch an input makes."""
    if isinstance(text, Tensor):
        return 1 if text.dim() < 2 else text.shape[0]
    return 1 if isinstance(text, str) else len(text)


def batched(inputs: Sequence[tuple[Tensor, Tensor | None]], *, pad: int, left: bool) -> TraceBatch:
    """Tokens and masks of the invokes as one batch; the shorter are padded on the right, or on the left.

    What is padded is masked, so every invoke is computed as it would be by itself.
    """
    width = max(tokens.shape[1] for tokens, _ in inputs)
    rows, masks, spans = [], [], {}
    first_row = 0
    for tokens, mask in inputs:
        length = tokens.shape[1]
        span = slice(width - length, width) if left else slice(0, length)
        row, row_mask = tokens.new_full((len(tokens), width), pad), tokens.new_zeros((len(tokens), width))
        row[:, span] = tokens
        row_mask[:, span] = 1 if mask is None else mask
        rows.append(row)
        masks.append(row_mask)
        spans[first_row] = span
        first_row += len(tokens)
    mask = torch.cat(masks)
    return TraceBatch(torch.cat(rows), None if bool(mask.all()) else mask, spans)
