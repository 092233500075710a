"""Reading a text of any length, piece by piece: the memory it takes does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ssminterp.models.tokens import check_known

# Characters that are tokenized at once, and those to both sides of a cut by which the cut is judged.
PIECE = 1 << 16
CONTEXT = 128
CANDIDATES = 16
_GAP = re.compile(r"(?<=\S)\s(?=\S)")


@torch.no_grad()
def read_chunks(
    hf_model: nn.Module,
    chunks: Iterable[Tensor],
    device: torch.device,
    cache: Cache | None,
    total: int | None,
    logits_to_keep: int,
    progress: bool,
) -> tuple[Cache, int]:
    """Run one chunk [batch, pos] after the other and keep nothing but the cache; the cache and the number of tokens.

    total: how many tokens there will be, for the progress bar, which appears when reading takes over a second.
    logits_to_keep: 1 for those of a chunk's last position, which are a small part of its largest tensor; 0 for all.
    """
    n_tokens = 0
    with tqdm(total=total, desc="reading", unit="token", unit_scale=True, disable=not progress, delay=1) as bar:
        for tokens in chunks:
            tokens = tokens.to(device)
            output = hf_model(input_ids=tokens, cache_params=cache, use_cache=True, logits_to_keep=logits_to_keep)
            cache = output.cache_params
            n_tokens += tokens.shape[1]
            bar.update(tokens.shape[1])
    assert cache is not None
    return cache, n_tokens


def in_chunks(pieces: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """The same tokens [batch, pos] in chunks of exactly `chunk`, but for the last, whatever the sizes of the pieces."""
    rest: Tensor | None = None
    for piece in pieces:
        joined = piece if rest is None else torch.cat([rest, piece], dim=1)
        *whole, rest = joined.split(chunk, dim=1)
        yield from whole
    if rest is not None:
        yield rest


def tokens_in_pieces(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int = PIECE) -> Iterator[Tensor]:
    """The tokens [1, pos] of one text that comes in several strings, the same that the whole text has at once.

    The text is cut only where the tokenizer is seen to give the same tokens with and without the cut; where it never
    does, the text is tokenized in one piece. At most about `size` characters are tokenized at once otherwise.

    Raises ValueError for a text without tokens and for words that the tokenizer does not know.
    """
    waiting, some = "", False
    for text in texts:
        for start in range(0, len(text), size):
            waiting += text[start : start + size]
            cut = _safe_cut(tokenizer, waiting) if len(waiting) >= size else None
            if cut is not None:
                ids = _ids(tokenizer, waiting[: cut[0]])
                waiting, some = waiting[cut[1] :], some or bool(ids)
                if ids:
                    yield torch.tensor([ids])
    ids = _ids(tokenizer, waiting)
    if not ids and not some:
        raise ValueError(f"the text {waiting!r} has no tokens")
    if ids:
        yield torch.tensor([ids])


def _safe_cut(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int] | None:
    """Where a first part of a text ends and the rest begins, so that their tokens are the text's; None if nowhere.

    Most tokenizers keep a space with the word after it; some (SentencePiece) put one before every text, and for them
    the space between the two parts is left out.
    """
    gaps = [match.start() for match in _GAP.finditer(text, max(0, len(text) - 32 * CONTEXT), len(text) - CONTEXT)]
    for gap in islice(reversed(gaps), CANDIDATES):
        before, after = text[max(0, gap - CONTEXT) : gap], text[gap : gap + CONTEXT]
        together = _raw_ids(tokenizer, before + after)
        for skipped in (0, 1):
            if together == _raw_ids(tokenizer, before) + _raw_ids(tokenizer, after[skipped:]):
                return gap, gap + skipped
    return None


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = _raw_ids(tokenizer, text)
    check_known(tokenizer, ids, text)
    return ids
