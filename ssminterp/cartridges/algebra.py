"""Reckoning with states: averages, lines between two, differences, distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ssminterp.models import ModelState
from ssminterp.models.state import PARTS, check_alike

Measure = Literal["l2", "relative", "cosine"]


def blank(state: ModelState) -> ModelState:
    """What the model of a state starts from: nothing read, all zeros, for as many examples."""
    conv, ssm = torch.zeros_like(state.conv), torch.zeros_like(state.ssm)
    return replace(state, conv=conv, ssm=ssm, n_tokens=0, history=("nothing read",))


def average(states: Sequence[ModelState], weights: Sequence[float] | None = None) -> ModelState:
    """The weighted mean of states of one model, conv windows and SSM states alike.

    weights: one number for each state, which are divided by their sum; equal by default. The mean counts as many
    tokens as the longest of the texts. A mean of memories is no memory of any text: whether the model makes sense of
    it is a question to ask, not a promise.

    Raises ValueError for no states, for states of several models or batch sizes, and for weights that do not fit.
    """
    if not states:
        raise ValueError("no states were given: the list is empty")
    check_alike(states[0], *states)
    shares = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    if len(shares) != len(states) or sum(shares) == 0 or not math.isfinite(sum(shares)):
        raise ValueError(f"{len(states)} states need as many finite weights, whose sum is not 0; got {weights}")
    shares = [share / sum(shares) for share in shares]
    conv = _weighted([state.conv for state in states], shares)
    ssm = _weighted([state.ssm for state in states], shares)
    origins = " + ".join(f"{share:.3g} · [{_origin(s)}]" for share, s in zip(shares, states, strict=True))
    n_tokens = max(state.n_tokens for state in states)
    return replace(states[0], conv=conv, ssm=ssm, n_tokens=n_tokens, history=(f"average of {origins}",))


def interpolate(start: ModelState, end: ModelState, at: float) -> ModelState:
    """The state a part `at` of the way from one state to another: 0 is `start`, 1 is `end`; outside goes beyond them.

    Raises ValueError for states of two models or batch sizes.
    """
    return average([start, end], [1.0 - at, at])


@dataclass(frozen=True, eq=False)
class StateDifference:
    """A direction between two states of one model: `conv` and `ssm` shaped as a state's.

    It is no memory, and no run can go on from it: it has no text behind it and counts no tokens. It is for
    moving a state, `difference.added_to(state, strength=1.0)`, as task vectors move weights (Ilharco et al. 2023,
    arXiv:2212.04089); for steering a run, `steer("blocks.3.mixer.hook_state", difference.ssm[3], positions=…)`; and
    for looking at: which layers and channels two texts differ in.
    """

    conv: Float[Tensor, "n_layers batch d_inner d_conv"]
    ssm: Float[Tensor, "n_layers batch d_inner d_state"]
    model_name: str
    fingerprint: str
    history: tuple[str, ...]

    def added_to(self, state: ModelState, strength: float = 1.0) -> ModelState:
        """`state + strength · difference`; a difference of one example is added to every example of a batch.

        Raises ValueError for a state of another model, and for a batch of another size.
        """
        if state.fingerprint != self.fingerprint:
            raise ValueError(
                f"the difference is of {self.model_name} [{self.fingerprint}], the state of {state.model_name} "
                f"[{state.fingerprint}]"
            )
        if self.ssm.shape[1] not in (1, state.batch):
            raise ValueError(f"the difference holds a batch of {self.ssm.shape[1]}, the state one of {state.batch}")
        moved = {part: getattr(state, part) + strength * getattr(self, part).to(getattr(state, part)) for part in PARTS}
        step = f"moved by {strength:.3g} · [{'; '.join(self.history)}]"
        return replace(state, **moved, history=(*state.history, step))


def difference(end: ModelState, start: ModelState) -> StateDifference:
    """`end − start`. Raises ValueError for states of two models or batch sizes."""
    check_alike(end, start)
    parts = {part: getattr(end, part) - getattr(start, part).to(getattr(end, part)) for part in PARTS}
    history = (f"[{_origin(end)}] − [{_origin(start)}]",)
    return StateDifference(**parts, model_name=end.model_name, fingerprint=end.fingerprint, history=history)


def distance(
    state: ModelState, other: ModelState, measure: Measure = "relative", by: Literal["layer", "channel"] = "layer"
) -> xr.DataArray:
    """How far two states lie apart: dims (part, layer, batch), and (part, layer, channel, batch) `by="channel"`.

    part: "conv", the conv windows, and "ssm", the SSM states. measure: "l2", the norm of the difference; "relative",
    that divided by the norm of `other` (0 where both are 0); "cosine", 1 − the cosine of their angle (NaN where one
    is 0).

    Raises ValueError for states of two models or batch sizes, and for an unknown measure.
    """
    check_alike(state, other)
    if measure not in ("l2", "relative", "cosine") or by not in ("layer", "channel"):
        raise ValueError(
            f"measure must be 'l2', 'relative' or 'cosine' and by 'layer' or 'channel', got {measure!r}, {by!r}"
        )
    numbers = []
    for part in PARTS:
        # [n_layers, batch, d_inner, …] -> [n_layers, channel, batch, features], or without the channels
        pair = [getattr(s, part).double().cpu().transpose(1, 2) for s in (state, other)]
        rows = [t if by == "channel" else t.transpose(1, 2).flatten(2) for t in pair]
        numbers.append(_measured(rows[0], rows[1], measure))
    dims = ("part", "layer", "batch") if by == "layer" else ("part", "layer", "channel", "batch")
    values = torch.stack(numbers).numpy()
    coords = {"part": list(PARTS)} | {d: np.arange(n) for d, n in zip(dims[1:], values.shape[1:], strict=True)}
    attrs = {
        "measure": measure,
        "model": state.model_name,
        "fingerprint": state.fingerprint,
        "state": _origin(state),
        "other": _origin(other),
    }
    return xr.DataArray(values, dims=dims, coords=coords, name="distance", attrs=attrs)


def _measured(here: Tensor, there: Tensor, measure: Measure) -> Tensor:
    if measure == "cosine":
        product = (here * there).sum(-1)
        return 1 - product / (here.norm(dim=-1) * there.norm(dim=-1))
    apart = (here - there).norm(dim=-1)
    if measure == "l2":
        return apart
    return torch.where(apart == 0, apart, apart / there.norm(dim=-1))


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = sum(
        share * tensor.to(tensors[0].device, torch.float64) for share, tensor in zip(shares, tensors, strict=True)
    )
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def _origin(state: ModelState) -> str:
    return "; ".join(state.history)
