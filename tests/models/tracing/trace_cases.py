"""Models, tokens and ways in for the tests of traces."""

from collections.abc import Callable
from typing import Any

from nnsight import NNsight
from tiny_models import random_tokens

from ssminterp import HookedMamba

TOKENS = random_tokens(2, 7)

# Both ways to nnsight: the model's own traces, and a model handed to nnsight as any other module.
ROOTS: dict[str, Callable[[HookedMamba], Any]] = {"model.trace": lambda model: model, "NNsight": NNsight}


def hook(root: Any, name: str) -> Any:
    """The envoy of a hook in the code of a trace: `root.blocks[3].mixer.hook_delta` for its name."""
    for part in name.split("."):
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
