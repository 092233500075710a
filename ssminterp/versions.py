"""Which releases a result was made with."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers


@functools.cache
def _own_version() -> str:
    """Remembered, because to look it up takes a millisecond."""
    try:
        return version("ssminterp")
    except PackageNotFoundError:
        return "source tree, not installed"


def versions() -> dict[str, str]:
    """Of torch, transformers and ssminterp; the latter says so if it runs from a source tree that is not installed."""
    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "ssminterp": _own_version()}
