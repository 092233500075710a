"""Safetensors files of states: whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssminterp.files import written_whole
from ssminterp.versions import versions

# What the metadata must hold, as JSON.
KEYS = {"n_tokens": int, "model_name": str, "fingerprint": str, "history": list}
KIND = "ssminterp.ModelState"


def write_state_file(path: str | Path, tensors: Mapping[str, Tensor], described: Mapping[str, object]) -> None:
    """Write a file beside `path` and rename it, replacing one that is there.

    Raises ValueError if it cannot be written; nothing is left behind then.
    """
    path = Path(path)
    metadata = {"kind": KIND} | {key: json.dumps(value) for key, value in described.items()}
    metadata |= versions()
    with written_whole(path) as beside:
        save_file({name: _own_storage(tensor) for name, tensor in tensors.items()}, beside, metadata)


def read_state_file(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and their description. Raises ValueError if the file is missing, truncated or no state."""
    described = read_description(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in ("conv", "ssm")}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a state: {error}") from error
    conv, ssm = tensors["conv"], tensors["ssm"]
    if conv.dim() != 4 or ssm.dim() != 4 or conv.shape[:3] != ssm.shape[:3]:
        raise ValueError(
            f"{path} is no state: its conv windows are {list(conv.shape)} and its SSM states {list(ssm.shape)}, "
            "where [n_layers, batch, d_inner, d_conv] and [n_layers, batch, d_inner, d_state] are needed"
        )
    return tensors, described


def read_description(path: str | Path) -> dict[str, Any]:
    """What the file says of its state, and the shapes, without reading the tensors.

    Raises ValueError as `read_state_file` does.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, or open it as a CartridgeLibrary")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{path} is a safetensors file, but not one that ModelState.save wrote")
            shape = file.get_slice("ssm").get_shape()
            described = {key: json.loads(metadata[key]) for key in KEYS}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a state: {error}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is a state whose description is damaged: {error}") from error
    wrong = [key for key, kind in KEYS.items() if not isinstance(described[key], kind)]
    if wrong:
        raise ValueError(f"{path} is a state whose description is damaged: {', '.join(wrong)}")
    return described | {"n_layers": shape[0], "batch": shape[1]}


def _own_storage(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()
