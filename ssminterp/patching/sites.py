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
from ssminterp.patching.compiled_stages import stages_class

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
        from ssminterp.patching.stage_runs import values_by_stages  # it is about places too

        return list(values_by_stages(model, tokens, wanted))
    distinct = {id(w.places): w.places for w in wanted}
    length = 1 + max((int(places.unique[-1]) for places in distinct.values() if len(places.rows)), default=-1)
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
            (w.point, gatherer) for w, gatherer in zip(wanted, gatherers, strict=True) if len(gatherer.here.rows)
        ]
        with attached(listening):
            run = backbone(input_ids=tokens[:, start:stop], cache_params=cache, use_cache=span < length)
        cache = run.cache_params
        found = [gatherer.out for gatherer in gatherers]
    return found


def _suits_stages(model: HookedMamba, wanted: Sequence[Wanted]) -> bool:
    """Whether the values can be had from the stages of the layers."""
    recorded = all(stages_class(block.mixer).records_states for block in model.blocks)
    return recorded and all(w.point.spec.short in BY_STAGES for w in wanted)
