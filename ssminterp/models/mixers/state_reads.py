"""What is read from a state, and what would be read had some tokens not written.

The read-out is linear in what the tokens wrote, so a target that must not read some sources reads a second trajectory,
in which they never wrote: one more scan, at any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ssminterp.models.hook_points import HookPoint
from ssminterp.models.mixers.scans import DiscretisedScan, SelectiveScan, Silence
from ssminterp.models.mixers.state_hook import StateHookPoint
from ssminterp.models.mixers.state_scan import scan_with_writers, state_work


class ForbiddenReads(NamedTuple):
    """Targets and the sources whose writes they must not read, in some channels and coordinates of the state.

    skips_decay: to the targets it is also as if the state had not decayed at the sources.
    channels, coordinates: None means all. Masks on the CPU.
    """

    targets: Bool[Tensor, "batch pos"]
    sources: Bool[Tensor, "batch pos"]
    channels: Bool[Tensor, " d_inner"] | None
    coordinates: Bool[Tensor, " d_state"] | None
    skips_decay: bool


class StateReads:
    """What one mixer read in one run, and what it reads as more and more reads are forbidden."""

    def __init__(
        self,
        scan: SelectiveScan | DiscretisedScan,
        hook_state: StateHookPoint,
        x: Float[Tensor, "batch pos d_inner"],
        y: Float[Tensor, "batch pos d_inner"],
        d_state: int,
        initial_state: Float[Tensor, "batch d_inner d_state"] | None,
    ) -> None:
        self.scan = scan
        self.hook_state = hook_state
        self.x = x
        self.y = y.to(torch.promote_types(y.dtype, torch.float32))
        self.d_state = d_state
        self.initial_state = initial_state
        self.forbidden: list[ForbiddenReads] = []

    def forbid(self, reads: ForbiddenReads) -> Float[Tensor, "batch pos d_inner"]:
        """How y changes, in float32 or better, if these reads are forbidden too, beside those that were before.

        A read that is forbidden twice is forbidden once. What was done to the state in the run, patches say, is done
        to the second trajectory as well: functions on the state are called once more for it.
        """
        self.forbidden.append(reads)
        # Targets that different sets of the forbidden reads name need a trajectory each.
        named = torch.stack([one.targets for one in self.forbidden])
        y = self.y
        for pattern in named[:, reads.targets].unique(dim=1).T:
            here = (named == pattern[:, None, None]).all(0)
            without = self._read([one for one, applies in zip(self.forbidden, pattern, strict=True) if applies])
            y = torch.where(here[..., None].to(y.device), without.to(y.dtype), y)
        change = y - self.y
        self.y = y
        return change

    def _read(self, forbidden: Sequence[ForbiddenReads]) -> Float[Tensor, "batch pos d_inner"]:
        """y at all positions with some reads forbidden; coordinates that differ in what is forbidden one by one."""
        if changed := sorted(self.hook_state.at.changed):
            raise ValueError(
                f"a trace changed {self.hook_state.name} at positions {changed}, which cannot be "
                "repeated for what a knockout lets its targets read: use the intervention patch or a hook function"
            )
        everything = torch.ones(self.d_state, dtype=torch.bool)
        named = torch.stack([everything if one.coordinates is None else one.coordinates for one in forbidden])
        parts = []
        for pattern in named.unique(dim=1).T:
            here = (named == pattern[:, None]).all(0)
            applying = [one for one, applies in zip(forbidden, pattern, strict=True) if applies]
            scan = self.scan.silenced(self._silence(applying, None if here.all() else here))
            work = state_work(self.hook_state, self.x.shape[1])._replace(states=None)
            parts.append(scan_with_writers(scan, self.hook_state, work, self.x, self.initial_state).y)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _silence(self, forbidden: Sequence[ForbiddenReads], coordinates: Tensor | None) -> Silence:
        writes = decays = torch.zeros(*self.x.shape[:2], 1, dtype=torch.bool)
        for one in forbidden:
            where = one.sources[..., None] if one.channels is None else one.sources[..., None] & one.channels
            writes = writes | where
            decays = decays | where if one.skips_decay else decays
        device = self.x.device
        return Silence(
            writes.to(device),
            decays.to(device) if decays.any() else None,
            None if coordinates is None else coordinates.to(device),
        )


class ReadHookPoint(HookPoint):
    """The hook point of y, what is read from the state. While it fires, `reads` can say what else would be read."""

    reads: StateReads | None = None

    @contextmanager
    def reading(self, reads: StateReads) -> Iterator[None]:
        self.reads = reads
        try:
            yield
        finally:
            self.reads = None
