"""How the resuming engine cuts a sweep: jobs of cells, chunks of sites, passes of rows, so that all of it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ssminterp.models.memory import free_bytes, value_bytes
from ssminterp.patching.request import Sweep
from ssminterp.patching.sites import Sites

# Without a limit the engine takes this part of what is free.
SHARE_OF_FREE = 0.5
# The parts of the limit for the residual streams at the end of a job, for what is recorded, for a pass, for logits.
FINAL_SHARE, RECORD_SHARE, PASS_SHARE, LOGITS_SHARE = 0.15, 0.25, 0.45, 0.15
# On the CPU, tokens × d_inner of a pass: more gain nothing, since rows go through a layer in blocks.
CPU_PASS_ELEMENTS = 12_000_000
# But at least so many rows, because every pass runs a base row through all layers.
CPU_LEAST_ROWS = 32


@dataclass(frozen=True)
class Limits:
    """Bytes for the engine as a whole, and rows per pass if the caller set them."""

    total: int
    max_batch: int | None

    @classmethod
    def of(cls, sweep: Sweep, max_batch: int | None, max_bytes: int | None) -> Limits:
        """Raises ValueError for limits that are not positive, or leave no room for a base row and a changed one."""
        for name, value, least in (("max_batch", max_batch, 2), ("max_bytes", max_bytes, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        total = int(SHARE_OF_FREE * free_bytes(sweep.model.device)) if max_bytes is None else max_bytes
        return cls(total, max_batch)


@dataclass(frozen=True)
class Job:
    """Cells (numbers in [hook, layer, selection]) at some columns, for all examples: what is finished together."""

    cells: Sequence[int]
    columns: Sequence[int]


def row_bytes(sweep: Sweep, suffix: int) -> int:
    """What one row of a pass needs while a layer runs.

    Per position: five residual streams and ten tensors of width d_inner; per row: its state in six copies.
    """
    cfg = sweep.model.cfg
    return 4 * (suffix * (5 * cfg.d_model + 10 * cfg.d_inner) + 6 * cfg.d_inner * cfg.d_state)


def recording_bytes(sweep: Sweep) -> int:
    """What one position of a run takes while a layer is recorded: whole trajectories, where a hook shows them."""
    cfg = sweep.model.cfg
    shorts = {spec.short for spec in sweep.specs}
    width = 3 * cfg.d_inner * cfg.d_state
    if shorts & {"A_bar", "B_bar"}:
        width += 6 * cfg.d_inner * cfg.d_state
    if "conv_taps" in shorts:
        width += 3 * cfg.d_inner * cfg.d_conv
    return row_bytes(sweep, 1) + 4 * width


def site_bytes(sweep: Sweep) -> int:
    """What is recorded for one site: the past of every layer and the source's values, twice while they are copied."""
    cfg = sweep.model.cfg
    past = cfg.d_inner * (4 * cfg.d_state + cfg.d_conv * cfg.dtype.itemsize)
    return 2 * (
        cfg.n_layers * past + len(sweep.layers) * sum(value_bytes(spec, sweep.model.cfg) for spec in sweep.specs)
    )


