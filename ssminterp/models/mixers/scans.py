"""The scan of one mixer in one run, over what its hooks left of its inputs, and the same with tokens silenced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ssminterp.models.mixers.state_scan import States
from ssminterp_kernels.scan_step import selective_scan_step
from ssminterp_kernels.selective_scan import ScanOutput, StateEdits, recurrence, selective_scan


class Step(NamedTuple):
    """Δ [batch, pos, d_inner], or its pre-activation if `softplus` (after adding `bias`) is still to come."""

    delta: Tensor
    bias: Tensor | None
    softplus: bool

    def size(self) -> Float[Tensor, "batch pos d_inner"]:
        """Δ itself, in float32 or better."""
        delta = self.delta.to(torch.promote_types(self.delta.dtype, torch.float32))
        delta = delta if self.bias is None else delta + self.bias
        return F.softplus(delta) if self.softplus else delta


class Silence(NamedTuple):
    """What a scan leaves out, channel by channel.

    writes: where x writes nothing. decays: where the state does not decay either, so that the position passes without
    a trace; None means nowhere. coordinates: those of the state that C reads; None means all.
    """

    writes: Bool[Tensor, "batch pos #d_inner"]
    decays: Bool[Tensor, "batch pos #d_inner"] | None
    coordinates: Bool[Tensor, " d_state"] | None


@dataclass(eq=False)
class SelectiveScan:
    """A scan of x, Δ, B and C. D and z, the gate, ride in its kernel if they are given.

    One position after a state, as decoding runs it, is the one-step kernel: its only state is the final one, so states
    are recorded all the same. Where the state is edited, and where the text begins, it is the general scan.

    in_place: whether a scan over one position may write the new state over the initial one.
    """

    x: Float[Tensor, "batch pos d_inner"]
    step: Step
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos d_state"]
    C: Float[Tensor, "batch pos d_state"]
    D: Float[Tensor, " d_inner"] | None = None
    z: Float[Tensor, "batch pos d_inner"] | None = None
    in_place: bool = False

    def __call__(
        self, start: int, stop: int, initial_state: Tensor | None, states: States, edits: StateEdits | None
    ) -> ScanOutput:
        if stop - start == 1 and edits is None and initial_state is not None:
            return self._one_step(start, initial_state, states)
        x, delta, B, C, z = self.x, self.step.delta, self.B, self.C, self.z
        if stop - start != x.shape[1]:
            span = slice(start, stop)
            x, delta, B, C = (tensor[:, span] for tensor in (x, delta, B, C))
            z = None if z is None else z[:, span]
        return selective_scan(
            x,
            delta,
            self.A,
            B,
            C,
            D=self.D,
            z=z,
            delta_bias=self.step.bias,
            delta_softplus=self.step.softplus,
            initial_state=initial_state,
            states=states,
            edits=edits,
        )

    def _one_step(self, position: int, initial_state: Tensor, states: States) -> ScanOutput:
        """The scan over one position, whose only state is the final one."""
        y, state = selective_scan_step(
            initial_state,
            self.x[:, position],
            self.step.delta[:, position],
            self.A,
            self.B[:, position],
            self.C[:, position],
            D=self.D,
            z=None if self.z is None else self.z[:, position],
            delta_bias=self.step.bias,
            delta_softplus=self.step.softplus,
            in_place=self.in_place,
        )
        return ScanOutput(y[:, None], None if states is None else state[:, None], state)

    def silenced(self, silence: Silence) -> SelectiveScan:
        """The scan without what `silence` names."""
        x = self.x.masked_fill(silence.writes, 0.0)
        step = self.step
        if silence.decays is not None:
            # Δ = 0 leaves the state as it was.
            step = Step(step.size().masked_fill(silence.decays, 0.0), None, softplus=False)
        return replace(self, x=x, step=step, C=_read(self.C, silence.coordinates))


@dataclass(frozen=True, eq=False)
class DiscretisedScan:
    """A scan of A_bar and B_bar · x as hooks left them; C is read in the dtype of y."""

    A_bar: Float[Tensor, "batch pos d_inner d_state"]
    B_bar_x: Float[Tensor, "batch pos d_inner d_state"]
    C: Float[Tensor, "batch pos d_state"]
    dtype: torch.dtype

    def __call__(
        self, start: int, stop: int, initial_state: Tensor | None, states: States, edits: StateEdits | None
    ) -> ScanOutput:
        trajectory = recurrence(self.A_bar[:, start:stop], self.B_bar_x[:, start:stop], initial_state, edits)
        y = (self.C[:, start:stop, None].float() * trajectory).sum(-1).to(self.dtype)
        kept = trajectory if states == "all" else None if states is None else trajectory[:, list(states)]
        return ScanOutput(y, kept, trajectory[:, -1])

    def silenced(self, silence: Silence) -> DiscretisedScan:
        """The scan without what `silence` names."""
        B_bar_x, A_bar = self.B_bar_x.masked_fill(silence.writes[..., None], 0.0), self.A_bar
        if silence.decays is not None:
            A_bar = A_bar.masked_fill(silence.decays[..., None], 1.0)
        return replace(self, A_bar=A_bar, B_bar_x=B_bar_x, C=_read(self.C, silence.coordinates))


def _read(C: Tensor, coordinates: Tensor | None) -> Tensor:
    return C if coordinates is None else C.masked_fill(~coordinates, 0.0)
