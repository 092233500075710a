"""Where an intervention acts: positions, channels, state coordinates, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.timeline import Window
from ssminterp.positions import Positions, listed_positions, resolve_positions

Roles: TypeAlias = Mapping[str, Int[Tensor, " batch"]]
Indices: TypeAlias = int | Sequence[int] | slice
CHANNEL_AXES = ("d_inner", "d_model", "vocab")


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of a hook's tensor that an intervention changes; None means all of that axis.

    positions: one, several, a slice, a role's name, or an integer tensor [batch, n_positions], others per example.
    channels: indices on the d_inner, d_model or vocab axis. states: on the d_state axis. batch: examples.
    """

    positions: int | tuple[int, ...] | slice | Tensor | str | None = None
    channels: Indices | None = None
    states: Indices | None = None
    batch: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        positions: Positions | str | None,
        channels: Indices | None,
        states: Indices | None,
        batch: Sequence[int] | None,
    ) -> Selection:
        """From arguments as users write them. Raises ValueError for positions that are none, twice or no integers."""
        return cls(positions if isinstance(positions, str) else _normalised(positions), channels, states, batch)

    def __repr__(self) -> str:
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        return "".join(f", {name}={_short(value)}" for name, value in chosen.items())

    def leading_sizes(self) -> dict[str, int | None]:
        """The axes of a value before the features, with their sizes as far as the positions tell."""
        if isinstance(self.positions, int):
            return {"batch": None}
        if isinstance(self.positions, Tensor):
            return {"batch": self.positions.shape[0], "pos": self.positions.shape[1]}
        return {"batch": None, "pos": len(self.positions) if isinstance(self.positions, tuple) else None}

    def at_roles(self, roles: Roles | None) -> Selection:
        """The selection with a role's name replaced by its positions. Raises ValueError if there is no such role."""
        if not isinstance(self.positions, str):
            return self
        if roles is None or self.positions not in roles:
            known = "none were given: pass roles=batch.roles" if roles is None else f"roles are {', '.join(roles)}"
            raise ValueError(f"there is no role {self.positions!r}; {known}")
        return replace(self, positions=torch.as_tensor(roles[self.positions])[:, None])

    def index(
        self, tensor: Tensor, point: HookPoint
    ) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "#batch n_positions"]]:
        """What reaches the positions in a tensor [batch, pos, …]. Raises ValueError if they do not fit it."""
        batch, length = tensor.shape[:2]
        rows = torch.arange(batch, device=tensor.device)[:, None]
        if isinstance(self.positions, Tensor):
            if self.positions.shape[0] != batch:
                named = self.positions.shape[0]
                raise ValueError(f"positions name {named} examples, but {point.name} holds a batch of {batch}")
            columns = [list(resolve_positions(row, length) or ()) for row in self.positions]
        else:
            assert not isinstance(self.positions, str)
            columns = [list(resolve_positions(slice(None) if self.positions is None else self.positions, length) or ())]
        return rows, torch.tensor(columns, device=tensor.device)

    def within(self, window: Window, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The selected places that lie in a window of the text, as (example, number of the position in the order they
        are written, position counted from the window's beginning), each [places].

        Raises ValueError for positions that hooks cannot act at, and for a batch of another size.
        """
        assert not isinstance(self.positions, str)
        if isinstance(self.positions, Tensor):
            if self.positions.shape[0] != batch:
                named = self.positions.shape[0]
                raise ValueError(f"positions name {named} examples, but the run holds a batch of {batch}")
            resolved = torch.tensor([list(window.timeline.resolve(row)) for row in self.positions])
            rows, columns = ((resolved >= window.begin) & (resolved < window.end)).nonzero(as_tuple=True)
            return rows, columns, resolved[rows, columns] - window.begin
        if self.positions is None:
            # A value's positions are then those of the run's own text.
            here = [(p - window.timeline.start, p) for p in range(window.begin, window.end)]
        else:
            here = window.columns(window.timeline.resolve(self.positions))
        columns = torch.tensor([[i, p - window.begin] for i, p in here], dtype=torch.long).reshape(-1, 2)
        rows = torch.arange(batch).repeat_interleave(len(here))
        columns = columns.repeat(batch, 1)
        return rows, columns[:, 0], columns[:, 1]

    def feature_mask(self, point: HookPoint, model: HookedMamba) -> Bool[Tensor, "..."] | None:
        """Which features are chosen: broadcastable to the hook's axes after pos; None if all are.

        Raises ValueError if the hook has no such axis or an index is out of its range.
        """
        masks = []
        axes = point.spec.axes[2:]
        for chosen, label, candidates in (
            (self.channels, "channels", CHANNEL_AXES),
            (self.states, "states", ("d_state",)),
        ):
            if chosen is None:
                continue
            axis = next((axis for axis in axes if axis in candidates), None)
            if axis is None:
                raise ValueError(f"{point.name} has axes {' '.join(point.spec.axes)}: it has no {label} to choose from")
            after = len(axes) - 1 - axes.index(axis)
            mask = index_mask(chosen, model.cfg.axis_size(axis), f"{label} of {point.name}")
            masks.append(mask.reshape(-1, *(1,) * after))
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def batch_mask(self, batch: int) -> Bool[Tensor, " batch"] | None:
        """Which examples are chosen; None if all are. Raises ValueError if one is out of range."""
        return None if self.batch is None else index_mask(self.batch, batch, "batch")


def index_mask(indices: Indices | Tensor, size: int, what: str) -> Bool[Tensor, " size"]:
    """True at some indices of an axis, negative ones counted from the end.

    Raises ValueError, naming `what`, if one is out of range or none is left.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    if isinstance(indices, slice):
        mask[indices] = True
    else:
        wanted = torch.as_tensor(indices, dtype=torch.long).reshape(-1).tolist()
        outside = [i for i in wanted if not -size <= i < size]
        if outside:
            raise ValueError(f"{what}: {outside} are out of range, there are {size} (0 to {size - 1})")
        mask[wanted] = True
    if not mask.any():
        raise ValueError(f"{what}: {indices!r} selects nothing of {size}")
    return mask


def _normalised(positions: Positions | None) -> int | tuple[int, ...] | slice | Tensor | None:
    """One position, a tuple of several, a slice, or a tensor [batch, n_positions]."""
    if positions is None or isinstance(positions, slice):
        return positions
    if isinstance(positions, Tensor) and positions.dim() == 2:
        for row in positions:
            _check_distinct(listed_positions(row))
        return positions
    listed = listed_positions(positions)
    _check_distinct(listed)
    single = isinstance(positions, int) or (isinstance(positions, Tensor) and positions.dim() == 0)
    return listed[0] if single else tuple(listed)


def _check_distinct(listed: list[int]) -> None:
    if not listed:
        raise ValueError("positions is empty: name at least one, or leave it out for all")
    if len(set(listed)) < len(listed):
        raise ValueError(f"positions={listed} names a position twice")


def _short(value: object) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
