"""Which releases a result was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
import transformers


def versions() -> dict[str, str]:
    """Of torch, transformers and ssminterp; the latter says so if it runs from a source tree that is not installed."""
    try:
        own = version("ssminterp")
    except PackageNotFoundError:
        own = "source tree, not installed"
    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "ssminterp": own}
