"""Running texts through a model and writing what hooks see to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ssminterp.activations.dataset import ActivationDataset
from ssminterp.activations.folder import Part, Read, Writer
from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.hook_names import NamesFilter, short_to_specs
from ssminterp.models.hook_points import Recorder, Registered, attached
from ssminterp.models.memory import check_recording_fits
from ssminterp.models.tokens import check_tokens, encode
from ssminterp.positions import Positions, resolve_positions

# A text, a row of a Hugging Face dataset, or tokens.
Item: TypeAlias = str | Mapping[str, Any] | Tensor
ChoosePositions: TypeAlias = Callable[[Tensor], Positions]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def collect_activations(
    model: HookedMamba,
    texts: Iterable[Item],
    hooks: NamesFilter,
    out: str | Path,
    *,
    positions: Positions | ChoosePositions | None = None,
    layers: Sequence[int] | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 28,
    text_field: str = "text",
    progress: bool = True,
) -> ActivationDataset:
    """Write what hooks see in many texts to a folder of safetensors shards, and open it as a dataset.

    >>> import tempfile
    >>> model = HookedMamba.from_pretrained("nano-mamba")
    >>> texts = ["Shelby gave an apple to", "Then, Emma and Shelby had fun"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = collect_activations(model, texts, "resid_post", folder, layers=[1], progress=False)
    ...     row = data[-1]
    ...     print(data.text(row["text"]), row["position"], list(row["blocks.1.hook_resid_post"].shape))
    Then, Emma and Shelby had fun 6 [64]

    A row is one token of one text. Texts are taken as they come and never held all at once: memory holds one batch and
    at most three times `shard_bytes`. Finished shards are listed in `out`/index.json; a call with the same arguments
    goes on after them, and after a finished collection with the texts that have been added. Blocks above the last hook
    are not run, nor is the unembedding, unless hooks there are chosen.

    Within `model.intervene` or `model.hooks` it is the changed run that is written; the index says at which hooks.

    texts: any iterable, of strings, of mappings with the text under `text_field` (a Hugging Face dataset, streamed or
    not), or of tokens [pos]. A text without tokens is kept, and has no rows.
    hooks: short names ("state", "resid_post") or hook names and patterns. layers: only these.
    positions: of each text, all by default; a slice takes what there is, integers must exist in every text; or a
    function of a text's tokens [pos] (it must choose the same when a collection is resumed: that cannot be checked).
    max_tokens: read only so many tokens of each text. dtype: to store activations in; as they are by default.
    shard_bytes: a shard is closed when its activations take as much; a text is never divided.

    Raises ValueError if no hook matches, `texts` is one text or a mapping, a text is no text or lacks a position, a
    batch would not fit in memory, `out` holds something else or cannot be written (a full disk: what was finished
    stays, and a later call goes on there).
    """
    _check_texts(texts)
    _check_options(batch_size, max_tokens, dtype, shard_bytes)
    chosen = _chosen_hooks(model, hooks, layers)
    description = {
        "fingerprint": model.fingerprint(),
        "model_dtype": str(model.cfg.dtype),
        "changed_at": [name for name, hook in model.hook_points.items() if hook.functions],
        "hooks": {hook.name: [*hook.spec.axes[2:]] for hook in chosen},
        "positions": _positions_in_words(positions),
        "max_tokens": max_tokens,
        "dtype": None if dtype is None else str(dtype),
    }
    writer = Writer(out, description, model.cfg.model_name)
    stream = (_read(model, item, number, text_field, max_tokens) for number, item in enumerate(texts))
    total = len(texts) if isinstance(texts, Sized) else None
    with tqdm(total=total, unit=" texts", desc="activations", disable=not progress) as bar:
        for shard in writer.skip_written(stream):
            bar.update(shard["texts"])
        part = Part()
        for batch in _batches(stream, batch_size):
            first = writer.n_texts + len(part.texts)
            part.add(batch, _rows(model, chosen, batch, first, positions, dtype))
            bar.update(len(batch))
            if part.nbytes >= shard_bytes:
                writer.write(part)
                part = Part()
        writer.write(part)
        writer.finish()
    return ActivationDataset(out)


def _check_texts(texts: object) -> None:
    """Raises ValueError for what gives letters or the names of splits, and not texts, one after the other."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"texts is one text, {texts!r:.60}: pass a list of texts, [text] for one")
    if isinstance(texts, Mapping):
        raise ValueError(f"texts is a mapping of {list(texts)}: pass one of these, or a list of mappings for rows")
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts must be an iterable of texts, got {type(texts).__name__}")


def _check_options(batch_size: int, max_tokens: int | None, dtype: torch.dtype | None, shard_bytes: int) -> None:
    for name, value in {"batch_size": batch_size, "max_tokens": max_tokens, "shard_bytes": shard_bytes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _chosen_hooks(model: HookedMamba, hooks: NamesFilter, layers: Sequence[int] | None) -> list[HookPoint]:
    """The hook points in the model's order. Raises ValueError if a name or a layer does not exist."""
    if layers is not None:
        model.check_layers(layers)
    if callable(hooks):
        names = set(model.hook_names(hooks))
    else:
        written = [hooks] if isinstance(hooks, str) else list(hooks)
        full = [name for name in written if "hook_" in name or "*" in name]
        short = [name for name in written if name not in full]
        names = set(model.hook_names(full)) if full or not short else set()
        if short:
            wanted = short_to_specs(short, model.hook_specs)
            names |= {name for name, hook in model.hook_points.items() if hook.spec in wanted}
    chosen = [hook for name, hook in model.hook_points.items() if name in names]
    kept = [hook for hook in chosen if layers is None or hook.layer is None or hook.layer in layers]
    if not kept:
        raise ValueError(f"hooks={hooks!r} has none in layers {list(layers or ())}")
    return kept


def _positions_in_words(positions: Positions | ChoosePositions | None) -> str:
    if callable(positions):
        return "chosen by a function"
    return repr(positions.tolist() if isinstance(positions, Tensor) else positions)


def _read(model: HookedMamba, item: Item, number: int, text_field: str, max_tokens: int | None) -> Read:
    """Raises ValueError, with the number of the text, for what is no text and for words out of the vocabulary."""
    try:
        if isinstance(item, Tensor):
            tokens = check_tokens(item, model.cfg.vocab)
            if tokens.shape[0] != 1:
                raise ValueError(f"tokens must be [pos], got {list(item.shape)}")
            text = "" if model.tokenizer is None else model.tokenizer.decode(tokens[0].tolist())
            return Read(text, tokens[0, :max_tokens].cpu())
        text = _text_of(item, text_field)
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: pass tokens [pos], or load it with tokenizer=")
        if not model.tokenizer(text, add_special_tokens=False)["input_ids"]:
            return Read(text, torch.empty(0, dtype=torch.long))
        return Read(text, encode(model.tokenizer, text)[0][0, :max_tokens])
    except ValueError as error:
        raise ValueError(f"text {number}: {error}") from error


def _text_of(item: Item, text_field: str) -> str:
    if isinstance(item, Mapping):
        if text_field not in item:
            raise ValueError(f"there is no {text_field!r} in it, but {list(item)}: pass text_field=")
        item = item[text_field]
    if not isinstance(item, str):
        raise ValueError(f"it must be a string, a mapping that holds one, or tokens, got {item!r:.80}")
    return item


def _batches(stream: Iterator[Read], size: int) -> Iterator[list[Read]]:
    while batch := list(islice(stream, size)):
        yield batch


def _rows(
    model: HookedMamba,
    hooks: Sequence[HookPoint],
    batch: Sequence[Read],
    first: int,
    positions: Positions | ChoosePositions | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """For every chosen token of a batch: its text's number, its position, itself, and what each hook saw of it."""
    wanted = [_positions_of(read, first + i, positions) for i, read in enumerate(batch)]
    recorded = sorted(set().union(*wanted))
    rows = {
        "row.text": torch.tensor([first + i for i, chosen in enumerate(wanted) for _ in chosen], dtype=torch.long),
        "row.position": torch.tensor([position for chosen in wanted for position in chosen], dtype=torch.long),
    }
    rows["row.token"] = torch.cat([read.tokens[list(chosen)] for read, chosen in zip(batch, wanted, strict=True)])
    if not recorded:
        return rows
    store = _record(model, hooks, [read.tokens for read in batch], recorded)
    column = {position: i for i, position in enumerate(recorded)}
    at = (rows["row.text"] - first, torch.tensor([column[int(position)] for position in rows["row.position"]]))
    return rows | {hook.name: store[hook.name][at].to(dtype or store[hook.name].dtype) for hook in hooks}


def _positions_of(read: Read, number: int, positions: Positions | ChoosePositions | None) -> tuple[int, ...]:
    length = len(read.tokens)
    if length == 0:
        return ()
    chosen = positions(read.tokens) if callable(positions) else positions
    if isinstance(chosen, slice):
        return tuple(range(length)[chosen])
    try:
        resolved = resolve_positions(chosen, length)
    except ValueError as error:
        raise ValueError(f"text {number} ({read.text!r:.60}): {error}. A slice takes what there is") from error
    return tuple(range(length)) if resolved is None else resolved


@torch.no_grad()
def _record(
    model: HookedMamba, hooks: Sequence[HookPoint], texts: Sequence[Tensor], positions: Sequence[int]
) -> dict[str, Tensor]:
    """What each hook saw, [batch, positions, …] on the CPU. Raises ValueError if that does not fit in memory."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    check_recording_fits(hooks, model.cfg, len(texts), len(positions), torch.device("cpu"))
    store: dict[str, Tensor] = {}
    recorder = Recorder(store, positions, "cpu")
    needs_logits = any(hook.spec.short == "logits" for hook in hooks)
    inputs = {"input_ids": tokens.to(model.device), "use_cache": False, "logits_to_keep": 0 if needs_logits else 1}
    if not mask.all():
        inputs["attention_mask"] = mask.to(model.device)
    try:
        with attached([*((hook, recorder) for hook in hooks), *_stop_above(model, hooks)]):
            model.hf_model(**inputs)
    except _Done:
        pass
    return store


class _Done(Exception):
    """All that was asked for has been seen."""


def _stop_above(model: HookedMamba, hooks: Sequence[HookPoint]) -> list[tuple[HookPoint, Registered]]:
    """A hook function that ends the run where the block after the last of `hooks` begins, if there is one."""
    if any(hook.spec.short in ("final_norm", "logits") for hook in hooks):
        return []
    after = 1 + max(-1 if hook.layer is None else hook.layer for hook in hooks)

    def stop(tensor: Tensor, hook: HookPoint) -> None:
        raise _Done

    return [
        (hook, Registered(stop, None))
        for hook in model.hook_points.values()
        if hook.spec.short == "resid_pre" and hook.layer == after
    ]
