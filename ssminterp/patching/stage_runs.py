"""Values of hooks at places of whole runs, by the stages of the layers.

What recorders do, on a GPU in a third of the launches: where few prompts go through a deep model, launching takes the
time. And a recorder of states keeps the same positions of every run, where nearly all of them are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.patching.compiled_stages import stages_of
from ssminterp.patching.sites import Places, Wanted
from ssminterp.patching.stages import Past, ScanInputs, Stages, embedded, every_A
from ssminterp_kernels.rows import Packing, Recorded


class At(NamedTuple):
    """Places among the tokens of runs, on a device: tokens [m], and where there are none, [m, 1]."""

    tokens: Tensor
    missing: Tensor | None

    @staticmethod
    def of(places: Places, n_runs: int, device: torch.device) -> At:
        absent = places.positions < 0
        tokens = torch.where(absent, 0, places.positions * n_runs + places.rows)
        missing = absent[:, None].to(device, non_blocking=True) if absent.any() else None
        return At(tokens.to(device, non_blocking=True), missing)

    def of_tokens(
        self, values: Float[Tensor, "1 tokens width"], stage: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "m width_then"]:
        """The tokens' values, or what a stage makes of them."""
        found = values[0].index_select(0, self.tokens)
        found = found if stage is None else stage(found)
        return found if self.missing is None else found.masked_fill_(self.missing, 0)


class _States:
    """The states that a layer's scan writes: a slot for each one wanted, those at negative positions being zeros.

    places: of each of `wanted`, the slots.
    """

    def __init__(self, wanted: Sequence[Places], n_runs: int, n_tokens: int, device: torch.device) -> None:
        rows, positions = (torch.cat([getattr(places, name) for places in wanted]) for name in ("rows", "positions"))
        tokens = torch.where(positions < 0, -1, positions * n_runs + rows)
        unique, slot = tokens.unique(return_inverse=True)
        # In the order of the first places that want them, so that most are given as a view.
        first = torch.full((len(unique),), len(tokens)).scatter_reduce(0, slot, torch.arange(len(tokens)), "amin")
        order = first.argsort()
        unique, slot = unique[order], order.argsort()[slot]
        self.zero = (unique < 0).nonzero()[:, 0].tolist()
        self.n = len(unique)
        table = torch.full((n_tokens,), -1, dtype=torch.int32)
        table[unique[unique >= 0]] = (unique >= 0).nonzero()[:, 0].int()
        self.slots = table.to(device, non_blocking=True)
        self.places = slot.split([len(places.rows) for places in wanted])
        self._device = device

    def empty(self, d_inner: int, d_state: int) -> Float[Tensor, "slots d_inner d_state"]:
        states = torch.empty(self.n, d_inner, d_state, device=self.slots.device)
        for slot in self.zero:
            states[slot].zero_()
        return states

    def given(self, states: Float[Tensor, "slots d_inner d_state"]) -> list[Tensor]:
        """What was written, for each of `wanted`."""
        return [states[at] for at in self._views]

    @cached_property
    def _views(self) -> list[slice | Tensor]:
        return [_view_or_index(part, self._device) for part in self.places]


class Record(NamedTuple):
    """The states that one scan writes."""

    wanted: _States
    states: Float[Tensor, "slots d_inner d_state"]

    @property
    def to_be_written(self) -> Recorded:
        return Recorded(self.wanted.slots, self.states)

    def given(self) -> list[Tensor]:
        """After the scan, for each of what was wanted."""
        return self.wanted.given(self.states)


def _view_or_index(slots: Int[Tensor, " m"], device: torch.device) -> slice | Tensor:
    first = int(slots[0])
    if torch.equal(slots, torch.arange(first, first + len(slots))):
        return slice(first, first + len(slots))
    return slots.to(device, non_blocking=True)


def values_by_stages(
    model: HookedMamba, tokens: Int[Tensor, "runs pos"], wanted: Sequence[Wanted]
) -> list[Float[Tensor, "m *features"]]:
    """The values wanted, from one run over all tokens at once. No logits are computed."""
    runs = Runs(model, tokens)
    by_layer: dict[int, list[int]] = {}
    for i, (point, _) in enumerate(wanted):
        assert point.layer is not None
        by_layer.setdefault(point.layer, []).append(i)
    found: dict[int, Tensor] = {}
    for layer in range(1 + max(by_layer)):
        here = by_layer.get(layer, [])
        found.update(zip(here, runs.through(layer, [wanted[i] for i in here]), strict=True))
    return [found[i] for i in range(len(wanted))]


