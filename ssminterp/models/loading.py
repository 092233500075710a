"""Loading checkpoints: bundled names, local folders, hub names; transformers', mamba_ssm's and PEFT's formats."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ssminterp.models import original_format
from ssminterp.models.adapters import ADAPTER_CONFIG, base_of, with_adapter
from ssminterp.models.hub import check_is_checkpoint, checkpoint_files
from ssminterp.models.mixers import MIXERS
from ssminterp.models.verify import TOLERANCE
from ssminterp.models.weight_files import check_weight_files

TokenizerLike = PreTrainedTokenizerBase | str | Path


def load_hf(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    tokenizer: TokenizerLike | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The plain Hugging Face model in eval mode (below a `PeftModel` for an adapter), and its tokenizer if it has one.

    Every weight goes from its file straight to its device: no second copy of the model is in memory at any time.

    Raises ValueError if the checkpoint is missing, damaged, incomplete, or no supported architecture, and for options
    that do not go together.
    """
    _check_dtype(dtype)
    placement = _placement(device, device_map, max_memory, offload_folder)
    folder = checkpoint_files(name, revision, trust_remote_code=trust_remote_code)
    check_is_checkpoint(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        with _named_errors(name):
            base, base_revision = base_of(folder)
        base_model, base_tokenizer = load_hf(
            base,
            revision=base_revision,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            **placement,
        )
        assert isinstance(base_model, PreTrainedModel), "an adapter of an adapter is refused by its base's config"
        with _named_errors(name):
            hf_model = with_adapter(base_model, folder)
        own_tokenizer = _tokenizer(tokenizer, folder, None, trust_remote_code)
        return hf_model.eval(), own_tokenizer or base_tokenizer
    config, is_original = _read_config(name, folder, trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **placement}
    if is_original:
        options["key_mapping"] = original_format.RENAMED
    loaded = _load_weights(name, folder, config, options)
    usual = original_format.TOKENIZER if is_original else None
    return loaded.eval(), _tokenizer(tokenizer, folder, usual, trust_remote_code)


def _check_dtype(dtype: torch.dtype | str) -> None:
    known = ["auto", *(str(known).removeprefix("torch.") for known in TOLERANCE)]
    if dtype not in TOLERANCE and dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")


def _placement(
    device: torch.device | str | None,
    device_map: str | Mapping[str, Any] | None,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: str | Path | None,
) -> dict[str, Any]:
    """transformers' options for where the weights go. Raises ValueError for a device that is not there."""
    if device_map is not None:
        if device is not None:
            raise ValueError(f"pass device={str(device)!r} or device_map={device_map!r}, not both")
        placed = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in placed.items() if value}
    if max_memory is not None or offload_folder is not None:
        raise ValueError('max_memory= and offload_folder= take effect with device_map= only: pass device_map="auto"')
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} is not to be had: {str(error).splitlines()[0]}") from error
    return {"device_map": {"": target}}


def _read_config(name: str | Path, folder: Path, trust_remote_code: bool) -> tuple[PreTrainedConfig, bool]:
    """The config, in transformers' words, and whether the format is mamba_ssm's.

    Raises ValueError, with the architectures that are known, if it is of none of them.
    """
    path = folder / "config.json"
    with _named_errors(name, f"Supported are {', '.join(MIXERS)}."):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"{path} holds no object but {entries!r}")
        if original_format.is_original(entries):
            return original_format.to_transformers_config(entries), True
        if "model_type" not in entries:
            raise ValueError(f"{path} names no model_type, and has not the entries of mamba_ssm's format")
    # Before transformers reads it, which knows other architectures than these, and does not know them all.
    architecture = (entries.get("architectures") or [f"{entries['model_type']} (no architecture named)"])[0]
    if architecture not in MIXERS:
        raise ValueError(f"{str(name)!r} is a {architecture}; supported are {', '.join(MIXERS)}")
    with _named_errors(name):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), False


def _load_weights(name: str | Path, folder: Path, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    # Weights of the wrong shape are reported by `_check_complete`, which names them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _named_errors(name):
        check_weight_files(folder)
        try:
            hf_model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
        except NotImplementedError:
            # transformers compares tied weights that are both in the file, and fails if neither had the right shape.
            untied = copy.deepcopy(config)
            untied.tie_word_embeddings = False
            _check_complete(AutoModelForCausalLM.from_pretrained(folder, config=untied, **options)[1], name)
            raise
    _check_complete(info, name)
    # What the caller named, and not the folder of the cache, is what an adapter trained on this model should refer to.
    hf_model.name_or_path = hf_model.config.name_or_path = str(name)
    return hf_model


def _check_complete(info: Any, name: str | Path) -> None:
    """Raises ValueError for weights that are missing, of the wrong shape, or of layers that the config lacks."""
    problems = {
        "missing": info["missing_keys"],
        "of the wrong shape": info["mismatched_keys"],
        "unexpected": [key for key in info["unexpected_keys"] if ".layers." in key],
    }
    found = [f"{problem} {sorted(map(str, keys))[:5]}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(f"the weights of {str(name)!r} do not fit its config: {'; '.join(found)}")


@contextmanager
def _named_errors(name: str | Path, advice: str = "") -> Iterator[None]:
    """Whatever goes wrong while transformers reads a damaged or unknown checkpoint is a ValueError with its name."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"cannot load {str(name)!r}: its .bin file is damaged, or holds Python objects that are no plain weights, "
            "and reading those could run code. Convert it to safetensors where you trust it. "
            f"(torch.load says: {str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"cannot load {str(name)!r}: {kind}{error} {advice}".rstrip()) from error


def _tokenizer(
    given: TokenizerLike | None, folder: Path, usual: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, else the checkpoint's own, else the one that its format is usually used with."""
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None:
        return _read_tokenizer(checkpoint_files(given), trust_remote_code)
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return _read_tokenizer(folder, trust_remote_code)
    if usual is None:
        return None
    try:
        return _read_tokenizer(checkpoint_files(usual), trust_remote_code=False)
    except ValueError as error:
        warnings.warn(
            f"{folder} holds no tokenizer, and {usual}, which this format is used with, cannot be loaded: {error} "
            "The model takes tokens only, until from_pretrained is given tokenizer=.",
            stacklevel=4,
        )
        return None


def _read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with _named_errors(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
