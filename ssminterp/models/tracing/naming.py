"""The design's names for nnsight's paths, and its messages in them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def design_name(path: str) -> str:
    """What the design calls the module at an nnsight path: "blocks.3.mixer.hook_delta"."""
    inner = re.sub(r"^.*\bbackbone\.layers\b", "blocks", path)
    return re.sub(r"\.at\.(-?\d+)$", r".at[\1]", re.sub(r"^model\..*\b(hook_\w+)$", r"\1", inner))


def explained(message: str, names: Sequence[str]) -> str:
    """nnsight's message about a place that was never reached, in the design's names, with what to do instead."""
    found = re.match(r"'(.+)\.(output|input|skip)\.i(\w+)'", message)
    if found is None:
        return message
    name, visit = design_name(found[1]), found[3]
    layer = re.match(r"blocks\.(\d+)\.", name)
    order = [n.removeprefix(f"blocks.{layer[1]}.") for n in names if n.startswith(layer[0])] if layer else list(names)
    return (
        f"{name}.{found[2]} was asked for, but the run did not come to it any more"
        + (f" (visit {visit})" if visit not in ("0", "None") else "")
        + ". The code of a trace runs along with the model: ask in the order in which the model computes"
        + (f", within a layer {', '.join(order)}, states" if layer else ", from hook_embed to hook_logits, states")
        + " by ascending position. For another order, ask in a second `with tracer.invoke():` block"
    )