def _is_state(wanted: Wanted) -> bool:
    return wanted.point.spec.short == "state"


class Held(NamedTuple):
    """What a layer's stages make of whole runs, [1, tokens, …]; hidden before the layer."""

    stages: Stages
    hidden: Tensor
    mixer_in: Tensor
    in_x: Tensor
    gate: Tensor
    inputs: ScanInputs
    gated: Tensor

    def value(self, short: str, at: At) -> Float[Tensor, "m width"]:
        """What a hook holds at some places, but the state."""
        if short == "delta":
            return at.of_tokens(self.inputs.delta, self.stages.delta)
        if short == "conv":
            return at.of_tokens(self.stages.conv(self.in_x))
        if short == "mixer_out":
            return at.of_tokens(self.gated, self.stages.out)
        if short == "resid_post":
            return at.of_tokens(self.hidden) + at.of_tokens(self.gated, self.stages.out)
        if short in ("x", "B", "C"):
            return at.of_tokens(getattr(self.inputs, short))
        return at.of_tokens(self.hidden if short == "resid_pre" else getattr(self, short))


class Runs:
    """Whole runs on their way through the layers: the rows of a single tile."""

    def __init__(self, model: HookedMamba, tokens: Int[Tensor, "runs pos"]) -> None:
        self.model = model
        self.packing = Packing([tokens.shape[1]] * len(tokens))
        self.hidden = embedded(model, tokens.T.flatten())[None]
        self._at: dict[tuple[int, torch.device], At] = {}
        self._states: dict[tuple[tuple[int, ...], torch.device], _States] = {}
        self._pasts: dict[torch.device, Past] = {}
        self.A = every_A(model)

    def through(self, layer: int, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Bring the runs behind a layer; the values wanted there."""
        stages = self.stages(layer)
        self.hidden = self.hidden.to(stages.past.state.device)
        mixer_in = stages.normed(self.hidden)
        in_x, gate = stages.projected(mixer_in)
        inputs = stages.scan_inputs(stages.activated(in_x))
        record = self.record(stages, wanted)
        gated = stages.gated(inputs, gate, None if record is None else record.to_be_written)
        states = [] if record is None else record.given()
        held = Held(stages, self.hidden, mixer_in, in_x, gate, inputs, gated)
        found = [states.pop(0) if _is_state(w) else held.value(w.point.spec.short, self.at(w.places)) for w in wanted]
        stages.add_out(self.hidden, gated, self.hidden)
        return found

    def stages(self, layer: int) -> Stages:
        block = self.model.blocks[layer]
        device = block.mixer.conv1d.weight.device
        return stages_of(block, self.past(device), self.packing, self.A[layer])

    def record(self, stages: Stages, wanted: Sequence[Wanted]) -> Record | None:
        """What the scan of a layer is to write down; None if no states are wanted."""
        places = [w.places for w in wanted if _is_state(w)]
        return self.record_at(places, stages.past.state.device) if places else None

    def record_at(self, places: Sequence[Places], device: torch.device) -> Record:
        """What a scan is to write down at some places, and memory for it."""
        key = tuple(id(one) for one in places), device
        if key not in self._states:
            self._states[key] = _States(places, self.packing.n, self.packing.tokens, device)
        states, cfg = self._states[key], self.model.cfg
        return Record(states, states.empty(cfg.d_inner, cfg.d_state))

    def at(self, places: Places) -> At:
        device = self.hidden.device
        key = id(places), device
        if key not in self._at:
            self._at[key] = At.of(places, self.packing.n, device)
        return self._at[key]

    def past(self, device: torch.device) -> Past:
        """Of runs that have none."""
        if device not in self._pasts:
            cfg, n = self.model.cfg, self.packing.n
            window = torch.zeros(n, cfg.d_conv - 1, cfg.d_inner, dtype=cfg.dtype, device=device)
            self._pasts[device] = Past(window, torch.zeros(n, cfg.d_inner, cfg.d_state, device=device))
        return self._pasts[device]
