"""The folder of a dataset of activations: shards in safetensors, and an index of those that are whole.

A shard holds `rows` tokens of `texts` texts: every hook's activations [rows, …] under its name; of each row the number
of its text, its position and its token (`row.text`, `row.position`, `row.token`, [rows]); and all of its texts with all
of their tokens, one after the other, with the end of each (`texts` in UTF-8 bytes, `texts.ends`, `tokens`,
`tokens.ends`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from ssminterp.files import written_whole
from ssminterp.versions import versions

INDEX = "index.json"
KIND = "ssminterp activations"


class Read(NamedTuple):
    """A text and its tokens [pos], of which there may be none."""

    text: str
    tokens: Int[Tensor, " pos"]


class Part:
    """The texts and rows that go into one shard."""

    def __init__(self) -> None:
        self.texts: list[Read] = []
        self.n_rows = 0
        self.nbytes = 0
        self._rows: list[Mapping[str, Tensor]] = []

    def add(self, texts: Sequence[Read], rows: Mapping[str, Tensor]) -> None:
        """rows: tensors [rows, …] by name, `row.text` among them."""
        self.texts += texts
        self._rows.append(rows)
        self.n_rows += len(rows["row.text"])
        self.nbytes += sum(tensor.nbytes for tensor in rows.values())

    def tensors(self) -> dict[str, Tensor]:
        """What the shard holds. The parts that it is put together from are given up, to save memory."""
        texts = [read.text.encode() for read in self.texts]
        tensors = {
            "texts": torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8),
            "texts.ends": torch.tensor([len(text) for text in texts]).cumsum(0),
            "tokens": torch.cat([read.tokens for read in self.texts]),
            "tokens.ends": torch.tensor([len(read.tokens) for read in self.texts]).cumsum(0),
        }
        batches = [dict(rows) for rows in self._rows if len(rows["row.text"])]
        self._rows = []
        for name in list(batches[0]) if batches else ():
            tensors[name] = torch.cat([rows.pop(name) for rows in batches])
        return tensors


class Writer:
    """A folder that a collection is written to: new, empty, or with the beginning of this very collection in it.

    Raises ValueError if it holds another collection or other files.
    """

    def __init__(self, out: str | Path, description: Mapping[str, Any], model_name: str) -> None:
        self.folder = Path(out)
        self._index = {"kind": KIND, "model": model_name, **description, "complete": False, "shards": []}
        self._index |= {"versions": versions()}
        if self.folder.is_file():
            raise ValueError(f"out={str(out)!r} is a file: name a folder")
        if (self.folder / INDEX).is_file():
            there = read_index(self.folder)
            differ = [key for key, value in description.items() if there.get(key) != json.loads(json.dumps(value))]
            if differ:
                sides = "; ".join(f"{key} is {there.get(key)!r} there and {description[key]!r} here" for key in differ)
                raise ValueError(f"out={str(out)!r} holds another collection: {sides}. Name a new folder, or remove it")
            self._index = there
        elif self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"out={str(out)!r} holds other files and no collection: name a new or empty folder")

    @property
    def n_texts(self) -> int:
        """Texts in finished shards."""
        return sum(shard["texts"] for shard in self._index["shards"])

    def skip_written(self, stream: Iterator[Read]) -> Iterator[Mapping[str, Any]]:
        """Take from the stream the texts of each finished shard, and yield what the index says of it.

        Raises ValueError if they are not those that were written.
        """
        for shard in self._index["shards"]:
            texts = list(islice(stream, shard["texts"]))
            if _digest(texts) != shard["digest"]:
                last = shard["first_text"] + shard["texts"] - 1
                raise ValueError(
                    f"{self.folder} holds another collection: its texts {shard['first_text']} to {last} are not those "
                    "given now. Name a new folder, or remove it"
                )
            yield shard

    def write(self, part: Part) -> None:
        """Write a shard, and then the index that lists it. A part without texts is left out.

        Raises ValueError if it cannot be written; the shards before it stay.
        """
        if not part.texts:
            return
        shards = self._index["shards"]
        path = self.folder / f"shard-{len(shards):05d}.safetensors"
        first, size = self.n_texts, {"rows": part.n_rows, "texts": len(part.texts), "digest": _digest(part.texts)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as beside:
                save_file(part.tensors(), beside, {"kind": KIND})
            shard = {"file": path.name, "first_text": first, "bytes": path.stat().st_size, **size}
            self._write_index(complete=False, shards=[*shards, shard])
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{error}. {len(shards)} shards with {first} texts are finished in {self.folder}: the same call goes "
                "on after them"
            ) from error

    def finish(self) -> None:
        """Say in the index that there are no more texts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._index["complete"]:
            self._write_index(complete=True)

    def _write_index(self, **changes: Any) -> None:
        changed = self._index | changes
        with written_whole(self.folder / INDEX) as beside:
            beside.write_text(json.dumps(changed, indent=1) + "\n", encoding="utf-8")
        self._index = changed


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder. Raises ValueError if there is none, if it is damaged, and if a shard is not as it says."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} holds no {INDEX}, so it is no dataset of activations")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["kind"] != KIND:
            raise ValueError(f"it is of the kind {index['kind']!r}")
        sizes = {shard["file"]: shard["bytes"] for shard in index["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the index of a dataset of activations: {error}") from error
    for name, size in sizes.items():
        file = folder / name
        if file.name != name or not file.is_file():
            raise ValueError(f"the shard {name} of {folder} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"the shard {file} is damaged: it has {file.stat().st_size} bytes, not {size}")
    return index


def _digest(texts: Sequence[Read]) -> str:
    digest = hashlib.sha256()
    for read in texts:
        written = read.text.encode()
        digest.update(f"{len(written)} {len(read.tokens)} ".encode())
        digest.update(written)
        digest.update(read.tokens.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]
