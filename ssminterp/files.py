"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which is renamed once it is written; if anything goes wrong, it is removed.

    Raises ValueError if the file cannot be written, and says so where the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        # safetensors lets nobody but the owner read what it writes, whatever the user's umask says.
        beside.chmod(mode)
        beside.replace(path)
    except (SafetensorError, OSError) as error:
        beside.unlink(missing_ok=True)
        # safetensors puts the system's error into its message.
        is_full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        why = "the disk is full" if is_full else str(error)
        raise ValueError(f"{path} cannot be written: {why}") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
