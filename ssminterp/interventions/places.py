"""Source and target positions, as masks, and whether a source can reach a target at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from ssminterp.interventions.selection import Roles, Selection
from ssminterp.models import HookPoint
from ssminterp.positions import Positions, listed_positions

# Positions, a role's name, or the names of several roles.
Where: TypeAlias = Positions | str | Sequence[str]
Mask: TypeAlias = Bool[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class Places:
    """Positions as `knockout` takes them: one selection of positions, or one for each of several roles."""

    parts: tuple[Selection, ...]

    @classmethod
    def of(cls, given: Where | None) -> Places | None:
        """Raises ValueError for what are no positions."""
        if given is None:
            return None
        if not isinstance(given, str | int | slice | Tensor) and any(isinstance(one, str) for one in given):
            return cls(tuple(Selection(positions=str(name)) for name in given))
        return cls((Selection.of(given, None, None, None),))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        shown = [repr(part).removeprefix(", positions=") for part in self.parts]
        return shown[0] if len(shown) == 1 else f"[{', '.join(shown)}]"

    def at_roles(self, roles: Roles | None) -> Places:
        """The same with positions for roles, on the CPU. Raises ValueError if there is no such role."""
        return Places(tuple(_on_cpu(part.at_roles(roles)) for part in self.parts))

    def last(self) -> int | None:
        """The last position of any example, if they mean the same in sequences of every length, else None."""
        listed: list[int] = []
        for part in self.parts:
            if isinstance(part.positions, slice | str) or part.positions is None:
                return None
            positions = part.positions.flatten() if isinstance(part.positions, Tensor) else part.positions
            listed += listed_positions(positions)
        return max(listed) if min(listed) >= 0 else None

    def n_examples(self) -> int:
        """How many examples they tell apart: 1 if none."""
        return max((len(p.positions) for p in self.parts if isinstance(p.positions, Tensor)), default=1)

    def counted_from(self, start: int) -> Places:
        """The same places where counting begins at position `start`; negative ones count from the end as before.

        Raises ValueError for positions before it.
        """
        return Places(tuple(replace(part, positions=_counted_from(part.positions, start)) for part in self.parts))

    def mask(self, like: Tensor, point: HookPoint) -> Mask:
        """Where they are in a tensor [batch, pos, …] on the CPU. Raises ValueError if they do not fit it."""
        mask = torch.zeros(like.shape[:2], dtype=torch.bool)
        for part in self.parts:
            mask[part.index(like, point)] = True
        return mask


def causal_masks(
    sources: Places | None, targets: Places | None, batch: int, length: int, point: HookPoint
) -> tuple[Mask, Mask]:
    """Sources (None: all) and targets (None: all after the last source) of each example, on the CPU.

    Raises ValueError for positions that do not fit, a source after every target of its example, and a target before
    every source.
    """
    like, everywhere = torch.empty(batch, length), torch.ones(batch, length, dtype=torch.bool)
    position = torch.arange(length)
    of_sources = everywhere if sources is None else sources.mask(like, point)
    if targets is not None:
        of_targets = targets.mask(like, point)
    else:
        of_targets = everywhere if sources is None else position > _last(of_sources)
        if not of_targets.any(1).all():
            raise ValueError(f"sources={sources!r}: there is no position after the last source that could be a target")
    first, last = of_sources.int().argmax(1, keepdim=True), _last(of_targets)
    if sources is not None and (late := (of_sources & (position > last)).nonzero()).numel():
        example, at = late[0].tolist()
        end = int(last[example])
        raise ValueError(f"source {at} of example {example} lies after every target; the last target is {end}")
    if targets is not None and (early := (of_targets & (position < first)).nonzero()).numel():
        example, at = early[0].tolist()
        start = int(first[example])
        raise ValueError(f"target {at} of example {example} lies before every source; the first source is {start}")
    return of_sources, of_targets


def check_beforehand(sources: Places | None, targets: Places | None, point: HookPoint) -> None:
    """Raises ValueError as `causal_masks` does, if this is plain whatever the length of the sequence."""
    given = [places for places in (sources, targets) if places is not None]
    last = [places.last() for places in given]
    known = [position for position in last if position is not None]
    if known and None not in last:
        # One position more, for targets after the last source.
        causal_masks(sources, targets, max(places.n_examples() for places in given), max(known) + 2, point)


def _on_cpu(part: Selection) -> Selection:
    """Positions are looked at one by one, which on another device would wait for it each time."""
    return replace(part, positions=part.positions.cpu()) if isinstance(part.positions, Tensor) else part


def _counted_from(
    positions: int | tuple[int, ...] | slice | Tensor | str | None, start: int
) -> int | tuple[int, ...] | slice | Tensor | str | None:
    def shifted(p: int) -> int:
        if 0 <= p < start:
            raise ValueError(f"position {p} lies in what the state has read already: what is run starts at {start}")
        return p - start if p >= 0 else p

    match positions:
        case int():
            return shifted(positions)
        case tuple():
            return tuple(map(shifted, positions))
        case slice():
            first, last = (p if p is None or p < 0 else max(p - start, 0) for p in (positions.start, positions.stop))
            return slice(first, last, positions.step)
        case Tensor():
            return torch.tensor([[shifted(int(p)) for p in row] for row in positions])
        case _:
            return positions


def _last(mask: Mask) -> Tensor:
    """The last position of each example that is chosen, [batch, 1]."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)
