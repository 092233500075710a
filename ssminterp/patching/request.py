"""What a sweep was asked to do, checked and in one form for both engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.interventions.base import HookEdit
from ssminterp.models import HookedMamba, HookPoint, Intervention
from ssminterp.models.hook_names import short_to_specs
from ssminterp.models.hook_points import HookSpec
from ssminterp.models.hooked_mamba import Input
from ssminterp.models.tokens import check_tokens
from ssminterp.patching.columns import Column
from ssminterp.patching.moved import MovedEdit, Place
from ssminterp.patching.selections import Selection

Direction: TypeAlias = Literal["clean_to_corrupted", "corrupted_to_clean"]
DIRECTIONS: tuple[Direction, ...] = ("clean_to_corrupted", "corrupted_to_clean")

# "patch", "zero", "mean", or (value there now, value in the source run) -> new value, all [n, …]
# or an intervention object without positions of its own, which is then moved over the grid
SweepIntervention: TypeAlias = Literal["patch", "zero", "mean"] | Callable[[Tensor, Tensor], Tensor] | HookEdit


@dataclass(frozen=True, eq=False)
class Sweep:
    """The grid of a sweep and the two runs it is about.

    source, base: tokens of the run that values come from and of the run they are put into, [batch, pos].
    selections: which features of a hook are changed, one entry for each further step of the grid.
    """

    model: HookedMamba
    source: Int[Tensor, "batch pos"]
    base: Int[Tensor, "batch pos"]
    specs: Sequence[HookSpec]
    layers: Sequence[int]
    columns: Sequence[Column]
    selections: Sequence[Selection]
    intervention: Literal["patch", "zero", "mean"] | Callable[[Tensor, Tensor], Tensor] | MovedEdit

    @property
    def batch(self) -> int:
        return self.base.shape[0]

    @property
    def length(self) -> int:
        return self.base.shape[1]

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """hooks, layers, columns, selections."""
        return len(self.specs), len(self.layers), len(self.columns), len(self.selections)

    def point(self, spec: HookSpec, layer: int) -> HookPoint:
        return self.model.hook_points[spec.name(layer)]

    def column_place(self, point: HookPoint, column: int) -> Place:
        """All examples at one column of a hook."""
        return Place(point, torch.arange(self.batch), torch.full((self.batch,), column))

    def new_value(
        self, now: Float[Tensor, "n *features"], source: Float[Tensor, "n *features"], place: Place
    ) -> Tensor:
        """What stands at the place after the intervention, before a selection keeps part of it as it was.

        source: the source run's values there; for "mean", their mean over the source prompts.
        Raises ValueError if a function returns another shape.
        """
        if isinstance(self.intervention, MovedEdit):
            return self.intervention.new_value(now, place)
        if self.intervention == "zero":
            return torch.zeros_like(now)
        if not callable(self.intervention):
            return source.expand_as(now)
        new = self.intervention(now, source.expand_as(now))
        if not isinstance(new, Tensor) or new.shape != now.shape:
            got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"the intervention must return a tensor of shape {list(now.shape)}, got {got}")
        return new.to(now.dtype)

    def cell_name(self, cell: int) -> str:
        """Hook and layer of a cell, numbered in [hook, layer, selection]."""
        hook, rest = divmod(cell, len(self.layers) * len(self.selections))
        return self.specs[hook].name(self.layers[rest // len(self.selections)])

    @property
    def intervention_name(self) -> str:
        if isinstance(self.intervention, str):
            return self.intervention
        named = getattr(self.intervention, "name", None) or getattr(self.intervention, "__qualname__", None)
        return str(named or type(self.intervention).__name__)


def sweep_tokens(model: HookedMamba, clean: Input, corrupted: Input) -> tuple[Tensor, Tensor]:
    """Both sides as tokens [batch, pos] on the model's device. Raises ValueError if their shapes differ."""
    sides = []
    for prompts in (clean, corrupted):
        tokens = prompts if isinstance(prompts, Tensor) else model.to_tokens(prompts)
        sides.append(check_tokens(tokens, model.cfg.vocab).to(model.device))
    if sides[0].shape != sides[1].shape:
        raise ValueError(
            f"clean and corrupted prompts must have the same shape [batch, pos], "
            f"got {list(sides[0].shape)} and {list(sides[1].shape)}"
        )
    return sides[0], sides[1]


def sweep_specs(model: HookedMamba, hooks: str | Sequence[str]) -> list[HookSpec]:
    """The kinds of hook that short names mean. Raises ValueError for unknown names and for hooks of no layer."""
    specs = short_to_specs(hooks, model.hook_specs)
    without_layer = [spec.short for spec in specs if spec.place == "model"]
    if without_layer:
        raise ValueError(
            f"{without_layer} belong to no layer: patch resid_pre of layer 0, or resid_post of the last one"
        )
    twice = sorted({spec.short for spec in specs if specs.count(spec) > 1})
    if twice:
        raise ValueError(f"hooks names {twice} more than once")
    return specs


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_intervention(intervention: object) -> None:
    """Raises ValueError if this is neither a known name, a function nor an intervention that can be moved."""
    if isinstance(intervention, HookEdit) or callable(intervention) or intervention in ("patch", "zero", "mean"):
        return
    if isinstance(intervention, Intervention):
        raise ValueError(
            f"{intervention!r} does not act at one hook and position, so a sweep cannot move it over them. To sweep "
            "while it holds: with model.intervene(...): patch_sweep(..., engine='naive')"
        )
    raise ValueError(
        "intervention must be 'patch', 'zero', 'mean', a function (now, source) -> new, or an intervention like "
        f"scale('*', 0.5), got {intervention!r}"
    )


def on_grid(
    intervention: SweepIntervention,
    model: HookedMamba,
    specs: Sequence[HookSpec],
    layers: Sequence[int],
    columns: Sequence[Column],
) -> Literal["patch", "zero", "mean"] | Callable[[Tensor, Tensor], Tensor] | MovedEdit:
    """What a sweep does in its cells. Raises ValueError for an intervention object that does not fit the grid."""
    if not isinstance(intervention, HookEdit):
        return intervention
    points = [model.hook_points[spec.name(layer)] for spec in specs for layer in layers]
    return MovedEdit(intervention, model, points, columns)


def as_metrics(metric: object) -> dict[str, Callable[[Tensor], Tensor]]:
    """One metric or a mapping of them as {name: metric}. Raises ValueError for an empty mapping."""
    if isinstance(metric, Mapping):
        if not metric:
            raise ValueError("metric is an empty mapping: name at least one metric")
        return dict(metric)
    if not callable(metric):
        raise ValueError(f"metric must be a function of logits or a mapping of such, got {type(metric).__name__}")
    name = getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__))
    return {str(name): metric}
