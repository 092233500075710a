"""Sites: the places of a sweep, one example at one position, and what the two runs hold there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.hook_points import Recorder, attached
from ssminterp.patching.placed_states import PlacedStates
from ssminterp_kernels.backends import takes_triton

# Hooks whose values `stage_runs` can tell.
_SHORTS = "resid_pre mixer_in in_x gate conv x delta B C state gated mixer_out resid_post"
BY_STAGES = tuple(_SHORTS.split())


@dataclass(frozen=True, eq=False)
class Sites:
    """Places where values change, on the CPU.

    example, column, position: [n], the position being that of the example in the column.
    need: [n], how many positions of the suffix that starts there the metrics make necessary.
    """

    example: Int[Tensor, " n"]
    column: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    need: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.example)

    def __getitem__(self, rows: slice | Tensor) -> Sites:
        return Sites(self.example[rows], self.column[rows], self.position[rows], self.need[rows])


class Places:
    """m places of a batch of runs: rows and positions, [m] each. A negative position stands for zeros."""

    def __init__(self, rows: Int[Tensor, " m"], positions: Int[Tensor, " m"], start: int = 0) -> None:
        self.rows = rows
        self.positions = positions
        self.start = start
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.unique, self.among_unique = positions.unique(return_inverse=True)
        self.slots = torch.arange(len(rows))

    def within(self, start: int, stop: int) -> Places:
        """Those of a span of positions, counted from its start; `slots` says which they are."""
        inside = ((self.positions >= start) & (self.positions < stop)).nonzero()[:, 0]
        places = Places(self.rows[inside], self.positions[inside] - start, start)
        places.slots = inside
        return places

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rows, positions, positions' places among the unique ones, and slots on a device."""
        if device not in self._on:
            tensors = (self.rows, self.positions, self.among_unique, self.slots)
            a, b, c, d = (tensor.to(device) for tensor in tensors)
            self._on[device] = (a, b, c, d)
        return self._on[device]


class Wanted(NamedTuple):
    """The values of a hook at some places."""

    point: HookPoint
    places: Places


class _Gatherer(Recorder):
    """A recorder that keeps single places, in `out` [m, *features]."""

    def __init__(self, here: Places, total: int, out: Tensor | None) -> None:
        super().__init__({}, here.unique.tolist())
        self.here = here
        self.total = total
        self.out = out

    def record(self, hook: HookPoint, tensor: Tensor) -> None:
        rows, positions, _, slots = self.here.on(tensor.device)
        self._put(tensor[rows, positions], slots)

    def keep(self, hook: HookPoint, tensor: Tensor) -> None:
        rows, _, among_recorded, slots = self.here.on(tensor.device)
        self._put(tensor[rows, among_recorded], slots)

    def _put(self, values: Tensor, slots: Tensor) -> None:
        if self.out is None and len(slots) == self.total:
            self.out = values
            return
        if self.out is None:
            self.out = values.new_zeros(self.total, *values.shape[1:])
        self.out[slots] = values


def collect(
    model: HookedMamba, tokens: Int[Tensor, "runs pos"], wanted: Sequence[Wanted], span: int
) -> list[Tensor | None]:
    """The values wanted, each [m, *features], from one run over the tokens, `span` positions at a time.

    None where every position asked for is negative. No logits are computed.
    """
    if span >= tokens.shape[1] and _suits_stages(model, wanted):
        from ssminterp.patching.stage_runs import values_by_stages  # Triton may not be installed

        return list(values_by_stages(model, tokens, wanted))
    distinct = {id(w.places): w.places for w in wanted}
    length = 1 + max((int(places.unique[-1]) for places in distinct.values() if len(places.rows)), default=-1)
    scans = _scans(model, len(tokens), wanted)
    found: list[Tensor | None] = [None] * len(wanted)
    backbone: Any = model.lm.backbone
    cache = None
    for start in range(0, length, span):
        stop = min(start + span, length)
        here = {key: places.within(start, stop) for key, places in distinct.items()}
        gatherers = [
            _Gatherer(here[id(w.places)], len(w.places.rows), out) for w, out in zip(wanted, found, strict=True)
        ]
        listening: list[tuple[HookPoint, Recorder]] = [
            (w.point, gatherer)
            for i, (w, gatherer) in enumerate(zip(wanted, gatherers, strict=True))
            if len(gatherer.here.rows) and not any(i in own for own in scans.values())
        ]
        listening += [(point, scan) for scan in scans for point in scan.points]
        with attached(listening):
            run = backbone(input_ids=tokens[:, start:stop], cache_params=cache, use_cache=span < length)
        cache = run.cache_params
        found = [gatherer.out for gatherer in gatherers]
    for scan, own in scans.items():
        parts = scan.states().split([len(wanted[i].places.rows) for i in own])
        for i, part in zip(own, parts, strict=True):
            found[i] = part
    return found


def _suits_stages(model: HookedMamba, wanted: Sequence[Wanted]) -> bool:
    """Whether the values can be had from the stages of the layers, where those are launches on a GPU."""
    weights = [block.mixer.conv1d.weight for block in model.blocks]
    return all(takes_triton(weight) for weight in weights) and all(w.point.spec.short in BY_STAGES for w in wanted)


def _scans(model: HookedMamba, n_runs: int, wanted: Sequence[Wanted]) -> dict[PlacedStates, list[int]]:
    """Recorders of states, where the compiled scan can give them, and which of `wanted` each of them has."""
    by_layer: dict[int, list[int]] = {}
    for i, (point, places) in enumerate(wanted):
        layer = point.layer
        if point.spec.short != "state" or layer is None or not PlacedStates.suit(model, layer):
            continue
        if len(places.rows) and int(places.unique[-1]) >= 0:
            by_layer.setdefault(layer, []).append(i)
    return {
        PlacedStates(
            model,
            layer,
            n_runs,
            torch.cat([wanted[i].places.rows for i in own]),
            torch.cat([wanted[i].places.positions for i in own]),
        ): own
        for layer, own in by_layer.items()
    }
