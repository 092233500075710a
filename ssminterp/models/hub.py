"""Where a checkpoint's files are: bundled, in a folder, in the local cache of the Hugging Face hub, or on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ssminterp.checkpoints import BUNDLED, checkpoint_folder
from ssminterp.models.adapters import ADAPTER_CONFIG
from ssminterp.models.catalogue import KNOWN

# Of a repository's files, those that make a checkpoint: not its other formats, nor the folders of a training run.
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors"]
_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]


def checkpoint_files(name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The folder that holds a checkpoint, fetched from the hub if it is not on this machine.

    name: a bundled model, a folder, or a hub name. revision: a branch, tag or commit of a hub name.

    Raises ValueError if there is no such checkpoint, if the hub cannot be reached, and for a revision of a folder.
    """
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"revision must be a branch, a tag or a commit as a string, got {revision!r}")
    local = _local_folder(name)
    if local is None:
        return _snapshot(str(name), revision, trust_remote_code)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for names on the hub, and {str(name)!r} is the folder {local}")
    return local


def check_local(name: str | Path) -> None:
    """Raises ValueError for a path where there is no checkpoint; a hub name is not looked up."""
    folder = _local_folder(name)
    if folder is not None:
        check_is_checkpoint(folder)


def check_is_checkpoint(folder: Path) -> None:
    """Raises ValueError for a folder that says nothing of a model."""
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(f"the folder {folder} holds no config.json (nor an {ADAPTER_CONFIG}), so it is no checkpoint")


def _local_folder(name: str | Path) -> Path | None:
    """A bundled folder or an existing one; None for what can only be a hub name."""
    if str(name) in BUNDLED:
        return checkpoint_folder(str(name))
    if not str(name):
        raise ValueError("the name of the checkpoint is empty")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder of the checkpoint")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {folder}")
    return None


def _snapshot(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    code = ["*.py"] if trust_remote_code else []
    what = name if revision is None else f"{name} at revision {revision!r}"

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )

    try:
        folder = fetch(_TEXT_FILES + _SAFETENSORS + code)
        if not any(folder.glob("*.safetensors")):
            fetch(_PICKLES)
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no model {name!r} that this account may read (`hf auth login`, for a private or gated one). "
            f"{_nearest(name)}"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no folder and cannot be a hub name: {error}. {_nearest(name)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise ValueError(
            f"{what} is not in the local cache ({constants.HF_HUB_CACHE}), and {why}. {_nearest(name)} To work "
            f"offline, run `hf download {name}` where there is a network, bring its folder here and pass the folder "
            "(or the cache, with HF_HUB_OFFLINE=1)."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"cannot fetch {what} from the hub: {type(error).__name__}: {error}") from error
    return folder


def _nearest(name: str) -> str:
    """The names that need no guessing: the bundled ones, and the known ones most like `name` if it is not known."""
    bundled = f"Bundled are: {', '.join(BUNDLED)}"
    if name in KNOWN:
        return f"{bundled}."
    alike = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.0)
    return f"{bundled}; known on the hub, and most like this name: {', '.join(alike)}."
