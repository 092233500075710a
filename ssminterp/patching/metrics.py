"""Metrics in a sweep: where they read, and their values for many cells from the residual stream alone.

A metric is a function of logits [batch, pos, vocab] that returns one number per example, [batch]. One that also has

    positions: [batch], the one position that it reads in each example
    at_end(logits [batch, vocab]): the same number from the logits there

(as `ssminterp.tasks.Metric` has) is given only those logits. If it has `compute`, which is `at_end` without its checks,
that is vectorised over cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.patching.products import linear

Metric: TypeAlias = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
Metrics: TypeAlias = Mapping[str, Metric]


def checked(name: str, value: object, batch: int) -> Float[Tensor, " batch"]:
    """A metric's value. Raises ValueError if it is not one number per example, or NaN."""
    if not isinstance(value, Tensor) or value.shape != (batch,):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the metric {name!r} must return one number per example, [{batch}], got {got}")
    if value.isnan().any():
        raise ValueError(f"the metric {name!r} is NaN for examples {value.isnan().nonzero().flatten().tolist()}")
    return value.float()


@dataclass(frozen=True, eq=False)
class Readout:
    """The positions of each example whose logits the metrics need, and the metrics' values from there.

    reads: [batch, n_reads]; all positions if a metric does not say which one it reads.
    """

    model: HookedMamba
    metrics: Metrics
    reads: Int[Tensor, "batch n_reads"]

    @classmethod
    def of(cls, model: HookedMamba, metrics: Metrics, batch: int, length: int) -> Readout:
        """Raises ValueError if a metric's positions do not fit the prompts."""
        wanted = [_positions(name, metric, batch, length) for name, metric in metrics.items()]
        if any(positions is None for positions in wanted):
            return cls(model, metrics, torch.arange(length).expand(batch, -1))
        return cls(model, metrics, torch.stack([p for p in wanted if p is not None], dim=1).unique(dim=1))

    @property
    def n_reads(self) -> int:
        return self.reads.shape[1]

    def logits(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Final norm and output layer, as the Hugging Face model applies them."""
        lm: Any = self.model.lm
        return linear(lm.lm_head, lm.backbone.norm_f(residual).to(lm.lm_head.weight.dtype)).float()

    def values(
        self, residual: Float[Tensor, "cells batch n_reads d_model"], max_logits: int
    ) -> dict[str, Float[Tensor, "cells batch"]]:
        """Every metric's value for every cell. At most `max_logits` logits are held at once, but those of one cell.

        Raises ValueError if a metric returns another shape or NaN.
        """
        _, batch, n_reads, _ = residual.shape
        step = max(1, max_logits // (batch * n_reads * self.model.cfg.vocab))
        parts = [self._values(self.logits(part)) for part in residual.split(step)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.metrics}

    def _values(self, logits: Float[Tensor, "cells batch n_reads vocab"]) -> dict[str, Float[Tensor, "cells batch"]]:
        return {name: self._value(name, metric, logits) for name, metric in self.metrics.items()}

    def _value(
        self, name: str, metric: Any, logits: Float[Tensor, "cells batch n_reads vocab"]
    ) -> Float[Tensor, "cells batch"]:
        batch = logits.shape[1]
        positions = getattr(metric, "positions", None)
        if positions is None:
            return torch.stack([checked(name, metric(one), batch) for one in logits])
        place = (self.reads == positions.cpu()[:, None]).int().argmax(1)
        at_end = logits[:, torch.arange(batch), place] if self.n_reads > 1 else logits[:, :, 0]
        values = _vectorised(metric, at_end)
        if values is None:
            return torch.stack([checked(name, metric.at_end(one), batch) for one in at_end])
        return values.float()


def _positions(name: str, metric: Any, batch: int, length: int) -> Int[Tensor, " batch"] | None:
    """The position a metric reads in each example, or None if it does not say."""
    positions = getattr(metric, "positions", None)
    if positions is None:
        return None
    positions = torch.as_tensor(positions).cpu()
    if positions.shape != (batch,):
        raise ValueError(f"the metric {name!r} is of {positions.numel()} examples, the prompts are {batch}")
    if int(positions.min()) < 0 or int(positions.max()) >= length:
        raise ValueError(
            f"the metric {name!r} reads positions {int(positions.min())} to {int(positions.max())}, "
            f"the prompts have {length} (0 to {length - 1})"
        )
    return positions


def _vectorised(metric: Any, logits: Float[Tensor, "cells batch vocab"]) -> Float[Tensor, "cells batch"] | None:
    """`metric.compute` over all cells at once; None if it has none, torch cannot vectorise it, or it must complain."""
    compute = getattr(metric, "compute", None)
    if compute is None or logits.isnan().any():
        return None
    try:
        values = torch.vmap(compute)(logits)
    except RuntimeError:  # control flow that depends on the values
        return None
    return values if values.shape == logits.shape[:2] and not values.isnan().any() else None
