"""What an intervention does to the values it has selected.

An edit maps old values to new ones, both [batch, n_positions, …]. `columns(index)` is the edit of one position, on
[batch, 1, …]; an index [batch] picks another position in each example. `pairs(rows, columns)` is the edit of single
(example, position) pairs, on [pairs, 1, …]. `values()` are the tensors in it that must broadcast to what is edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint


@dataclass(frozen=True, eq=False)
class Affine:
    """`keep ⊙ old + add`; keep and add are floats or broadcastable to [batch, n_positions, …]."""

    keep: Tensor | float
    add: Tensor | float

    def __call__(self, old: Tensor) -> Tensor:
        keep, add = (v.to(old) if isinstance(v, Tensor) else v for v in (self.keep, self.add))
        if isinstance(keep, float) and keep == 0.0:
            return torch.as_tensor(add).to(old).expand_as(old)  # not old * 0, which would keep a NaN
        return old * keep + add

    def columns(self, index: int | Tensor) -> Affine:
        return Affine(_column(self.keep, index), _column(self.add, index))

    def pairs(self, rows: Tensor, columns: Tensor) -> Affine:
        return Affine(_picked(self.keep, rows, columns), _picked(self.add, rows, columns))

    def values(self) -> list[Tensor]:
        return [value for value in (self.keep, self.add) if isinstance(value, Tensor)]


@dataclass(frozen=True, eq=False)
class Subspace:
    """Replace the part of `old` inside the span of `basis` by that of `value`; the rest stays.

    basis: orthonormal [d, k] along `axis`, counted from the end of the tensor (Geiger et al. 2023, arXiv:2303.02536:
    distributed alignment search patches in such a rotated subspace).
    """

    value: Tensor
    basis: Float[Tensor, "d k"]
    axis: int

    def __call__(self, old: Tensor) -> Tensor:
        basis = self.basis.to(old)
        difference = (self.value.to(old) - old).movedim(self.axis, -1)
        return old + ((difference @ basis) @ basis.T).movedim(-1, self.axis)

    def columns(self, index: int | Tensor) -> Subspace:
        value = _column(self.value, index)
        assert isinstance(value, Tensor)
        return Subspace(value, self.basis, self.axis)

    def pairs(self, rows: Tensor, columns: Tensor) -> Subspace:
        value = _picked(self.value, rows, columns)
        assert isinstance(value, Tensor)
        return Subspace(value, self.basis, self.axis)

    def values(self) -> list[Tensor]:
        return [self.value]


Edit: TypeAlias = Affine | Subspace


def check_basis(basis: Tensor, point: HookPoint, model: HookedMamba) -> int:
    """The axis, from the end, that a basis [d, k] lies along: the hook's first feature axis.

    Raises ValueError if it does not fit the hook or its columns are not orthonormal.
    """
    axes = point.spec.axes[2:]
    size = model.cfg.axis_size(axes[0])
    if basis.dim() != 2 or basis.shape[0] != size or basis.shape[1] > size:
        raise ValueError(f"a basis for {point.name} must be [{axes[0]}={size}, k], got {list(basis.shape)}")
    gram = basis.T.double() @ basis.double()
    error = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max().item()
    if error > 1e-4:
        raise ValueError(f"the basis is not orthonormal: basisᵀ basis is off the identity by up to {error:.2g}")
    return -len(axes)


def _column(value: Tensor | float, index: int | Tensor) -> Tensor | float:
    """One position of a value [batch or 1, n_positions or 1, …], kept as an axis of size 1."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] == 1:
        return value
    if isinstance(index, int):
        return value[:, index : index + 1]
    rows = torch.arange(len(index)) if value.shape[0] > 1 else torch.zeros_like(index)
    return value[rows.to(value.device), index.to(value.device)][:, None]


def _picked(value: Tensor | float, rows: Tensor, columns: Tensor) -> Tensor | float:
    """Single (example, position) pairs of a value [batch or 1, n_positions or 1, …]: [pairs, 1, …]."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    rows, columns = (
        (index if size > 1 else torch.zeros_like(index)).to(value.device)
        for index, size in zip((rows, columns), value.shape, strict=False)
    )
    return value[rows, columns][:, None]
