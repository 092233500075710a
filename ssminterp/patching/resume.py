"""The resuming engine: every cell starts at its own layer and position, and many cells run as one batch.

Per job of cells and columns: the pasts of the base run and the values of the source run are recorded at the sites;
passes of rows give the residual stream at the positions that the metrics read; metrics are computed at the end, when
all examples of a cell are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models.mixers.mamba1 import SILU
from ssminterp.patching.changes import Changes, cells_by_place
from ssminterp.patching.compiled_stages import stages_class
from ssminterp.patching.metrics import Metrics, Readout
from ssminterp.patching.plan import (
    LOGITS_SHARE,
    Job,
    Limits,
    job_sites,
    plan_jobs,
    plan_passes,
    plan_records,
    record_span,
    recording_bytes,
    row_bytes,
    site_bytes,
)
from ssminterp.patching.records import Records, Sources, column_means, record, records_of, wanted_at
from ssminterp.patching.request import Sweep
from ssminterp.patching.rows import run_rows
from ssminterp.patching.sites import BY_STAGES, Places, Sites, Wanted, collect
from ssminterp.patching.storage import Results
from ssminterp_kernels.rows import Packing

# With out=, an interrupted sweep loses at most about this part of its work.
PARTS_WITH_FOLDER = 20
# On the CPU, logits that are held at once: more leave the caches.
CPU_LOGITS = 4_000_000


class _Passed(NamedTuple):
    """Rows that have gone through the layers: where they began, what is read of them, their cells in order, and their
    residual streams [cells, n_keep, d_model]."""

    sites: Sites
    read: _Read
    cells: Sequence[int]
    hidden: Tensor


class _Prepared(NamedTuple):
    """A job of one chunk of sites, and what is recorded for it, or its only pass."""

    job: Job
    sites: Sites
    records: Records | None
    passed: _Passed | None


class ResumeEngine:
    """Runs only what a change can reach.

    Nothing may be attached to the model, see `check_nothing_attached`.

    Raises ValueError if the limits leave no room, or if a metric's positions do not fit the prompts.
    """

    def __init__(self, sweep: Sweep, metrics: Metrics, limits: Limits, in_parts: bool) -> None:
        _check_fits(sweep, limits)
        self.sweep = sweep
        self.limits = limits
        self.readout = Readout.of(sweep.model, metrics, sweep.batch, sweep.length)
        self.max_logits = int(LOGITS_SHARE * limits.total / 16)
        if sweep.model.device.type == "cpu":
            self.max_logits = min(self.max_logits, CPU_LOGITS)
        self.parts = PARTS_WITH_FOLDER if in_parts else 1
        self._base_residual: Tensor | None = None
        self._prepared: _Prepared | None = None

    def baselines(self) -> dict[str, tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]]:
        """Every metric's value in the source and in the base run. Raises ValueError if a metric returns nonsense.

        Where the whole sweep is small, the same run records what it needs.
        """
        sweep, batch = self.sweep, self.sweep.batch
        reads = self.readout.reads.repeat(2, 1)
        places = Places(torch.arange(2 * batch).repeat_interleave(reads.shape[1]), reads.flatten())
        last = sweep.model.hook_points[f"blocks.{sweep.model.cfg.n_layers - 1}.hook_resid_post"]
        wanted = [Wanted(last, places)]
        only = self._only_chunk()
        runs, span = torch.cat([sweep.source, sweep.base]), record_span(sweep, 2 * batch, self.limits)
        if only is not None and self._is_one_pass(*only, span):
            job, sites = only
            residual, passed = self._joint_pass(job, sites, runs, places)
            self._prepared = _Prepared(job, sites, None, passed)
        else:
            if only is not None:
                job, sites = only
                wanted += wanted_at(sweep, sites, job.cells, sites.example + batch, sites.example)
            recorded, *found = collect(sweep.model, runs, wanted, span)
            assert recorded is not None
            residual = recorded
            if only is not None:
                self._prepared = _Prepared(job, sites, records_of(sweep, len(sites), job.cells, found), None)
        residual = residual.unflatten(0, (2, batch, -1))
        self._base_residual = residual[1]
        values = self.readout.values(residual, self.max_logits)
        return {name: (value[0].cpu(), value[1].cpu()) for name, value in values.items()}

    def _only_chunk(self) -> tuple[Job, Sites] | None:
        """The sweep's job and its sites, if it has one job whose records fit at once."""
        n_cells = len(self.sweep.specs) * len(self.sweep.layers) * len(self.sweep.selections)
        nothing_done = torch.zeros(n_cells, len(self.sweep.columns), dtype=torch.bool)
        jobs = plan_jobs(self.sweep, nothing_done, self.readout.n_reads, self.limits, self.parts)
        if len(jobs) > 1 or self.sweep.intervention == "mean":
            return None
        sites = job_sites(self.sweep, jobs[0], self.readout.reads)
        chunks = list(plan_records(self.sweep, sites, self.limits))
        return (jobs[0], sites) if len(chunks) == 1 else None

    def _is_one_pass(self, job: Job, sites: Sites, span: int) -> bool:
        """Whether all rows go through the layers at once, with the runs that they are recorded from."""
        if not len(sites) or span < self.sweep.length or not suits_a_joint_pass(self.sweep):
            return False
        return next(plan_passes(self.sweep, sites, job.cells, self.limits)) == (slice(0, len(sites)), job.cells)

    def _joint_pass(
        self, job: Job, sites: Sites, runs: Int[Tensor, "runs pos"], places: Places
    ) -> tuple[Float[Tensor, "m d_model"], _Passed]:
        from ssminterp.patching.joint_pass import Pass, run_jointly  # Triton may not be installed

        packing = Packing(sites.need.tolist())
        read = _tokens_read(sites, packing, self.readout.reads)
        rows = Pass(job.cells, sites, packing, _tokens(self.sweep, sites, packing), read.keep.tolist())
        residual, cells, hidden = run_jointly(self.sweep, runs, rows, places)
        return residual, _Passed(sites, read, cells, hidden)

    def fill(self, results: Results, advance: Callable[[int], object]) -> None:
        """Run every cell that `results` does not hold yet, after `baselines`."""
        for job in plan_jobs(self.sweep, results.done, self.readout.n_reads, self.limits, self.parts):
            with results.part(f"{len(job.cells)} cells from {self.sweep.cell_name(job.cells[0])} on"):
                progress = Progress(int((~results.done[job.cells][:, job.columns]).sum()), advance)
                final = self._final_residuals(job, progress)
                values = self.readout.values(final.flatten(0, 1), self.max_logits)
                grid = (len(job.cells), len(job.columns), self.sweep.batch)
                results.put(job.cells, job.columns, {name: value.view(grid).cpu() for name, value in values.items()})
                progress.show(1.0)

    def _final_residuals(self, job: Job, progress: Progress) -> Float[Tensor, "cells columns batch n_reads d_model"]:
        """The residual stream after the last layer where metrics read: the base run's, but where a row differs."""
        assert self._base_residual is not None
        sweep, limits, reads = self.sweep, self.limits, self.readout.reads
        final = self._base_residual.repeat(len(job.cells), len(job.columns), 1, 1, 1)
        prepared = self._prepared_for(job)
        if prepared is not None and prepared.passed is not None:
            _scatter(final, prepared.passed, job)
            return final
        means = column_means(sweep, job, limits) if sweep.intervention == "mean" else None
        every_site = job_sites(sweep, job, reads) if prepared is None else prepared.sites
        finished = 0
        for sites in plan_records(sweep, every_site, limits):
            held = None if prepared is None else prepared.records
            records = record(sweep, sites, job.cells, means is None, limits) if held is None else held
            if means is not None:
                column_place = torch.tensor([job.columns.index(int(k)) for k in sites.column])
                own_means = {key: value[column_place.to(value.device)] for key, value in means.items()}
                records = Records(records.pasts, own_means)
            for rows, cells in plan_passes(sweep, sites, job.cells, limits):
                some, own = sites[rows], records.of(rows)
                changes = _changes(sweep, cells, own.sources, some)
                packing = Packing(some.need.tolist())
                read = _tokens_read(some, packing, reads)
                tokens = _tokens(sweep, some, packing)
                passed = run_rows(sweep, tokens, packing, own.pasts, changes, read.keep.tolist())
                _scatter(final, _Passed(some, read, *passed), job)
                finished += len(cells) * len(some)
                progress.show(finished / (len(job.cells) * len(every_site)))
        return final

    def _prepared_for(self, job: Job) -> _Prepared | None:
        """What the run of the baselines recorded, if it was for this job; it is not kept any longer."""
        prepared, self._prepared = self._prepared, None
        return prepared if prepared is not None and prepared.job == job else None


