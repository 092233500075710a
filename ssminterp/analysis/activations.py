"""What hooks hold at one place of each example, as the rows that averages and probes are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.analysis.runs import Run
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.models.hook_points import HookSpec
from ssminterp.models.memory import free_bytes, recording_bytes
from ssminterp.models.tokens import check_tokens
from ssminterp.patching.columns import Column, SweepPositions, sweep_columns

# What the axes of a hook are called in results.
FEATURE_DIMS = {"d_model": "d_model", "d_inner": "channel", "d_state": "coordinate", "d_conv": "tap", "vocab": "vocab"}

# As many logits as one run may make: 0.5 GB in float32.
MAX_LOGITS = 2**27


def feature_dims(spec: HookSpec) -> list[str]:
    """The names of a hook's axes after batch and pos in results."""
    return [FEATURE_DIMS[axis] for axis in spec.axes[2:]]


def places_of(model: HookedMamba, run: Run, positions: SweepPositions) -> tuple[Tensor, list[Column]]:
    """The tokens of a run [batch, pos], and the columns that positions mean there.

    Raises ValueError for positions out of range, roles that do not fit the batch, and a cache of another model.
    """
    tokens = _tokens(model, run)
    return tokens, sweep_columns(model, tokens, positions)


def _tokens(model: HookedMamba, run: Run) -> Int[Tensor, "batch pos"]:
    if isinstance(run, ActivationCache):
        if run.model_name != model.cfg.model_name:
            raise ValueError(f"the cache was recorded from {run.model_name}, the model is {model.cfg.model_name}")
        return run.tokens
    return check_tokens(run, model.cfg.vocab) if isinstance(run, Tensor) else model.to_tokens(run)


def layer_groups(
    model: HookedMamba, specs: Sequence[HookSpec], layers: Sequence[int], columns: Sequence[Column]
) -> list[Sequence[int]]:
    """Layers whose activations at the columns fit in memory together, so that one run tells all; at least one each."""
    points = [model.hook_points[spec.name(layers[0])] for spec in specs]
    each = recording_bytes(points, model.cfg, len(columns[0].positions), len(columns))
    at_once = max(1, free_bytes(torch.device("cpu")) // (4 * each))
    return [layers[start : start + at_once] for start in range(0, len(layers), at_once)]


@torch.no_grad()
def activations_at(
    model: HookedMamba, run: Run, names: Sequence[str], columns: Sequence[Column], offset: int = 0
) -> dict[str, Float[Tensor, "column batch *features"]]:
    """What each hook holds `offset` tokens after each column's place, in float32 or better, on the CPU.

    Raises ValueError for places out of range, and a cache that lacks a hook or a position.
    """
    at = torch.stack([column.positions for column in columns]) + offset
    tokens = _tokens(model, run)
    outside = (at < 0) | (at >= tokens.shape[1])
    if outside.any():
        column, example = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{offset} after {columns[column].label!r} is position {int(at[column, example])} in example {example}, "
            f"out of range: the sequence has {tokens.shape[1]} positions"
        )
    if isinstance(run, ActivationCache):
        missing = [name for name in names if name not in run]
        if missing:
            raise ValueError(f"the cache lacks {', '.join(missing)}: record them too, or pass the text or tokens")
        return _taken(run, names, at)
    # Logits are what takes most room in the run of many short prompts.
    at_once = max(1, MAX_LOGITS // (tokens.shape[1] * model.cfg.vocab))
    parts = []
    for part, places in zip(tokens.split(at_once), at.split(at_once, dim=1), strict=True):
        needed = sorted(set(places.flatten().tolist()))
        parts.append(_taken(model.run_with_cache(part, list(names), positions=needed)[1], names, places))
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in names}


def _taken(
    cache: ActivationCache, names: Sequence[str], at: Int[Tensor, "column batch"]
) -> dict[str, Float[Tensor, "column batch *features"]]:
    needed = sorted(set(at.flatten().tolist()))
    cache = cache.at(needed)
    rows = torch.searchsorted(torch.tensor(needed), at.contiguous())
    examples = torch.arange(at.shape[1]).expand_as(rows)
    found = {}
    for name in names:
        values = cache[name].detach()[examples.to(cache[name].device), rows.to(cache[name].device)].cpu()
        found[name] = values.to(torch.promote_types(values.dtype, torch.float32))
    return found
