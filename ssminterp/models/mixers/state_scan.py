"""Running a scan with hooks on its hidden state, so that a changed state is what later positions start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.models.hook_points import HookFunction, HookPoint
from ssminterp.positions import resolve_positions
from ssminterp.shapes import broadcasts
from ssminterp_kernels.selective_scan import ScanOutput, StateEdits

States: TypeAlias = Literal["all"] | tuple[int, ...] | None


# A scan over positions start to stop of one layer's inputs: (start, stop, initial_state, states, edits) -> output
Scan: TypeAlias = Callable[[int, int, Tensor | None, States, StateEdits | None], ScanOutput]


class StateHookPoint(HookPoint):
    """The hook point of a state trajectory. Its functions run inside the scan, so calling it only shows the states."""

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor


class AffineStateHook:
    """A hook function on the state that is affine: `h ← keep ⊙ h + add`. These are fused into the scan.

    keep, add: floats or tensors broadcastable to [batch, d_inner, d_state].
    """

    def __init__(self, keep: Tensor | float, add: Tensor | float) -> None:
        self.keep = keep
        self.add = add

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

    @property
    def all_writers(self) -> list[HookFunction]:
        return [function for functions in self.writers.values() for function in functions]


def state_work(hook: HookPoint, length: int) -> StateWork:
    """Sort a state hook's functions into writers by position and readers, and find which states must be kept."""
    writers: dict[int, list[HookFunction]] = {}
    acting = hook.acting
    readers = [function for function, positions in acting if positions is None]
    for function, positions in acting:
        for p in sorted(resolve_positions(positions, length) or ()):
            writers.setdefault(p, []).append(function)
    recorded = {p for recorder in hook.recorders for p in recorder.positions or ()}
    everything = readers or hook.has_torch_hooks or any(r.positions is None for r in hook.recorders)
    return StateWork(writers, readers, "all" if everything else tuple(sorted(recorded)) or None)


def scan_with_state_hooks(
    scan: Scan,
    hook: HookPoint,
    x: Float[Tensor, "batch pos d_inner"],
    d_state: int,
    initial_state: Float[Tensor, "batch d_inner d_state"] | None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """Run `scan`, whose input is `x`, with the functions and recorders of `hook`; y and the final state.

    Affine writers go into the scan as edits. Other functions cut the sequence: the scan runs up to the position, the
    function is called with the state there, and the scan goes on from what it returned.
    """
    batch, length, d_inner = x.shape
    if not hook.is_listened_to:
        out = scan(0, length, initial_state, None, None)
        return out.y, out.final_state
    work = state_work(hook, length)
    for function in work.all_writers:
        if isinstance(function, AffineStateHook):
            function.check_fits((batch, d_inner, d_state), hook)
    out = scan_with_writers(scan, hook, work, x, initial_state)
    if out.states is not None:
        _show_states(hook, work, out.states)
    return out.y, out.final_state


def scan_with_writers(
    scan: Scan, hook: HookPoint, work: StateWork, x: Float[Tensor, "batch pos d_inner"], initial_state: Tensor | None
) -> ScanOutput:
    """Run `scan` with the functions that change its state; nothing is shown to readers and recorders."""
    length = x.shape[1]
    if all(isinstance(function, AffineStateHook) for function in work.all_writers):
        return scan(0, length, initial_state, work.states, _fused_edits(work.writers, x.device))
    return _scan_in_segments(scan, hook, work, length, initial_state)


def _fused_edits(writers: dict[int, list[HookFunction]], device: torch.device) -> StateEdits | None:
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
    return StateEdits.at(composed)


def _scan_in_segments(scan: Scan, hook: HookPoint, work: StateWork, length: int, state: Tensor | None) -> ScanOutput:
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

    for p in sorted(work.writers):
        if p > start:
            state = run(p)
        changed = scan(p, p + 1, state, None, None).final_state
        for function in work.writers[p]:
            changed = hook.call(function, changed, position=p)
        # One step whose state is set outright: y, records and gradients at p all follow the changed state.
        state = run(p + 1, StateEdits.at({0: (0.0, changed)}))
    if start < length:
        state = run(length)
    assert state is not None
    return ScanOutput(torch.cat(ys, dim=1), torch.cat(kept, dim=1) if kept else None, state)


def _within(states: States, start: int, stop: int) -> States:
    if states is None or states == "all":
        return states
    return tuple(p - start for p in states if start <= p < stop) or None


def _show_states(hook: HookPoint, work: StateWork, states: Float[Tensor, "batch n_kept d_inner d_state"]) -> None:
    """Hand the states that were kept to readers and recorders, which must not change them."""
    if work.readers or hook.has_torch_hooks:
        if states.is_inference():
            # Only normal tensors count the changes made in place.
            with torch.inference_mode(False):
                states = states.clone()
        version = states._version
        replaced = [function(states, hook) is not None for function in work.readers]
        if any(replaced) or hook(states) is not states or states._version != version:
            raise ValueError(
                f"a hook function changed {hook.name} without naming positions, so it would not reach later "
                "positions. Register it as (name, function, positions): it is then called with "
                "[batch, d_inner, d_state] at each position, and the scan goes on from what it returns"
            )
    row_of = {p: row for row, p in enumerate(work.states)} if isinstance(work.states, tuple) else None
    for recorder in hook.recorders:
        wanted: Sequence[int] | None = recorder.positions
        if wanted is not None and row_of is not None:
            wanted = [row_of[p] for p in wanted]
        in_place = wanted is None or list(wanted) == list(range(states.shape[1]))
        recorder.keep(hook, states if in_place else states[:, list(wanted or ())])
