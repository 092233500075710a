"""Which part of a hook's features a cell changes: all of it, groups of channels, single state coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from ssminterp.interventions.selection import index_mask
from ssminterp.models.config import ModelConfig
from ssminterp.models.hook_points import HookSpec

# {label: indices}, or "each": every one by itself
Groups: TypeAlias = Mapping[str, Sequence[int] | Tensor | int] | Literal["each"]

CHANNEL_AXES = ("d_model", "d_inner")


@dataclass(frozen=True, eq=False)
class Selection:
    """A group of channels and a group of state coordinates; None means all of them."""

    channels: Bool[Tensor, " channels"] | None = None
    states: Bool[Tensor, " d_state"] | None = None

    @property
    def is_everything(self) -> bool:
        return self.channels is None and self.states is None

    def mask(self, spec: HookSpec, device: torch.device) -> Bool[Tensor, "*features"]:
        """True where the hook's features are changed; broadcastable to them."""
        axes = spec.axes[2:]
        mask = torch.ones((1,) * len(axes), dtype=torch.bool)
        for i, axis in enumerate(axes):
            chosen = self.channels if axis in CHANNEL_AXES else self.states if axis == "d_state" else None
            if chosen is not None:
                mask = mask & chosen.reshape((-1,) + (1,) * (len(axes) - 1 - i))
        return mask.to(device)


@dataclass(frozen=True, eq=False)
class SelectionGrid:
    """All selections of a sweep, channels outermost, and the labels of the axes they add."""

    selections: list[Selection]
    channels: list[str] | None
    states: list[str] | None


def selection_grid(
    specs: Sequence[HookSpec], cfg: ModelConfig, channels: Groups | None, states: Groups | None
) -> SelectionGrid:
    """The selections that `channels=` and `states=` mean for these hooks.

    Raises ValueError for empty groups, indices out of range, and hooks that do not have the axis.
    """
    by_channel = None if channels is None else _masks("channels", channels, _size(specs, cfg, "channels"))
    by_state = None if states is None else _masks("states", states, _size(specs, cfg, "states"))
    selections = [
        Selection(channel, state)
        for channel in (by_channel or {"": None}).values()
        for state in (by_state or {"": None}).values()
    ]
    return SelectionGrid(
        selections, None if by_channel is None else list(by_channel), None if by_state is None else list(by_state)
    )


def _size(specs: Sequence[HookSpec], cfg: ModelConfig, argument: str) -> int:
    axes = CHANNEL_AXES if argument == "channels" else ("d_state",)
    found = {spec.short: [axis for axis in spec.axes[2:] if axis in axes] for spec in specs}
    without = [short for short, own in found.items() if not own]
    if without:
        raise ValueError(f"{argument}= needs hooks with an axis {' or '.join(axes)}, which {without} do not have")
    kinds = {own[0] for own in found.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{argument}= means different axes of these hooks ({', '.join(sorted(kinds))}): sweep them apart"
        )
    return cfg.axis_size(kinds.pop())


def _masks(argument: str, groups: Groups, size: int) -> dict[str, Bool[Tensor, " n"] | None]:
    if isinstance(groups, str) and groups == "each":
        return {str(i): row for i, row in enumerate(torch.eye(size, dtype=torch.bool))}
    if not isinstance(groups, Mapping):
        raise ValueError(f"{argument} must be 'each' or a mapping of labels to indices, got {groups!r}")
    if not groups:
        raise ValueError(f"{argument} is empty: name at least one group, or 'each'")
    return {str(label): index_mask(indices, size, f"{argument}[{label!r}]") for label, indices in groups.items()}
