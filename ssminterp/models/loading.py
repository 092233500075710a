"""Loading checkpoints: bundled names, local folders, hub names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ssminterp.checkpoints import BUNDLED, checkpoint_folder
from ssminterp.models.mixers import MIXERS


def load_hf(
    name: str | Path,
    *,
    revision: str | None,
    device: torch.device | str | None,
    device_map: str | dict[str, Any] | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The plain Hugging Face model in eval mode and its tokenizer, if the checkpoint has one.

    Raises ValueError if the checkpoint is missing, damaged, incomplete, or no supported architecture.
    """
    source = checkpoint_source(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    with _named_errors(name):
        config = AutoConfig.from_pretrained(source, **options)
    _check_architecture(config, name)
    if device_map is not None:
        options["device_map"] = device_map
    with _named_errors(name):
        # Weights of the wrong shape are reported by `_check_complete`, which names them.
        hf_model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_complete(info, name)
    if device_map is None:
        hf_model = hf_model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return hf_model.eval(), _load_tokenizer(source, revision, trust_remote_code)


def checkpoint_source(name: str | Path) -> str:
    """A bundled folder, an existing local folder, or the hub name itself.

    Raises ValueError for a path where there is no checkpoint.
    """
    if str(name) in BUNDLED:
        return str(checkpoint_folder(str(name)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {folder} holds no config.json, so it is no checkpoint")
        return str(folder)
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {folder}")
    return name


def _check_architecture(config: Any, name: str | Path) -> None:
    architectures = config.architectures or [f"{config.model_type} (no architecture named)"]
    if architectures[0] not in MIXERS:
        raise ValueError(f"{str(name)!r} is a {architectures[0]}; supported are {', '.join(MIXERS)}")


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
def _named_errors(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong while transformers reads a damaged or unknown checkpoint is a ValueError with its name."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"cannot load {str(name)!r}: {type(error).__name__}: {error}. Bundled are: {', '.join(BUNDLED)}"
        ) from error


def _load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    files = ("tokenizer.json", "tokenizer_config.json")
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in files):
        return None
    options = {} if revision is None else {"revision": revision}
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
