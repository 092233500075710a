"""The numbers of a sweep while it runs, and the folder that keeps finished parts of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssminterp.files import written_whole
from ssminterp.patching.moved import MovedEdit
from ssminterp.patching.request import Sweep

DESCRIPTION = "sweep.json"


class Results:
    """Every metric's values [cells, columns, batch], cells being numbered in [hook, layer, selection].

    folder: where finished parts are written; those that it holds already are taken over.

    Raises ValueError for a part that cannot be read.
    """

    def __init__(self, sweep: Sweep, metrics: Sequence[str], folder: Path | None = None) -> None:
        hooks, layers, columns, selections = sweep.grid
        n_cells = hooks * layers * selections
        self.values = {name: torch.full((n_cells, columns, sweep.batch), float("nan")) for name in metrics}
        self.done = torch.zeros(n_cells, columns, dtype=torch.bool)
        self.folder = folder
        self.failed: list[tuple[str, Exception]] = []
        self._n_parts = 0
        if folder is not None:
            self._load(folder)

    def put(
        self, cells: Sequence[int], columns: Sequence[int], values: Mapping[str, Float[Tensor, "cells columns batch"]]
    ) -> None:
        """Take over finished cells, and write them to the folder if there is one."""
        at = (torch.tensor(list(cells)), torch.tensor(list(columns)))
        self._take(*at, values)
        if self.folder is not None:
            path = self.folder / f"part-{self._n_parts:05d}.safetensors"
            tensors = {f"metric.{name}": value.contiguous() for name, value in values.items()}
            with written_whole(path) as beside:
                save_file(tensors | {"cells": at[0], "columns": at[1]}, beside)
            self._n_parts += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context for the work of one part. With a folder, an error in it is kept for later, and others can go on."""
        try:
            yield
        except Exception as error:
            if self.folder is None:
                raise
            self.failed.append((name, error))

    def check_complete(self) -> None:
        """Raises RuntimeError, from the first of them, if parts failed."""
        if self.failed:
            listed = "; ".join(f"{name}: {error}" for name, error in self.failed[:3])
            raise RuntimeError(
                f"{len(self.failed)} parts of the sweep failed ({listed}{' …' * (len(self.failed) > 3)}). All other "
                f"parts are in {self.folder}: the same call runs only those that failed again"
            ) from self.failed[0][1]

    def _load(self, folder: Path) -> None:
        for path in sorted(folder.glob("part-*.safetensors")):
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}. Remove it, and its cells are run again") from error
            values = {name: tensors[f"metric.{name}"] for name in self.values}
            self._take(tensors["cells"], tensors["columns"], values)
            self._n_parts = int(path.stem.split("-")[1]) + 1

    def _take(self, cells: Tensor, columns: Tensor, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name][cells[:, None], columns] = value
        self.done[cells[:, None], columns] = True


def open_folder(folder: str | Path, description: Mapping[str, object]) -> Path:
    """The folder of a sweep: a new or empty one, or one that holds parts of this very sweep.

    Raises ValueError if it holds another sweep or other files.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"out={str(path)!r} is a file: name a folder")
    written = path / DESCRIPTION
    if written.is_file():
        there = _read_description(written)
        differ = [key for key, value in description.items() if not _agree(there.get(key), value)]
        if differ:
            raise ValueError(
                f"out={str(path)!r} holds another sweep: {', '.join(differ)} differ. Name a new folder, or remove it"
            )
        return path
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"out={str(path)!r} holds other files and no sweep: name a new or empty folder")
    path.mkdir(parents=True, exist_ok=True)
    with written_whole(written) as beside:
        beside.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def describe(
    sweep: Sweep, direction: str, baselines: Mapping[str, Mapping[str, Float[Tensor, " batch"]]]
) -> dict[str, object]:
    """What makes a sweep this one and no other. The baselines stand for the weights and the metrics."""
    columns = [[column.label, column.positions.tolist()] for column in sweep.columns]
    selections = [
        [None if mask is None else mask.nonzero().flatten().tolist() for mask in (s.channels, s.states)]
        for s in sweep.selections
    ]
    return {
        "model": sweep.model.cfg.model_name,
        "dtype": str(sweep.model.cfg.dtype),
        "hooks": [spec.short for spec in sweep.specs],
        "layers": list(sweep.layers),
        "columns": _digest(columns),
        "selections": _digest(selections),
        "intervention": sweep.intervention_name,
        "intervention_values": sweep.intervention.digest() if isinstance(sweep.intervention, MovedEdit) else "",
        "direction": direction,
        "prompts": _digest([sweep.source.tolist(), sweep.base.tolist()]),
        "baselines": {
            name: {run: value.double().tolist() for run, value in runs.items()} for name, runs in baselines.items()
        },
    }


def _agree(there: object, here: object) -> bool:
    """Equality, where numbers may differ as much as two runs of one model do."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return there.keys() == here.keys() and all(_agree(there[key], here[key]) for key in here)
    if isinstance(there, list) and isinstance(here, list):
        return len(there) == len(here) and all(map(_agree, there, here))
    if isinstance(there, float) and isinstance(here, float):
        return math.isclose(there, here, rel_tol=1e-3, abs_tol=1e-3)
    return there == here


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _read_description(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