class Progress:
    """Turns the finished share of a job into whole cells of a progress bar."""

    def __init__(self, total: int, advance: Callable[[int], object]) -> None:
        self.total = total
        self.advance = advance
        self.shown = 0

    def show(self, share: float) -> None:
        cells = int(self.total * share + 1e-9)
        self.advance(cells - self.shown)
        self.shown = cells


def check_nothing_attached(names: Sequence[str]) -> None:
    """Raises ValueError if there are hook points that something listens to."""
    if names:
        raise ValueError(
            f"hook functions or recorders are attached at {', '.join(names[:3])}{' …' * (len(names) > 3)}: the "
            "resuming engine skips parts of runs and cannot call them. Detach them, or use engine='naive'"
        )


def suits_a_joint_pass(sweep: Sweep) -> bool:
    """Whether a sweep can go through the layers together with the runs that it is about."""
    mixers = [block.mixer for block in sweep.model.blocks]
    one_device = len({mixer.A_log.device for mixer in mixers}) == 1
    launched = all(stages_class(mixer).are_launches and mixer.config.hidden_act in SILU for mixer in mixers)
    return one_device and launched and len(mixers) > 1 and all(spec.short in BY_STAGES for spec in sweep.specs)


def _check_fits(sweep: Sweep, limits: Limits) -> None:
    smallest = max(2 * row_bytes(sweep, sweep.length), 2 * recording_bytes(sweep))
    needed = 4 * (smallest + site_bytes(sweep))
    if needed > limits.total:
        raise ValueError(
            f"the smallest pass of this sweep (prompts of {sweep.length} tokens, {len(sweep.specs)} hooks) needs about "
            f"{needed / 1e9:.2f} GB, {limits.total / 1e9:.2f} GB are allowed: raise max_bytes=, sweep fewer hooks at "
            "once, or use shorter prompts"
        )


