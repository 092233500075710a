"""Running a scan with hooks on its hidden state, so that a changed state is what later positions start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.models.hook_points import HookFunction, HookPoint
from ssminterp.models.mixers.state_hook import PositionsOfOneScan, StateHookPoint
from ssminterp.positions import resolve_positions
from ssminterp.shapes import broadcasts
from ssminterp_kernels.selective_scan import ScanOutput, StateEdits

States: TypeAlias = Literal["all"] | tuple[int, ...] | None


# A scan over positions start to stop of one layer's inputs: (start, stop, initial_state, states, edits) -> output
Scan: TypeAlias = Callable[[int, int, Tensor | None, States, StateEdits | None], ScanOutput]


# What a function does of an intervention that has a function for each of its positions: (the intervention, by an object
# of its own, and an example; None for all). No two functions that do the same of it may meet at a position.
InterventionParts: TypeAlias = frozenset[tuple[int, int | None]]


class AffineStateHook:
    """A hook function on the state that is affine: `h ← keep ⊙ h + add`. These are fused into the scan.

    keep, add: floats or tensors broadcastable to [batch, d_inner, d_state].
    parts: of the intervention that it belongs to, if it does.
    """

    def __init__(self, keep: Tensor | float, add: Tensor | float, parts: InterventionParts = frozenset()) -> None:
        self.keep = keep
        self.add = add
        self.parts = parts

    def __call__(self, state: Float[Tensor, "batch d_inner d_state"], hook: HookPoint) -> Tensor:
        keep, add = self.on(state.device)
        return state * keep + add

    def on(self, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
        """keep and add on a device, in float32 or better."""
        keep, add = (
            v.to(device, torch.promote_types(v.dtype, torch.float32)) if isinstance(v, Tensor) else v
            for v in (self.keep, self.add)
        )
        return keep, add

    def check_fits(self, state_shape: tuple[int, int, int], hook: HookPoint) -> None:
        """Raises ValueError if keep or add does not broadcast to [batch, d_inner, d_state]."""
        for value in (self.keep, self.add):
            if isinstance(value, Tensor) and not broadcasts(value.shape, state_shape):
                raise ValueError(
                    f"an edit of shape {list(value.shape)} does not fit {hook.name}, whose state at a position has "
                    f"shape {list(state_shape)}"
                )


class StateWork(NamedTuple):
    """What the hooks on a state ask of one run."""

    writers: dict[int, list[HookFunction]]
    readers: list[HookFunction]
    states: States
    shown: tuple[int, ...] | None

    @property
    def all_writers(self) -> list[HookFunction]:
        return [function for functions in self.writers.values() for function in functions]


def state_work(hook: StateHookPoint, length: int) -> StateWork:
    """Sort a state hook's functions into writers by position and readers, and find which states must be kept."""
    writers: dict[int, list[HookFunction]] = {}
    acting = hook.acting
    readers = [function for function, positions in acting if positions is None]
    for function, positions in acting:
        for p in sorted(resolve_positions(positions, length) or ()):
            writers.setdefault(p, []).append(function)
    _check_no_position_twice(writers, hook)
    recorded = {p for recorder in hook.recorders for p in recorder.positions or ()}
    everything = bool(readers) or any(r.positions is None for r in hook.recorders)
    shown = None
    if hook.is_read_from_outside:
        shown = resolve_positions(hook.shown, length)
        everything = everything or shown is None
        recorded.update(shown or ())
    return StateWork(writers, readers, "all" if everything else tuple(sorted(recorded)) or None, shown)


def _check_no_position_twice(writers: dict[int, list[HookFunction]], hook: HookPoint) -> None:
    for p, functions in writers.items():
        parts = [part for function in functions for part in getattr(function, "parts", ())]
        if len(set(parts)) < len(parts):
            raise ValueError(
                f"an intervention on {hook.name} names one position of this run twice, counted from the beginning and "
                f"from the end: it is {p if hook.window is None else p + hook.window.begin}"
            )


