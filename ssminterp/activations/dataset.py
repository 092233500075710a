"""Activations on disk as a torch dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ssminterp.activations.folder import read_index
from ssminterp.models.hook_names import NamesFilter, match_names

Row = dict[str, Any]
# Hooks that are named in a dataset's description.
SHOWN = 4


class ActivationDataset(Dataset[Row]):
    """What `collect_activations` wrote. A row is one token of one text; a text's rows follow each other.

    `data[i]` is a dict: each hook's activation [d_model], [d_inner, d_state], … under the hook's name, and the numbers
    "text", "position" and "token". A `DataLoader` makes batches [batch, …] of these, shuffled if asked to. Files are
    mapped, not read: memory holds what is asked for.

    hooks: only these, by name or pattern. partial: take an unfinished collection as far as it goes.

    Raises ValueError if the folder holds no collection, an unfinished one, or a shard that is missing or damaged.
    """

    def __init__(self, folder: str | Path, hooks: NamesFilter | None = None, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        self._index = read_index(self.folder)
        if not self._index["complete"] and not partial:
            raise ValueError(
                f"{folder} holds an unfinished collection: the call of collect_activations that began it goes on with "
                "it; pass partial=True to read what there is"
            )
        names = list(self._index["hooks"])
        self.hooks = names if hooks is None else match_names(hooks, names)
        self.model_name: str = self._index["model"]
        self.fingerprint: str = self._index["fingerprint"]
        self._ends = list(accumulate(shard["rows"] for shard in self._index["shards"]))
        self._text_ends = list(accumulate(shard["texts"] for shard in self._index["shards"]))
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Row]:
        """Several rows, as a `DataLoader` asks for them. Raises IndexError if one is out of range."""
        found = []
        for row in rows:
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} is out of range: there are {len(self)}")
            shard = bisect_right(self._ends, row % len(self))
            tensors = self._shard(shard)
            at = row % len(self) - (self._ends[shard] - self._index["shards"][shard]["rows"])
            numbers = {name: int(tensors[f"row.{name}"][at]) for name in ("text", "position", "token")}
            found.append({name: tensors[name][at].clone() for name in self.hooks} | numbers)
        return found

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{', '.join(self.axes(hook))}]" for hook in self.hooks[:SHOWN])
        more = f", and {len(self.hooks) - SHOWN} more" if len(self.hooks) > SHOWN else ""
        read = f"{len(self):,} rows of {self.n_texts:,} texts, {self.model_name}"
        return f"ActivationDataset({str(self.folder)!r}, {read}: {hooks}{more})"

    def __getstate__(self) -> dict[str, Any]:
        # A worker of a DataLoader maps the files itself.
        return self.__dict__ | {"_mapped": {}}

    @property
    def n_shards(self) -> int:
        """How many files there are."""
        return len(self._ends)

    @property
    def n_texts(self) -> int:
        """How many texts were read, those without a row included."""
        return self._text_ends[-1] if self._text_ends else 0

    def axes(self, hook: str) -> list[str]:
        """The names of a hook's axes after the rows, such as ["d_inner", "d_state"]. Raises KeyError for another."""
        return self._index["hooks"][hook]

    def shard(self, number: int) -> dict[str, Tensor]:
        """All rows of one file: each hook's activations [rows, …], and "text", "position" and "token" [rows].

        The tensors are the mapped file: clone what is to be changed. Raises IndexError if there is no such shard.
        """
        if not 0 <= number < self.n_shards:
            raise IndexError(f"shard {number} is out of range: there are {self.n_shards}")
        tensors = self._shard(number)
        if not self._index["shards"][number]["rows"]:
            return {}
        return {name: tensors[name] for name in self.hooks} | {
            name: tensors[f"row.{name}"] for name in ("text", "position", "token")
        }

    def all(self, hook: str) -> Tensor:
        """A hook's activations in every row, [rows, …], in memory. Raises ValueError for a hook that is not there."""
        (name,) = match_names([hook], self.hooks)
        shards = [self.shard(number) for number in range(self.n_shards)]
        return torch.cat([shard[name] for shard in shards if shard])

    def table(self) -> pd.DataFrame:
        """Text, position and token of every row."""
        shards = [self.shard(number) for number in range(self.n_shards)]
        columns = {name: [shard[name] for shard in shards if shard] for name in ("text", "position", "token")}
        return pd.DataFrame({name: torch.cat(parts).numpy() if parts else [] for name, parts in columns.items()})

    def text(self, number: int) -> str:
        """The text of this number. Raises IndexError if there is none."""
        tensors, at = self._find_text(number)
        start, end = _span(tensors["texts.ends"], at)
        return bytes(tensors["texts"][start:end].tolist()).decode()

    def tokens(self, number: int) -> Int[Tensor, " pos"]:
        """All tokens that were read of the text of this number. Raises IndexError if there is none."""
        tensors, at = self._find_text(number)
        start, end = _span(tensors["tokens.ends"], at)
        return tensors["tokens"][start:end].clone()

    def _find_text(self, number: int) -> tuple[dict[str, Tensor], int]:
        if not 0 <= number < self.n_texts:
            raise IndexError(f"text {number} is out of range: there are {self.n_texts}")
        shard = bisect_right(self._text_ends, number)
        return self._shard(shard), number - self._index["shards"][shard]["first_text"]

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file, mapped when it is first asked for."""
        if number not in self._mapped:
            path = self.folder / self._index["shards"][number]["file"]
            try:
                with safe_open(path, framework="pt") as file:
                    self._mapped[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise ValueError(f"the shard {path} cannot be read: {error}") from error
        return self._mapped[number]


def _span(ends: Tensor, at: int) -> tuple[int, int]:
    return int(ends[at - 1]) if at else 0, int(ends[at])
