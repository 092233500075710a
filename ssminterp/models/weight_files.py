"""Looking at a checkpoint's weight files before they are read: is one missing, is one cut off."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

# In the order in which transformers looks for them.
_FORMATS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_weight_files(folder: Path) -> None:
    """Raises ValueError, with the file's name, if there are no weights in a folder, or one of their files is missing or
    damaged. Reads the files' tables of contents only."""
    again = "fetch the checkpoint again, or copy it again from where it is whole"
    there = [folder / name for name in _FORMATS if (folder / name).is_file()]
    if not there:
        raise ValueError(f"{folder} holds no weights: neither of {', '.join(_FORMATS)}")
    files = _shards(there[0]) if there[0].suffix == ".json" else there[:1]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"of the {len(files)} files in {there[0].name}, {', '.join(missing)} is not there: {again}")
    for file in files:
        damage = _damage(file)
        if damage is not None:
            raise ValueError(f"{file.name} is damaged or was cut off at {file.stat().st_size:,} bytes{damage}: {again}")


def _shards(index: Path) -> list[Path]:
    """The files of an index. Raises ValueError if it is none."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of weight files: {type(error).__name__}: {error}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index.name} names files outside of its folder: {outside[:3]}")
    return [index.parent / name for name in names]


def _damage(file: Path) -> str | None:
    """What is wrong with a file, empty if nothing more is known than that it cannot be; None for a sound one."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f" ({error})"
    with file.open("rb") as opened:
        start = opened.read(2)
    # An archive's table of contents is at its end. What is no archive is a pickle of old, for torch.load to judge.
    return "" if not start or (start == b"PK" and not zipfile.is_zipfile(file)) else None
