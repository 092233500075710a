"""The only pass of a small sweep on a GPU: whole runs and the rows of their sites go through the layers together.

There launches take longer than what they launch, and both need the same: so the tokens of both lie one behind the other
and share the matrix products, the conv, the scan and the norm. What a row goes on from, and what is put in, comes from
the runs in the same layer: the scan of a row waits for that of the runs, in the same launch, and makes patches of the
state, Δ and B itself. Where the residual stream is patched before a layer, a tile is forked when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models.install import is_watched
from ssminterp.models.mixers.mamba1 import weights_at_hand
from ssminterp.models.norm import FusedRMSNorm
from ssminterp.patching.base_rows import BaseRows
from ssminterp.patching.changes import Changes, cells_by_place
from ssminterp.patching.joint_table import Table
from ssminterp.patching.products import is_plain, linear
from ssminterp.patching.records import wanted_at
from ssminterp.patching.request import Sweep
from ssminterp.patching.rows import Layer
from ssminterp.patching.sites import Places, Sites
from ssminterp.patching.stage_runs import At, Held, Record, Runs
from ssminterp.patching.stages import Past, ScanInputs, embedded, token_index
from ssminterp.patching.tiles import Rows
from ssminterp.patching.triton_stages import Room, TritonStages, scan_inputs_of_tokens
from ssminterp_kernels.residual import add, add_and_norm, norm
from ssminterp_kernels.rows import Packing
from ssminterp_kernels.rows.triton_joint import Fork, JointScan
from ssminterp_kernels.rows.triton_stages import conv_tokens

# Hooks whose changes take in what the conv does before the sites.
_OF_WINDOWS = ("mixer_in", "in_x", "conv_taps", "conv")
# Hooks whose patches the scan itself can make.
_FORKS = {"state": Fork.STATE, "delta": Fork.DELTA, "B": Fork.B}


class Pass(NamedTuple):
    """The rows of a pass, before it.

    cells: their numbers. sites, packing: where rows begin, and how they lie. tokens: of the base run from each site on.
    keep: the tokens of a tile, ascending, whose residual stream is wanted after the last layer.
    """

    cells: Sequence[int]
    sites: Sites
    packing: Packing
    tokens: Int[Tensor, " tokens"]
    keep: list[int]


def run_jointly(
    sweep: Sweep, runs: Int[Tensor, "runs pos"], rows: Pass, reads: Places
) -> tuple[Float[Tensor, "m d_model"], list[int], Float[Tensor, "cells n_keep d_model"]]:
    """The runs' residual stream after the last layer where it is read; numbers of cells, and theirs at `keep`.

    runs: the source prompts, then the base prompts.
    """
    joint = _Joint(sweep, runs, rows)
    for layer in range(sweep.model.cfg.n_layers):
        joint.through(layer)
    return joint.read(reads)


class _Joint:
    """hidden: residual streams before the present layer and room for those behind it, [tokens, d_model], the runs'
    first; normed: their norm."""

    def __init__(self, sweep: Sweep, runs: Int[Tensor, "runs pos"], rows: Pass) -> None:
        self.sweep, self.sites, self.packing, self.keep = sweep, rows.sites, rows.packing, rows.keep
        self.runs = Runs(sweep.model, runs)
        self.blocks = list(sweep.model.blocks)
        self.places = cells_by_place(sweep, rows.cells)
        every = wanted_at(sweep, rows.sites, rows.cells, rows.sites.example + sweep.batch, rows.sites.example)
        n_layers = sweep.model.cfg.n_layers
        self.windows, self.states = every[:n_layers], every[n_layers : 2 * n_layers]
        self.sources = dict(zip(sorted(self.places), every[2 * n_layers :], strict=True))
        # The cells that patch the residual stream before a layer: their tiles go through it as a whole.
        self.whole: dict[int, list[int]] = {}
        self.keys: dict[int, list[tuple[int, int]]] = {}
        self.is_plain_patch = sweep.intervention == "patch" and all(s.is_everything for s in sweep.selections)
        for key in self.sources:
            if self.is_plain_patch and self._short(key) == "resid_pre":
                self.whole[key[1]] = self.places[key]
            else:
                self.keys.setdefault(key[1], []).append(key)
        self.n_shared = self.runs.packing.tokens
        self.table = Table(sweep, rows.sites, rows.packing, self.n_shared)
        self.records: dict[tuple[int, ...], tuple[Record, Tensor]] = {}
        base = embedded(sweep.model, rows.tokens)
        of_runs = self.runs.hidden[0]
        n_tokens = self.n_shared + (1 + len(rows.cells)) * len(base)
        cfg, n_runs, device = sweep.model.cfg, self.runs.packing.n, base.device
        self.scan = JointScan(rows.packing, n_runs, self.runs.packing.longest, cfg.d_inner, device)
        self.hidden = base.new_empty(n_tokens, base.shape[1])
        self.behind = torch.empty_like(self.hidden)
        whole = self.whole.get(0, [])
        start = torch.cat([of_runs, base])
        if whole:
            start = torch.cat([start, start.index_select(0, self.table.forks(0, len(whole)).origins)])
        self.hidden[: len(start)] = start
        self.rows = Rows(base, rows.packing.n, self.hidden[self.n_shared :].unflatten(0, (-1, len(base))))
        self.rows.cells += whole
        self.normed = self._norm_before(0, start)

    def _norm_before(self, layer: int, hidden: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        block = self.blocks[layer]
        if _is_plain_norm(block.norm):
            return norm(hidden, block.norm.weight, block.norm.variance_epsilon)
        return block.norm(hidden.to(block.norm.weight.dtype))

    def through(self, layer: int) -> None:
        """Bring runs and rows behind a layer, with new rows for its changes and the next one's."""
        mixer, n_tile = self.blocks[layer].mixer, self.packing.tokens
        in_x, gate = linear(mixer.in_proj, self.normed).chunk(2, dim=-1)
        with weights_at_hand(mixer.conv1d):
            taps, conv_bias = mixer.conv1d.weight[:, 0].T, mixer.conv1d.bias
        x = conv_tokens(in_x, self.table.earlier, n_tile, taps, conv_bias, silu=True)
        inputs = scan_inputs_of_tokens(mixer, x)
        keys = self.keys.get(layer, ())
        forks, cells = self._forks_of_the_scan(keys)
        n_old, n_forks = len(x), len(self.rows.first_cells) + sum(len(self.places[key]) for key in keys)
        room = torch.empty(n_old + n_forks * n_tile, x.shape[1], dtype=x.dtype, device=x.device)
        record, sites = self._record(layer, keys)
        with weights_at_hand(mixer):
            A, D = self.runs.A[layer], mixer.D
            A = mixer.A() if A is None else A
        bias = mixer.dt_proj.bias if is_plain(mixer.dt_proj) else None
        self.scan(
            inputs.x, inputs.delta, A, inputs.B, inputs.C, D, gate, bias, record.to_be_written, sites, forks, room
        )
        prepared = 0
        if n_forks > len(forks):
            cells, prepared = self._parted(layer, keys, in_x, gate, inputs, room, record)
        self._write(layer, room, cells, prepared, n_old)

    def _forks_of_the_scan(self, keys: Sequence[tuple[int, int]]) -> tuple[tuple[Fork, ...], list[int]]:
        """What the scan itself makes of a layer's changes, and their cells: of all of them or none."""
        if self.rows.first_cells or not self.is_plain_patch or any(self._short(key) not in _FORKS for key in keys):
            return (), []
        cells = [self.places[key] for key in keys]
        return (
            tuple(_FORKS[self._short(key)] for key, own in zip(keys, cells, strict=True) for _ in own),
            [cell for own in cells for cell in own],
        )

    def _parted(
        self,
        layer: int,
        keys: Sequence[tuple[int, int]],
        in_x: Float[Tensor, "tokens d_inner"],
        gate: Float[Tensor, "tokens d_inner"],
        inputs: ScanInputs,
        room: Float[Tensor, "tokens_and_forks d_inner"],
        record: Record,
    ) -> tuple[list[int], int]:
        """Put what the layer makes of its changes behind the tokens; their cells, the first of which go on from
        residual streams of their own, and how many these are."""
        n_old = len(in_x)
        of_runs = TritonStages(self.blocks[layer], self.runs.past(in_x.device), self.runs.packing, self.runs.A[layer])
        state, *states = record.given()
        of_rows = of_runs.of_rows(Past(self._window(layer, keys, in_x), state), self.packing, Room(room, n_old))
        resid, normed, run_in_x, run_gate, run_gated = map(self._of_runs, (self.hidden, self.normed, in_x, gate, room))
        held = Held(of_runs, resid, normed, run_in_x, run_gate, inputs.map(self._of_runs), run_gated)
        changes = self._changes(keys, [self._source(held, key, states) for key in keys])
        resid, normed, row_in_x, row_gate = map(self._tiles, (self.hidden, self.normed, in_x, gate))
        base = BaseRows(of_rows, resid, normed, row_in_x, row_gate[:1], inputs.map(self._tiles))
        parted, local = Layer(self.sweep, of_rows, changes).parted(self.rows, base)
        cells: list[int] = []
        prepared = 0
        for fork in parted:
            cells += fork.cells
            if fork.resid_pre is not None:
                prepared = len(fork.cells)
                self._prepare(n_old, fork.resid_pre)
        self.rows.put_first(local)
        return cells, prepared

    def _prepare(self, n_old: int, resid_pre: Float[Tensor, "tiles n d_model"]) -> None:
        """Put the residual streams of forks that differ from the base's there behind the others."""
        tiles = self.hidden[n_old : n_old + len(resid_pre) * self.packing.tokens].unflatten(0, (len(resid_pre), -1))
        tiles.copy_(self.hidden[self.n_shared : self.n_shared + self.packing.tokens].expand_as(tiles))
        tiles[:, : self.packing.n] = resid_pre

    def _write(self, layer: int, gated: Tensor, forks: list[int], prepared: int, n_old: int) -> None:
        """Go on with the residual streams behind a layer: `prepared` of the forks have their own before it."""
        tokens = self.packing.tokens
        whole = self.whole.get(layer + 1, [])
        n_given, own = n_old + len(forks) * tokens, len(forks) - prepared
        n_before, n_all = n_old + prepared * tokens, n_given + len(whole) * tokens
        mixer = self.blocks[layer].mixer
        added = linear(mixer.out_proj, gated[:n_given])
        into, after = self.behind[:n_all], self.blocks[layer + 1].norm if layer + 1 < len(self.blocks) else None
        split = self.table.forks(own, len(whole)) if own or whole else None
        if _is_plain_norm(after):
            weight, epsilon = after.weight, after.variance_epsilon
            self.normed = add_and_norm(self.hidden[:n_before], added, weight, epsilon, into, split)
        else:
            add(self.hidden[:n_before], added, into, split)
            self.normed = into if after is None else self._norm_before(layer + 1, into)
        self.rows.cells += forks + whole
        self.hidden, self.behind = self.behind, self.hidden

    def _window(self, layer: int, keys: Sequence[tuple[int, int]], in_x: Float[Tensor, "tokens d_inner"]) -> Tensor:
        """What the conv takes in before the sites; nothing where no change of the layer needs it."""
        if not self.rows.first_cells and not any(self._short(key) in (*_OF_WINDOWS, "resid_pre") for key in keys):
            return in_x[:0]
        window = self.runs.at(self.windows[layer].places).of_tokens(in_x[None, : self.n_shared])
        return window.unflatten(0, (self.packing.n, -1))

    def _record(self, layer: int, keys: Sequence[tuple[int, int]]) -> tuple[Record, Int[Tensor, "n 3"]]:
        """What the runs' scan writes down, and of every row what it finds there, as `JointScan` takes it: the same
        memory for all layers, which read it before the next one writes."""
        sources = [self.sources[key].places for key in keys if self._short(key) == "state"]
        wanted = self.states[layer].places, *sources
        known = tuple(map(id, wanted))
        if known not in self.records:
            record = self.runs.record_at(wanted, self.hidden.device)
            of_source = self.sites.position * self.runs.packing.n + self.sites.example
            sites = torch.stack([record.wanted.places[0], record.wanted.places[-1], of_source], dim=1).int()
            self.records[known] = record, sites.to(self.hidden.device, non_blocking=True)
        return self.records[known]

    def _source(self, held: Held, key: tuple[int, int], states: list[Tensor]) -> Tensor:
        short = self._short(key)
        if short == "state":
            return states.pop(0)
        at = self._at(key)
        return at.of_tokens(held.inputs.delta) if self._is_raw(key) else held.value(short, at)

    def _is_raw(self, key: tuple[int, int]) -> bool:
        """Whether what Δ is made of can be patched in its place, which spares to make it."""
        return self.is_plain_patch and self._short(key) == "delta"

    def read(self, reads: Places) -> tuple[Tensor, list[int], Float[Tensor, "cells n_keep d_model"]]:
        """After the last layer: the runs' residual stream at `reads`, the cells, and theirs at the tokens of `keep`."""
        residual = self.runs.at(reads).of_tokens(self._of_runs(self.hidden))
        tiles = self._tiles(self.hidden)[:, token_index(self.keep, self.hidden.device)]
        cells, first = self.rows.first_cells, self.rows.first
        if not cells:
            return residual, self.rows.cells, tiles[1:]
        kept_sites = [token for token in self.keep if token < self.packing.n]
        local = tiles[:1].repeat(len(cells), 1, 1)
        local[:, : len(kept_sites)] = first[:, kept_sites]
        return residual, self.rows.cells + cells, torch.cat([tiles[1:], local])

    def _changes(self, keys: Sequence[tuple[int, int]], sources: Sequence[Tensor]) -> list[Changes]:
        sweep, n_selections = self.sweep, len(self.sweep.selections)
        changes = []
        for key, source in zip(keys, sources, strict=True):
            cells = self.places[key]
            selections = [cell % n_selections for cell in cells]
            point = sweep.point(sweep.specs[key[0]], key[1])
            changes.append(Changes(point, cells, selections, source, self.sites, self._is_raw(key)))
        return changes

    def _of_runs(self, tensor: Float[Tensor, "all_tokens width"]) -> Float[Tensor, "1 tokens width"]:
        """The runs' part, as one tile."""
        n, width = self.n_shared, tensor.shape[1]
        return tensor.as_strided((1, n, width), (0, *tensor.stride()))

    def _tiles(self, tensor: Float[Tensor, "all_tokens width"]) -> Float[Tensor, "tiles tokens width"]:
        """The rows' part."""
        n, tokens, (step, one) = self.n_shared, self.packing.tokens, tensor.stride()
        shape = (len(self.rows.cells) + 1, tokens, tensor.shape[1])
        return tensor.as_strided(shape, (tokens * step, step, one), tensor.storage_offset() + n * step)

    def _short(self, key: tuple[int, int]) -> str:
        return self.sweep.specs[key[0]].short

    def _at(self, key: tuple[int, int]) -> At:
        return self.runs.at(self.sources[key].places)


def _is_plain_norm(module: Any) -> TypeGuard[FusedRMSNorm]:
    return type(module) is FusedRMSNorm and not is_watched(module)
