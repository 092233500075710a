"""The hook point of a state trajectory, and its positions one by one for nnsight traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssminterp.models.hook_points import HookPoint, HookSpec
from ssminterp.models.tracing.requests import for_a_reader, is_requested, pass_by
from ssminterp.positions import Positions


class StateHookPoint(HookPoint):
    """The hook point of a state trajectory. Its functions run inside the scan, so calling it only shows the states.

    at: the state at single positions, where nnsight traces read and change it inside the scan.
    watchers: functions `(hook, scan, y) -> y` that are called after each scan, with what it took in and what it gave.
        They listen to no state, so that whatever rides in the scan's kernel goes on doing so.
    shown: the positions of the trajectory that is shown to traces; None means all.
    """

    # What a trace asks for at single positions comes up in the course of a run.
    always_follows = True

    def __init__(self, spec: HookSpec, layer: int | None) -> None:
        super().__init__(spec, layer)
        self.at = StatePositions()
        self.shown: Positions | None = None
        self.watchers: list[Callable[[StateHookPoint, Any, Tensor], Tensor]] = []

    @property
    def is_traced(self) -> bool:
        """Whether an nnsight trace that runs now waits for the trajectory or for the state at some position."""
        return (not self.is_idle and is_requested(self, by_name=True)) or self.at.is_requested

    @property
    def is_listened_to(self) -> bool:
        return (not self.is_idle and self.has_listeners()) or self.at.is_requested

    def __call__(self, tensor: Tensor) -> Tensor:
        # What is shown must not be changed, so it need not be a copy; whoever shows it checks.
        return nn.Module.__call__(self, tensor)

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor


class StatePosition(nn.Module):
    """The state of one layer after the update at one position, [batch, d_inner, d_state]: an identity that is called
    inside the scan, which goes on from what it gives back."""

    def forward(self, state: Float[Tensor, "batch d_inner d_state"]) -> Float[Tensor, "batch d_inner d_state"]:
        return state


class StatePositions(nn.Module):
    """The state at single positions: `at["5"]`, `at["-1"]`. They are made when they are first asked for.

    changed: the positions at which traces changed the state in the last scan.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, StatePosition] = {}
        self.changed: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        # nnsight's envoys ask for the entries of a module by name.
        if not name.removeprefix("-").isdecimal():
            return super().__getattr__(name)
        return self.made.setdefault(int(name), StatePosition())

    def __len__(self) -> int:
        """0: no position is there before a run, so an index from the end stays what it is."""
        return 0

    @property
    def is_requested(self) -> bool:
        """Whether an nnsight trace that runs now waits for the state at some position."""
        return bool(self.made) and any(is_requested(position) for position in self.made.values())


class PositionsOfOneScan:
    """The positions that traces may wait for, in the course of one scan over `length` positions from `begin` on.

    What is asked for by a position from the end means the end of each scan; other positions are those of the whole
    text, of which the scan may be a part.

    cuts: the edits at the positions where the scan was cut, which have the same effect on it in one piece.
    """

    def __init__(self, at: StatePositions | None, length: int, begin: int = 0) -> None:
        self.made = {} if at is None else at.made
        self.changed: set[int] = set() if at is None else at.changed
        self.changed.clear()
        self.length = length
        self.begin = begin
        self.passed: set[int] = set()
        self.cuts: dict[int, tuple[Tensor | float, Tensor | float]] = {}

    def next(self) -> int | None:
        """The first position to come, in the scan, that a trace waits for now."""
        waited_for = [
            self._local(p) for p, module in self.made.items() if p not in self.passed and is_requested(module)
        ]
        to_come = [p for p in waited_for if 0 <= p < self.length]
        return min(to_come) if to_come else None

    def show(self, p: int, state: Float[Tensor, "batch d_inner d_state"]) -> Float[Tensor, "batch d_inner d_state"]:
        """The state at position p of the scan as traces leave it."""
        self.pass_by(p)
        for written in (self.begin + p, p - self.length):
            if written in self.made and is_requested(self.made[written]):
                self.passed.add(written)
                before = for_a_reader(state)
                version = None if before.is_inference() else before._version
                state = self.made[written](before)
                if version is None or state is not before or before._version != version:
                    self.changed.add(self.begin + p)
        self.pass_by(p + 1)
        return state

    def pass_by(self, stop: int) -> None:
        """Count the positions of the scan before `stop` as visited; at its end, also from-the-end ones it is too short
        for."""
        for p, position in list(self.made.items()):
            local = self._local(p)
            reached = 0 <= local < stop or (p < 0 and local < 0 and stop >= self.length)
            if reached and p not in self.passed:
                self.passed.add(p)
                pass_by(position)

    def _local(self, p: int) -> int:
        return p + self.length if p < 0 else p - self.begin