def scan_with_state_hooks(
    scan: Scan,
    hook: StateHookPoint,
    x: Float[Tensor, "batch pos d_inner"],
    d_state: int,
    initial_state: Float[Tensor, "batch d_inner d_state"] | None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """Run `scan`, whose input is `x`, with the functions, recorders and traces of `hook`; y and the final state.

    Affine writers go into the scan as edits. Other functions cut the sequence: the scan runs up to the position, the
    function is called with the state there, and the scan goes on from what it returned. So do the positions that an
    nnsight trace waits for.
    """
    batch, length, d_inner = x.shape
    if not hook.is_listened_to:
        hook.at.changed.clear()
        if hook.at.made:
            _positions(hook, length).pass_by(length)
        hook.pass_by()
        out = scan(0, length, initial_state, None, None)
        return out.y, out.final_state
    positions = _positions(hook, length)
    work = state_work(hook, length)
    for function in work.all_writers:
        if isinstance(function, AffineStateHook):
            function.check_fits((batch, d_inner, d_state), hook)
    out = scan_with_writers(scan, hook, work, x, initial_state, positions)
    if hook.is_read_from_outside and (asked_late := state_work(hook, length)).states != work.states:
        # A trace that waited for single positions now waits for the trajectory as well.
        work = asked_late
        out = out._replace(states=scan(0, length, initial_state, work.states, StateEdits.at(positions.cuts)).states)
    if out.states is None:
        hook.pass_by()
    else:
        _show_states(hook, work, out.states)
    return out.y, out.final_state


def _positions(hook: StateHookPoint, length: int) -> PositionsOfOneScan:
    return PositionsOfOneScan(hook.at, length, 0 if hook.window is None else hook.window.begin)


def scan_with_writers(
    scan: Scan,
    hook: StateHookPoint,
    work: StateWork,
    x: Float[Tensor, "batch pos d_inner"],
    initial_state: Tensor | None,
    positions: PositionsOfOneScan | None = None,
) -> ScanOutput:
    """Run `scan` with the functions that change its state, and the traces that wait for it at single positions, if
    they are given; nothing is shown to readers and recorders."""
    length = x.shape[1]
    positions = PositionsOfOneScan(None, length) if positions is None else positions
    if positions.next() is None and all(isinstance(function, AffineStateHook) for function in work.all_writers):
        out = scan(0, length, initial_state, work.states, fused_edits(work.writers, x.device))
        positions.pass_by(length)
        return out
    return _scan_in_segments(scan, hook, work, length, initial_state, positions)


def fused_edits(writers: dict[int, list[HookFunction]], device: torch.device) -> StateEdits | None:
    """Several affine edits at one position, composed into one."""
    if not writers:
        return None
    composed: dict[int, tuple[Tensor | float, Tensor | float]] = {}
    for p, functions in writers.items():
        first, *others = functions
        assert isinstance(first, AffineStateHook)
        keep, add = first.on(device)
        for function in others:
            assert isinstance(function, AffineStateHook)
            next_keep, next_add = function.on(device)
            keep, add = next_keep * keep, next_keep * add + next_add
        composed[p] = (keep, add)
    edits = StateEdits.at(composed)
    # Numbers became tensors of the CPU.
    return replace(edits, keep=edits.keep.to(device), add=edits.add.to(device))


def _scan_in_segments(
    scan: Scan,
    hook: StateHookPoint,
    work: StateWork,
    length: int,
    state: Tensor | None,
    positions: PositionsOfOneScan,
) -> ScanOutput:
    """The scan cut where functions or traces want the state."""
    ys: list[Tensor] = []
    kept: list[Tensor] = []
    start = 0

    def run(stop: int, edits: StateEdits | None = None) -> Tensor:
        nonlocal start
        out = scan(start, stop, state, _within(work.states, start, stop), edits)
        ys.append(out.y)
        if out.states is not None:
            kept.append(out.states)
        start = stop
        return out.final_state

    while (p := _next_cut(work, positions, start)) is not None:
        if p > start:
            state = run(p)
        changed = scan(p, p + 1, state, None, None).final_state
        for function in work.writers.get(p, ()):
            changed = hook.call(function, changed, position=p)
        changed = positions.show(p, changed)
        # One step whose state is set outright: y, records and gradients at p all follow the changed state.
        positions.cuts[p] = (0.0, changed)
        state = run(p + 1, StateEdits.at({0: positions.cuts[p]}))
    positions.pass_by(length)
    if start < length:
        state = run(length)
    assert state is not None
    return ScanOutput(torch.cat(ys, dim=1), torch.cat(kept, dim=1) if kept else None, state)


def _next_cut(work: StateWork, positions: PositionsOfOneScan, start: int) -> int | None:
    """The first position from `start` on whose state a function or a trace wants."""
    cuts = [p for p in (*work.writers, positions.next()) if p is not None and p >= start]
    return min(cuts, default=None)


def _within(states: States, start: int, stop: int) -> States:
    if states is None or states == "all":
        return states
    return tuple(p - start for p in states if start <= p < stop) or None


def _show_states(hook: StateHookPoint, work: StateWork, states: Float[Tensor, "batch n_kept d_inner d_state"]) -> None:
    """Hand the states that were kept to readers, traces and recorders, which must not change them."""

    def at(positions: Sequence[int] | None) -> Tensor:
        rows = positions
        if positions is not None and isinstance(work.states, tuple):
            rows = [work.states.index(p) for p in positions]
        return states if rows is None or list(rows) == list(range(states.shape[1])) else states[:, list(rows)]

    read_from_outside = hook.is_read_from_outside
    if work.readers or read_from_outside:
        if states.is_inference():
            # Only normal tensors count the changes made in place.
            with torch.inference_mode(False):
                states = states.clone()
        version = states._version
        replaced = [function(states, hook) for function in work.readers]
        changed = any(replacement is not None for replacement in replaced)
        if read_from_outside:
            shown = at(work.shown)
            shown_version = shown._version
            changed |= hook(shown) is not shown or shown._version != shown_version
        if changed or states._version != version:
            raise ValueError(
                f"a hook function or trace changed {hook.name} without naming positions, so it would not reach later "
                "positions. Register a function as (name, function, positions): it is then called with "
                "[batch, d_inner, d_state] at each position, and the scan goes on from what it returns. In a trace, "
                "change hook_state.at[position].output"
            )
    if not read_from_outside:
        hook.pass_by()
    for recorder in hook.recorders:
        recorder.keep(hook, at(recorder.positions))
