"""Reading of any length: pieces of text and chunks of tokens change nothing."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, hooked, random_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ssminterp import HookedMamba
from ssminterp.models.reading import in_chunks, tokens_in_pieces

WORDS = ["the", "cat", "sat", "on", "mat,", "isn't", "it?", "Naïve", "12345", "—", "été\t\tx", "", "y\n\n", "z"]
TINY = HookedMamba.from_pretrained("nano-mamba", device="cpu")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-NeoX's: byte-level BPE, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace(prepend: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's: spaces are marks, and one is put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def uncuttable() -> PreTrainedTokenizerFast:
    """Merges reach across spaces, so that no cut is sure to be harmless."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(["a b " * 50], trainers.BpeTrainer(vocab_size=400, max_token_length=400))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), metaspace("first"), metaspace("always"), metaspace("never")], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerFast, stream: bool) -> None:
    rng = random.Random(0)
    words = [rng.choice(WORDS) for _ in range(2000)]
    text = " ".join(words)
    texts: Iterator[str] = iter([text])
    if stream:
        cuts = [0, *sorted(rng.sample(range(len(text)), 30)), len(text)]
        texts = (text[a:b] for a, b in pairwise(cuts))
    pieces = list(tokens_in_pieces(tokenizer, texts, size=600))
    assert len(pieces) > 5
    assert torch.cat(pieces, 1)[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_that_cannot_be_cut_is_tokenized_whole() -> None:
    text = "a b " * 400
    pieces = list(tokens_in_pieces(uncuttable(), [text], size=300))
    assert torch.cat(pieces, 1)[0].tolist() == uncuttable()(text)["input_ids"]


def test_a_text_of_the_bundled_tokenizer_in_pieces() -> None:
    text = " ".join(f"Given red: lamp, iron: {thing}. Now iron: {thing}." for thing in ("lamp", "onion") * 40)
    pieces = list(tokens_in_pieces(TINY.tokenizer, [text], size=500))
    assert len(pieces) > 3
    assert torch.equal(torch.cat(pieces, 1), TINY.to_tokens(text))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), chunk=st.integers(1, 7))
def test_chunks_hold_the_same_tokens(sizes: list[int], chunk: int) -> None:
    tokens = random_tokens(2, sum(sizes))
    chunks = list(in_chunks(tokens.split(sizes, dim=1), chunk))
    assert torch.equal(torch.cat(chunks, 1), tokens)
    assert {part.shape[1] for part in chunks[:-1]} <= {chunk}


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_64_give_the_same_bits(family: str) -> None:
    """The CPU scan works in blocks of 64 positions: at their borders a cut does not even change the rounding."""
    model = hooked(family, conv_kernel=4)
    tokens = random_tokens(2, 301)
    whole, parts = model.read(tokens), model.read(tokens, chunk=64)
    assert torch.equal(whole.ssm, parts.ssm)
    assert torch.equal(whole.conv, parts.conv)


def test_text_tokens_and_file_are_read_alike(tmp_path: Path) -> None:
    text = " ".join(["Given red: lamp, iron: onion."] * 30)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    by_tokens = TINY.read(TINY.to_tokens(text), chunk=50)
    with path.open(encoding="utf-8") as file:
        states = [
            TINY.read(text, chunk=50),
            TINY.read(file, chunk=50),
            TINY.read(iter([text[:100], text[100:]]), chunk=50),
        ]
    for state in states:
        assert torch.equal(state.ssm, by_tokens.ssm)
        assert state.n_tokens == by_tokens.n_tokens
        assert state.history[0].startswith(f"read {state.n_tokens} tokens: 'Given red: lamp")


def test_memory_does_not_grow_with_the_text() -> None:
    """Peak growth while reading ten times as much stays far under what the logits or activations of it would take."""
    model = hooked(vocab_size=2000, hidden_size=32)
    process = psutil.Process()
    model.read(random_tokens(1, 4096), chunk=512)
    before = process.memory_info().rss
    model.read(random_tokens(1, 40_000), chunk=512)
    # The logits alone would be 320 MB.
    assert process.memory_info().rss - before < 60e6


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        TINY.read("Given red", chunk=0)
    with pytest.raises(ValueError, match="has no tokens"):
        TINY.read("")
    with pytest.raises(ValueError, match="has no tokens"):
        TINY.read(iter([]))
    with pytest.raises(ValueError, match=r"out of the tokenizer's vocabulary.*xylophon"):
        TINY.read(iter(["Given red ", "xylophon"]))
    with pytest.raises(ValueError, match="state= takes a ModelState"):
        TINY.read("Given red", state="lamp")
