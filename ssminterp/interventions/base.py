"""An intervention: a printable value that says what to do to which part of which hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ssminterp.interventions.edits import Affine, Edit
from ssminterp.interventions.selection import Roles, Selection
from ssminterp.models import FwdHook, HookedMamba, HookPoint
from ssminterp.models.hook_names import NamesFilter
from ssminterp.models.mixers.state_scan import AffineStateHook, InterventionParts
from ssminterp.models.timeline import Window
from ssminterp.shapes import broadcasts

# Builds the edit of one hook point; gets the selection with its roles resolved. Raises ValueError if it cannot fit.
MakeEdit = Callable[[HookPoint, HookedMamba, Selection], Edit]
StateFunction = Callable[[Tensor, HookPoint], Tensor]


@dataclass(frozen=True, eq=False)
class HookEdit:
    """What is done (`verb` and `details`, for printing), to which hooks, and to which part of them."""

    verb: str
    details: str
    names: NamesFilter
    where: Selection
    make_edit: MakeEdit

    def __repr__(self) -> str:
        return f"{self.verb}({self.names!r}{self.details}{self.where!r})"

    def fwd_hooks(self, model: HookedMamba, roles: Roles | None = None) -> list[FwdHook]:
        """The hook functions that carry it out, checked against the model's shapes."""
        where = self.where.at_roles(roles)
        hooks: list[FwdHook] = []
        for name in model.hook_names(self.names):
            point = model.hook_points[name]
            features = where.feature_mask(point, model)
            edit = self.make_edit(point, model, where)
            if point.spec.short == "state":
                hooks += _state_hooks(point, where, features, edit)
            else:
                hooks.append((name, TensorEdit(where, features, edit)))
        return hooks


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """A hook function that changes the selected part of a tensor [batch, pos, …]."""

    where: Selection
    features: Bool[Tensor, "..."] | None
    edit: Edit

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        at = self.where.index(tensor, hook)
        old = tensor[at]
        _check_values(self.edit, tuple(old.shape), hook, one_position=isinstance(self.where.positions, int))
        new = _only(self.edit(old), old, self.features, self.where.batch_mask(len(tensor)))
        return tensor.index_put(at, new)

    def within(self, window: Window) -> StateFunction | None:
        """The same where only a window of the text is run; None if nothing selected lies there."""
        positions = self.where.positions
        assert not isinstance(positions, str)
        batch = len(positions) if isinstance(positions, Tensor) else 1
        touched = len(self.where.within(window, batch)[0]) > 0
        return (lambda tensor, hook: self._in_window(window, tensor, hook)) if touched else None

    def _in_window(self, window: Window, tensor: Tensor, hook: HookPoint) -> Tensor:
        rows, columns, local = (index.to(tensor.device) for index in self.where.within(window, len(tensor)))
        n_columns = self._n_columns(window, columns)
        one_position = isinstance(self.where.positions, int)
        _check_values(self.edit, (len(tensor), n_columns, *tensor.shape[2:]), hook, one_position)
        old = tensor[rows, local][:, None]
        examples = self.where.batch_mask(len(tensor))
        new = _only(
            self.edit.pairs(rows, columns)(old),
            old,
            self.features,
            None if examples is None else examples.to(rows.device)[rows],
        )
        return tensor.index_put((rows, local), new[:, 0])

    def _n_columns(self, window: Window, columns: Tensor) -> int:
        """How many positions a value must have, if it has one for each."""
        positions = self.where.positions
        if isinstance(positions, Tensor):
            return positions.shape[1]
        if positions is not None:
            assert not isinstance(positions, str)
            return len(window.timeline.resolve(positions))
        # Without positions a value goes with the run's text, of which it may hold a part as long as that lasts.
        longest = max((value.shape[1] for value in self.edit.values() if value.dim() > 1), default=1)
        return max(longest, int(columns.max()) + 1)


def _check_values(edit: Edit, selected: tuple[int, ...], hook: HookPoint, one_position: bool) -> None:
    """Raises ValueError if a value does not broadcast to what it replaces, whose batch only the run knows."""
    for value in edit.values():
        if not broadcasts(value.shape, selected):
            shapes = [list(shape[:1] + shape[2:] if one_position else shape) for shape in (value.shape, selected)]
            raise ValueError(
                f"a value of shape {shapes[0]} does not fit {hook.name}, whose tensor there has shape {shapes[1]}"
            )


def _only(new: Tensor, old: Tensor, features: Tensor | None, examples: Tensor | None) -> Tensor:
    """`new` in the chosen features and examples, `old` elsewhere."""
    if features is not None:
        new = torch.where(features.to(old.device), new, old)
    if examples is not None:
        new = torch.where(examples.to(old.device).reshape(-1, *(1,) * (old.dim() - 1)), new, old)
    return new


# Tells interventions apart, by numbers because Dynamo of torch 2.11 cannot hash an object().
_serial_numbers = itertools.count()


def _state_hooks(point: HookPoint, where: Selection, features: Bool[Tensor, "..."] | None, edit: Edit) -> list[FwdHook]:
    """One hook per position: the state after it follows from the state there."""
    positions, intervention = where.positions, next(_serial_numbers)
    if isinstance(positions, Tensor):
        found = [(int(p), positions.cpu() == p) for p in positions.unique()]
        return [
            (point.name, _state_hook(where, features, edit.columns(here.int().argmax(1)), intervention, here.any(1)), p)
            for p, here in found
        ]
    if isinstance(positions, int):
        return [(point.name, _state_hook(where, features, edit, intervention), positions)]
    if not isinstance(positions, tuple):
        raise ValueError(f"an intervention on {point.name} needs positions, an int or a list: it propagates from each")
    return [
        (point.name, _state_hook(where, features, edit.columns(i), intervention), p) for i, p in enumerate(positions)
    ]


def _state_hook(
    where: Selection,
    features: Bool[Tensor, "..."] | None,
    edit: Edit,
    intervention: int,
    examples: Bool[Tensor, " batch"] | None = None,
) -> AffineStateHook | StateEdit:
    rows = [None] if examples is None else examples.nonzero().flatten().tolist()
    parts = frozenset((intervention, row) for row in rows)
    if isinstance(edit, Affine) and where.batch is None:
        keep, add = _masked(edit.keep, 1.0, features, examples), _masked(edit.add, 0.0, features, examples)
        return AffineStateHook(keep, add, parts)
    return StateEdit(where, features, edit, examples, parts)


@dataclass(frozen=True, eq=False)
class StateEdit:
    """A hook function that changes the selected part of a state [batch, d_inner, d_state]."""

    where: Selection
    features: Bool[Tensor, "..."] | None
    edit: Edit
    examples: Bool[Tensor, " batch"] | None
    parts: InterventionParts

    def __call__(self, state: Tensor, hook: HookPoint) -> Tensor:
        rows = self.where.batch_mask(len(state))
        if self.examples is not None:
            rows = self.examples if rows is None else rows & self.examples
        return _only(self.edit(state[:, None])[:, 0], state, self.features, rows)


def _masked(
    value: Tensor | float, elsewhere: float, features: Tensor | None, examples: Tensor | None
) -> Tensor | float:
    """keep or add [batch, 1, d_inner, d_state] without its position axis, neutral outside what is chosen."""
    if isinstance(value, Tensor):
        value = value[:, 0]
    for mask in (features, None if examples is None else examples[:, None, None]):
        if mask is not None:
            device = value.device if isinstance(value, Tensor) else None
            value = torch.where(mask.to(device), torch.as_tensor(value), torch.tensor(elsewhere, device=device))
    return value
