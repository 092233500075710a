"""Which checkpoints there are to load: bundled, in the local cache of the hub, and known by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ssminterp.checkpoints import BUNDLED, checkpoint_folder
from ssminterp.models.adapters import ADAPTER_CONFIG
from ssminterp.models.mixers import MIXERS
from ssminterp.models.original_format import is_original, to_transformers_config


@dataclass(frozen=True)
class Listed:
    """A checkpoint: where it is ("bundled", "cached", "hub"), its parameters, and its bytes on this machine.

    parameters: None for an adapter, whose size is that of its base. bytes: 0 for one that is only known by name.
    """

    name: str
    place: str
    parameters: int | None
    bytes: int


def mamba_config(hidden_size: int, num_hidden_layers: int, **others: Any) -> dict[str, Any]:
    """A config in transformers' words, with what all published Mamba-1 checkpoints have in common."""
    common = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 50280, "state_size": 16}
    return common | {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers} | others


# As in the published config.json of each.
SHAPES: dict[str, dict[str, Any]] = {
    "mamba-130m": mamba_config(768, 24),
    "mamba-370m": mamba_config(1024, 48),
    "mamba-790m": mamba_config(1536, 48),
    "mamba-1.4b": mamba_config(2048, 48),
    "mamba-2.8b": mamba_config(2560, 64),
    "falcon-mamba-7b": mamba_config(
        4096,
        64,
        architectures=["FalconMambaForCausalLM"],
        model_type="falcon_mamba",
        vocab_size=65024,
        time_step_rank=256,
        tie_word_embeddings=False,
    ),
}

# Names on the hub and their shapes. Any other checkpoint of these architectures loads as well.
KNOWN: dict[str, str] = {
    **{f"state-spaces/{shape}-hf": shape for shape in SHAPES if shape.startswith("mamba")},
    **{f"state-spaces/{shape}": shape for shape in SHAPES if shape.startswith("mamba")},
    "tiiuae/falcon-mamba-7b": "falcon-mamba-7b",
    "tiiuae/falcon-mamba-7b-instruct": "falcon-mamba-7b",
}


def available_models() -> list[Listed]:
    """The bundled models, those in the local cache, and those known by name that are neither."""
    bundled = [
        Listed(name, "bundled", count_parameters(_read(checkpoint_folder(name) / "config.json")), size)
        for name in BUNDLED
        for size in [sum(file.stat().st_size for file in checkpoint_folder(name).iterdir())]
    ]
    cached = _cached()
    there = {listed.name for listed in cached}
    known = [
        Listed(name, "hub", count_parameters(SHAPES[shape]), 0) for name, shape in KNOWN.items() if name not in there
    ]
    return [*bundled, *cached, *known]


def _cached() -> list[Listed]:
    """The repositories of the local cache that are Mambas, or adapters, which name their base alone."""
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(cache.repos, key=lambda repository: repository.repo_id):
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: revision.last_modified)
        config = _read(newest.snapshot_path / "config.json")
        is_adapter = bool(_read(newest.snapshot_path / ADAPTER_CONFIG))
        if is_adapter or _is_supported(config):
            parameters = None if is_adapter else count_parameters(config)
            found.append(Listed(repository.repo_id, "cached", parameters, repository.size_on_disk))
    return found


def _read(path: Path) -> dict[str, Any]:
    """A config, empty if there is none that can be read: a listing goes on past a damaged one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_supported(config: Mapping[str, Any]) -> bool:
    if is_original(config):
        return (config.get("ssm_cfg") or {}).get("layer", "Mamba1") == "Mamba1"
    return bool(set(config.get("architectures") or ()) & set(MIXERS))


def count_parameters(config: Mapping[str, Any]) -> int:
    """How many weights a Mamba or Falcon-Mamba of this config.json has, tied ones counted once."""
    if is_original(config):
        config = to_transformers_config(config).to_dict()
    d_model, layers, d_state = config["hidden_size"], config["num_hidden_layers"], config.get("state_size", 16)
    d_inner = config.get("intermediate_size") or int(config.get("expand", 2) * d_model)
    dt_rank = config.get("time_step_rank", "auto")
    dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
    projections = d_model * 2 * d_inner + d_inner * (dt_rank + 2 * d_state) + dt_rank * d_inner + d_inner * d_model
    # dt_proj's bias, A, D; the conv's taps; the block's norm
    mixer = projections + d_inner * (1 + d_state + 1) + d_inner * config.get("conv_kernel", 4)
    biases = d_inner * config.get("use_conv_bias", True) + (2 * d_inner + d_model) * config.get("use_bias", False)
    embeddings = config["vocab_size"] * d_model * (1 if config.get("tie_word_embeddings", True) else 2)
    return embeddings + layers * (mixer + biases + d_model) + d_model
