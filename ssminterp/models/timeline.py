"""Positions of a text that several runs go through, part after part: the prompt and each new token, or chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ssminterp.positions import Positions, listed_positions

ApplyTo: TypeAlias = Literal["prompt", "new", "both"]
# Where a text of unknown length ends.
ENDLESS = 1 << 60


@dataclass(frozen=True)
class Timeline:
    """Absolute positions: 0 is the first token of the whole text, what a state has read before included.

    start: the first position that is run. prompt_end: one more than the last position of what is given; negative
    positions count from here. stop: one more than the last position that is run at all. Both are None if a text
    comes in parts and its length is not known. apply_to: where hook functions act.
    """

    start: int
    prompt_end: int | None
    stop: int | None
    apply_to: ApplyTo = "both"

    @property
    def acting(self) -> range:
        """The positions where hook functions act."""
        stop = ENDLESS if self.stop is None else self.stop
        prompt_end = stop if self.prompt_end is None else self.prompt_end
        return {
            "prompt": range(self.start, prompt_end),
            "new": range(prompt_end, stop),
            "both": range(self.start, stop),
        }[self.apply_to]

    def resolve(self, positions: Positions) -> Sequence[int]:
        """Absolute positions in the order given, of a slice those where hook functions act.

        Raises ValueError for positions where they do not act, with the reason, and for positions named twice.
        """
        if isinstance(positions, slice):
            return self._sliced(positions)
        resolved = [self._absolute(p, p) for p in listed_positions(positions)]
        if len(set(resolved)) < len(resolved):
            raise ValueError(f"positions={resolved} names a position twice")
        for p in resolved:
            self._check(p)
        return resolved

    def _absolute(self, p: int, written: object) -> int:
        if p >= 0:
            return p
        if self.prompt_end is None:
            raise ValueError(
                f"positions={written!r} counts from the end of a text that comes in parts: its length is not known yet"
            )
        return self.prompt_end + p

    def _sliced(self, positions: slice) -> range:
        first, last, step = positions.start, positions.stop, positions.step or 1
        if step < 1:
            raise ValueError(f"positions={positions!r} runs backwards: use a step of at least 1")
        acting = self.acting
        low = acting.start if first is None else self._absolute(first, positions)
        high = acting.stop if last is None else min(self._absolute(last, positions), acting.stop)
        if low < acting.start:
            low += -(-(acting.start - low) // step) * step
        chosen = range(low, high, step)
        if not chosen:
            raise ValueError(f"positions={positions!r} selects none of the positions {self._described()}")
        return chosen

    def _check(self, p: int) -> None:
        if p in self.acting:
            return
        if p < self.start:
            reason = "lies in what the state has read already: intervene while that is read"
        elif self.stop is not None and p >= self.stop:
            reason = "is never run (of the new tokens, the last one is not)"
        else:
            reason = f"is not where apply_to={self.apply_to!r} lets hooks act"
        raise ValueError(f"position {p} {reason}; hooks act at positions {self._described()}")

    def _described(self) -> str:
        acting = self.acting
        return f"{acting.start} to {'the end' if acting.stop == ENDLESS else acting.stop - 1}"


@dataclass(frozen=True)
class Window:
    """The part of a timeline that one run goes through: positions begin to end - 1."""

    timeline: Timeline
    begin: int
    end: int

    def local(self, positions: Positions) -> tuple[int, ...]:
        """Those of the positions that lie in this window, counted from its beginning."""
        if isinstance(positions, int) and positions >= 0:
            # An intervention on the state registers a function for each of its positions: at every step, all are asked.
            return (positions - self.begin,) if self.begin <= positions < self.end else ()
        return tuple(p - self.begin for _, p in self.columns(self.timeline.resolve(positions)))

    def columns(self, resolved: Sequence[int]) -> list[tuple[int, int]]:
        """(index in `resolved`, position) of those that lie in this window."""
        if isinstance(resolved, range):
            first, last = (-(-(edge - resolved.start) // resolved.step) for edge in (self.begin, self.end))
            indices = range(max(0, first), min(len(resolved), last))
            return [(i, resolved[i]) for i in indices]
        return [(i, p) for i, p in enumerate(resolved) if self.begin <= p < self.end]

    @property
    def has_acting(self) -> bool:
        """Whether hook functions act anywhere in it."""
        acting = self.timeline.acting
        return self.begin < acting.stop and self.end > acting.start