def plan_jobs(sweep: Sweep, done: Bool[Tensor, "cells columns"], n_reads: int, limits: Limits, parts: int) -> list[Job]:
    """Jobs that together cover all cells that are not done; `parts` is how many there shall be at least."""
    hooks, layers, columns, selections = sweep.grid
    n_cells = hooks * layers * selections
    final_bytes = sweep.batch * n_reads * sweep.model.cfg.d_model * 4
    most = max(1, min(int(FINAL_SHARE * limits.total / final_bytes), math.ceil(n_cells * columns / parts)))
    cells_per_job, columns_per_job = min(n_cells, most), max(1, most // n_cells)
    if sweep.intervention == "mean":
        mean_bytes = 2 * len(sweep.layers) * sum(value_bytes(spec, sweep.model.cfg) for spec in sweep.specs)
        columns_per_job = max(1, min(columns_per_job, int(RECORD_SHARE / 2 * limits.total / mean_bytes)))
    jobs = []
    for first in range(0, columns, columns_per_job):
        block = list(range(first, min(first + columns_per_job, columns)))
        # Layers innermost but selections: neighbouring cells then share most of the way through the model.
        finished = done[:, block].all(1).tolist()
        todo = [cell for cell in _by_layer(sweep) if not finished[cell]]
        jobs += [Job(todo[i : i + cells_per_job], block) for i in range(0, len(todo), cells_per_job)]
    return jobs


def _by_layer(sweep: Sweep) -> list[int]:
    """The numbers of all cells, lower layers first."""
    hooks, layers, _, selections = sweep.grid
    numbers = torch.arange(hooks * layers * selections).view(hooks, layers, selections)
    order = sorted(range(layers), key=lambda j: sweep.layers[j])
    return numbers[:, order].transpose(0, 1).flatten().tolist()


def job_sites(sweep: Sweep, job: Job, reads: Int[Tensor, "batch n_reads"]) -> Sites:
    """The sites of a job where a change could matter, those that need the longest suffix first.

    Left out are sites behind the last position that is read and, when values are patched over, sites up to which the
    two runs have the same tokens, so the same values.
    """
    positions = torch.stack([sweep.columns[k].positions for k in job.columns]).cpu()  # columns, batch
    column, example = (
        index.flatten()
        for index in torch.meshgrid(torch.tensor(list(job.columns)), torch.arange(sweep.batch), indexing="ij")
    )
    position = positions.flatten()
    need = reads.amax(1)[example] - position + 1
    matters = need > 0
    if sweep.intervention == "patch":
        differ = (sweep.source != sweep.base).cpu().cumsum(1) > 0
        matters &= differ[example, position]
    order = need[matters].argsort(descending=True, stable=True)
    return Sites(example, column, position, need)[matters.nonzero()[:, 0][order]]


def plan_records(sweep: Sweep, sites: Sites, limits: Limits) -> Iterator[Sites]:
    """Sites in chunks whose recorded values fit."""
    step = max(1, int(RECORD_SHARE * limits.total / site_bytes(sweep)))
    for first in range(0, len(sites), step):
        yield sites[first : first + step]


def record_span(sweep: Sweep, n_runs: int, limits: Limits) -> int:
    """How many positions are run at once while recording."""
    return max(1, int(PASS_SHARE * limits.total / (n_runs * recording_bytes(sweep))))


def plan_passes(
    sweep: Sweep, sites: Sites, cells: Sequence[int], limits: Limits
) -> Iterator[tuple[slice, Sequence[int]]]:
    """Passes over some sites, the longest suffixes first: which of them and which cells, so that rows fit.

    As many sites as fit with all cells, but at least one, with as many cells as then fit.
    """
    need = sites.need.tolist()
    first = 0
    while first < len(need):
        cells_at_once = min(len(cells), max(2, _most_tiles(sweep, 1, need[first], limits)) - 1)
        stop, tokens = first + 1, need[first]
        while stop < len(need):
            tokens += need[stop]
            if _most_tiles(sweep, stop + 1 - first, tokens, limits) <= cells_at_once:
                break
            stop += 1
        for cell in range(0, len(cells), cells_at_once):
            yield slice(first, stop), cells[cell : cell + cells_at_once]
        first = stop


def _most_tiles(sweep: Sweep, n: int, tokens: int, limits: Limits) -> int:
    """How many tiles of n rows with so many tokens fit, the base rows' among them."""
    most = int(PASS_SHARE * limits.total / (row_bytes(sweep, tokens) + (n - 1) * row_bytes(sweep, 0)))
    if limits.max_batch is not None:
        most = min(most, limits.max_batch // n)
    if sweep.model.device.type == "cpu":
        most = min(most, max(CPU_LEAST_ROWS // n, CPU_PASS_ELEMENTS // (tokens * sweep.model.cfg.d_inner)))
    return most
