"""Following a model through the parts of a text: every hook point learns which positions it is about to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssminterp.models.hook_points import HookPoint, Recorder
from ssminterp.models.timeline import Timeline, Window
from ssminterp.positions import Positions


class Recording:
    """What hooks saw in run after run, put together along the position axis.

    positions: which to record, absolute; None means all.
    """

    def __init__(
        self,
        hooks: Sequence[HookPoint],
        timeline: Timeline,
        positions: Positions | None = None,
        offload: torch.device | str | None = None,
    ) -> None:
        self.hooks = list(hooks)
        everywhere = Timeline(timeline.start, timeline.prompt_end, timeline.stop)
        self.wanted = None if positions is None else everywhere.resolve(positions)
        self.offload = offload
        self.parts: dict[str, list[Tensor]] = {hook.name: [] for hook in self.hooks}
        self.seen: list[int] = []
        self._recorder: Recorder | None = None

    def begin(self, window: Window) -> None:
        """Listen to the run of a window."""
        here = range(window.begin, window.end)
        wanted = list(here) if self.wanted is None else sorted(p for _, p in window.columns(self.wanted))
        if not wanted:
            return
        local = None if len(wanted) == len(here) else [p - window.begin for p in wanted]
        self._recorder = Recorder({}, local, self.offload)
        for hook in self.hooks:
            hook.recorders.append(self._recorder)
        self.seen += wanted

    def end(self) -> None:
        """Take over what was heard."""
        if self._recorder is None:
            return
        self.stop()
        for name, parts in self.parts.items():
            parts.append(self._recorder.store[name])
        self._recorder = None

    def stop(self) -> None:
        """Listen no more."""
        for hook in self.hooks:
            hook.recorders = [kept for kept in hook.recorders if kept is not self._recorder]

    def activations(self) -> tuple[dict[str, Tensor], list[int] | None]:
        """The recordings [batch, pos, …] by name, and their positions in the order asked for; None for all."""
        joined = {name: torch.cat(parts, dim=1) for name, parts in self.parts.items() if parts}
        if self.wanted is None:
            return joined, None
        row_of = {p: row for row, p in enumerate(self.seen)}
        order = [p for p in self.wanted if p in row_of]
        if order == self.seen:
            return joined, order
        return {name: tensor[:, [row_of[p] for p in order]] for name, tensor in joined.items()}, order


@contextmanager
def following(
    lm: nn.Module,
    points: Sequence[HookPoint],
    timeline: Timeline,
    recording: Recording | None = None,
    anew: bool = False,
) -> Iterator[None]:
    """A context in which each run of `lm` goes on where the last one ended, and the functions at `points` act only at
    the positions they name.

    anew: every run begins at the start again, as `generate(use_cache=False)` does.

    Raises ValueError, before any run, for functions whose positions are not run, or where they do not act.
    """
    points = [point for point in points if point.functions or point.always_follows]
    for point in points:
        check_positions(point, timeline)
    reached = timeline.start

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal reached
        tokens = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        begin = timeline.start if anew else reached
        reached = begin + tokens.shape[1]
        window = Window(timeline, begin, reached)
        for point in points:
            point.window = window
        if recording is not None:
            recording.begin(window)

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if recording is not None:
            recording.end()

    handles = [lm.register_forward_pre_hook(before, with_kwargs=True, prepend=True), lm.register_forward_hook(after)]
    outside = [point.window for point in points]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for point, window in zip(points, outside, strict=True):
            point.window = window
        if recording is not None:
            recording.stop()
    _check_reached(points, timeline, reached)


def check_positions(point: HookPoint, timeline: Timeline) -> None:
    """Raises ValueError if a function at a hook point cannot act on a timeline where it is meant to."""
    acting = timeline.acting
    for registered in point.functions:
        function: Any = registered.function
        if registered.positions is not None:
            timeline.resolve(registered.positions)
        elif hasattr(function, "within"):
            function.within(Window(timeline, acting.start, acting.start))
        if not acting:
            raise ValueError(
                f"apply_to={timeline.apply_to!r} cannot take effect: no position is run there (the last new token is "
                "chosen, but never run)"
            )


def _check_reached(points: Sequence[HookPoint], timeline: Timeline, reached: int) -> None:
    """Raises ValueError if a text whose length was not known ended before a position that a function names."""
    if timeline.stop is None:
        known = Timeline(timeline.start, reached, reached)
        for point in points:
            check_positions(point, known)
