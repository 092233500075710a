"""What the resuming engine records before its passes: the base run's past and the source run's values at sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ssminterp.models.memory import value_bytes
from ssminterp.patching.plan import Job, Limits, record_span
from ssminterp.patching.request import Sweep
from ssminterp.patching.sites import Places, Sites, Wanted, collect
from ssminterp.patching.stages import Past

# (hook number, layer) -> values [n, *features]
Sources = Mapping[tuple[int, int], Tensor]


class Records(NamedTuple):
    """The past of every layer at n sites, and the source's values there."""

    pasts: Sequence[Past]
    sources: Sources

    def of(self, rows: slice) -> Records:
        """Those of some of the sites."""
        pasts = [Past(past.window[rows], past.state[rows]) for past in self.pasts]
        return Records(pasts, {key: value[rows] for key, value in self.sources.items()})


def hooks_of(sweep: Sweep, cells: Sequence[int]) -> list[tuple[int, int]]:
    """(hook number, layer) that some cells are at."""
    _, n_layers, _, n_selections = sweep.grid
    per_hook = n_layers * n_selections
    return sorted({(cell // per_hook, sweep.layers[cell % per_hook // n_selections]) for cell in cells})


def wanted_at(
    sweep: Sweep,
    sites: Sites,
    cells: Sequence[int],
    base_rows: Int[Tensor, " n"],
    source_rows: Int[Tensor, " n"] | None,
) -> list[Wanted]:
    """What `records_of` takes, in its order. base_rows, source_rows: where the sites' examples are among the runs."""
    cfg, points = sweep.model.cfg, sweep.model.hook_points
    taps = cfg.d_conv - 1
    earlier = (sites.position[:, None] + torch.arange(-taps, 0)).flatten()
    windows, states = Places(base_rows.repeat_interleave(taps), earlier), Places(base_rows, sites.position - 1)
    wanted = [Wanted(points[f"blocks.{layer}.mixer.hook_in_x"], windows) for layer in range(cfg.n_layers)]
    wanted += [Wanted(points[f"blocks.{layer}.mixer.hook_state"], states) for layer in range(cfg.n_layers)]
    if source_rows is not None:
        places = Places(source_rows, sites.position)
        wanted += [Wanted(sweep.point(sweep.specs[hook], layer), places) for hook, layer in hooks_of(sweep, cells)]
    return wanted


def records_of(sweep: Sweep, n: int, cells: Sequence[int], found: Sequence[Tensor | None]) -> Records:
    """The records of n sites from the values of `wanted_at`."""
    cfg = sweep.model.cfg
    taps = cfg.d_conv - 1
    pasts = []
    for layer in range(cfg.n_layers):
        window, state = found[layer], found[cfg.n_layers + layer]
        device = next(sweep.model.blocks[layer].parameters()).device
        if window is None:
            window = torch.zeros(n * taps, cfg.d_inner, device=device, dtype=cfg.dtype)
        if state is None:
            state = torch.zeros(n, cfg.d_inner, cfg.d_state, device=device)
        pasts.append(Past(window.view(n, taps, cfg.d_inner), state))
    values = found[2 * cfg.n_layers :]
    # Of no site at all nothing is recorded, and nothing is run.
    sources = {key: value for key, value in zip(hooks_of(sweep, cells), values, strict=False) if value is not None}
    return Records(pasts, sources)


def record(sweep: Sweep, sites: Sites, cells: Sequence[int], with_sources: bool, limits: Limits) -> Records:
    """The records of some sites, from one run of both sides up to the last of them."""
    examples, row = sites.example.unique(return_inverse=True)
    wanted = wanted_at(sweep, sites, cells, row, row + len(examples) if with_sources else None)
    sides = (sweep.base, sweep.source) if with_sources else (sweep.base,)
    runs = torch.cat([side[examples.to(side.device)] for side in sides])
    return records_of(
        sweep, len(sites), cells, collect(sweep.model, runs, wanted, record_span(sweep, len(runs), limits))
    )


def column_means(sweep: Sweep, job: Job, limits: Limits) -> Sources:
    """The mean over the source prompts of the values at each of the job's columns: [columns, *features]."""
    keys = hooks_of(sweep, job.cells)
    positions = torch.stack([sweep.columns[k].positions for k in job.columns], dim=1).cpu()  # batch, columns
    per_example = sum(value_bytes(sweep.specs[hook], sweep.model.cfg) for hook, _ in keys) * len(job.columns)
    step = max(1, int(limits.total / 4 / per_example))
    sums: dict[tuple[int, int], Tensor] = {}
    dtypes: dict[tuple[int, int], torch.dtype] = {}
    for first in range(0, sweep.batch, step):
        some = positions[first : first + step]
        places = Places(torch.arange(len(some)).repeat_interleave(some.shape[1]), some.flatten())
        wanted = [Wanted(sweep.point(sweep.specs[hook], layer), places) for hook, layer in keys]
        runs = sweep.source[first : first + step]
        found = collect(sweep.model, runs, wanted, record_span(sweep, len(runs), limits))
        for key, value in zip(keys, found, strict=True):
            assert value is not None
            dtypes[key] = value.dtype
            part = value.float().unflatten(0, some.shape).sum(0)
            sums[key] = sums[key] + part if key in sums else part
    return {key: (total / sweep.batch).to(dtypes[key]) for key, total in sums.items()}
