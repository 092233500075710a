"""Text to checked tokens and back."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Text: TypeAlias = str | Sequence[str]


def encode(
    tokenizer: PreTrainedTokenizerBase, text: Text
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Tokens of one or several texts, padded on the right, and their attention mask (None if nothing was padded).

    Raises ValueError for an empty text, for what is no text and for words that the tokenizer does not know.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"the input must be a text, a list of texts, or a tensor of tokens, got {text!r}")
    if not texts:
        raise ValueError("no text was given: the list is empty")
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    for row, written in zip(rows, texts, strict=True):
        if not row:
            raise ValueError(f"the text {written!r} has no tokens")
        check_known(tokenizer, row, written)
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and min(map(len, rows)) < longest:
        raise ValueError("texts of different length need a tokenizer with a pad or eos token")
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return tokens, None if mask.all() else mask


def padded_left(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens and mask with right padding moved to the left."""
    if mask is None:
        return tokens, torch.ones_like(tokens)
    shifts = mask.shape[1] - mask.sum(1)
    rolled = [(row.roll(int(s)), m.roll(int(s))) for row, m, s in zip(tokens, mask, shifts, strict=True)]
    return torch.stack([row for row, _ in rolled]), torch.stack([m for _, m in rolled])


def decode_each(tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, " pos"]) -> list[str]:
    """The text of every token by itself."""
    return [tokenizer.decode([int(t)]) for t in tokens]


def check_tokens(tokens: Tensor, vocab: int) -> Int[Tensor, "batch pos"]:
    """Tokens as [batch, pos]; [pos] becomes a batch of one. Raises ValueError for what cannot be tokens."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.dim() == 1:
        tokens = tokens[None]
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [batch, pos] with at least one token, got shape {list(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"tokens from {low} to {high} do not fit the model's vocabulary of {vocab} (0 to {vocab - 1})")
    return tokens


def check_known(tokenizer: PreTrainedTokenizerBase, row: list[int], text: str) -> None:
    """Raises ValueError, with the nearest known words, if the tokens of a text hold an unknown one."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in row:
        return
    vocabulary = {tokenizer.decode([i]).strip() for i in tokenizer.get_vocab().values()}
    words = [w for w in _words(text) if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]
    hints = [f"{w!r} (like {', '.join(difflib.get_close_matches(w, vocabulary, n=3, cutoff=0.0))})" for w in words]
    raise ValueError(f"words out of the tokenizer's vocabulary in {excerpt(text, 300)!r}: {'; '.join(hints)}")


def excerpt(text: str, length: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _words(text: str) -> list[str]:
    return [w.strip(".,;:!?\"'") or w for w in dict.fromkeys(text.split())]