class _Read(NamedTuple):
    """What metrics read of a pass: sites, which of an example's reads it is, and the token of a tile; [m] each."""

    site: Int[Tensor, " m"]
    read: Int[Tensor, " m"]
    token: Int[Tensor, " m"]

    @property
    def keep(self) -> Int[Tensor, " n_keep"]:
        """All tokens that are read, ascending."""
        return self.token.unique()


def _tokens_read(sites: Sites, packing: Packing, reads: Int[Tensor, "batch n_reads"]) -> _Read:
    after = reads[sites.example] - sites.position[:, None]  # n, n_reads
    site, read = (after >= 0).nonzero(as_tuple=True)
    return _Read(site, read, torch.tensor(packing.starts)[after[site, read]] + site)


def _scatter(final: Float[Tensor, "cells columns batch n_reads d_model"], passed: _Passed, job: Job) -> None:
    """Put the rows' residual streams where they belong; what is read before a site stays as in the base run."""
    sites, read, hidden = passed.sites, passed.read, passed.hidden
    cell_place = {cell: i for i, cell in enumerate(job.cells)}
    cells = torch.tensor([cell_place[cell] for cell in passed.cells])
    columns = torch.tensor([job.columns.index(int(k)) for k in sites.column])[read.site]
    where = (cells[:, None], columns, sites.example[read.site], read.read)
    place = torch.searchsorted(read.keep, read.token).to(hidden.device, non_blocking=True)
    at = tuple(index.to(final.device, non_blocking=True) for index in where)
    final[at] = hidden[:, place].to(final)


def _tokens(sweep: Sweep, sites: Sites, packing: Packing) -> Int[Tensor, " tokens"]:
    """The base run's tokens from each site on, as they are packed."""
    examples, positions = sites.example[packing.rows], sites.position[packing.rows] + packing.positions
    device = sweep.base.device
    return sweep.base[examples.to(device, non_blocking=True), positions.to(device, non_blocking=True)]


def _changes(sweep: Sweep, cells: Sequence[int], sources: Sources, sites: Sites) -> dict[int, list[Changes]]:
    """The cells of a pass by layer and hook."""
    n_selections = len(sweep.selections)
    changes: dict[int, list[Changes]] = {}
    for (hook, layer), own in cells_by_place(sweep, cells).items():
        selections = [cell % n_selections for cell in own]
        point, source = sweep.point(sweep.specs[hook], layer), sources[hook, layer]
        changes.setdefault(layer, []).append(Changes(point, own, selections, source, sites))
    return changes
