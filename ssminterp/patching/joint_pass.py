"""The only pass of a small sweep on a GPU: whole runs and the rows of their sites go through the layers together.

There launches take longer than what they launch, and both need the same: so the tokens of both lie one behind the other
and share the matrix products. What a row goes on from, and what is put in, comes from the runs in the same layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.patching.changes import Changes, cells_by_place
from ssminterp.patching.records import wanted_at
from ssminterp.patching.request import Sweep
from ssminterp.patching.rows import Layer, TakenIn
from ssminterp.patching.sites import Places, Sites, Wanted
from ssminterp.patching.stage_runs import At, Held, Runs
from ssminterp.patching.stages import Past, embedded
from ssminterp.patching.tiles import Rows
from ssminterp.patching.triton_stages import TritonStages
from ssminterp_kernels.rows import Packing


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
    for layer in range(sweep.model.cfg.n_layers - 1):
        joint.through(layer)
    return joint.through_the_last(reads)


class _Joint:
    def __init__(self, sweep: Sweep, runs: Int[Tensor, "runs pos"], rows: Pass) -> None:
        self.sweep, self.sites, self.packing, self.keep = sweep, rows.sites, rows.packing, rows.keep
        self.runs = Runs(sweep.model, runs)
        self.places = cells_by_place(sweep, rows.cells)
        every = wanted_at(sweep, rows.sites, rows.cells, rows.sites.example + sweep.batch, rows.sites.example)
        n_layers = sweep.model.cfg.n_layers
        self.windows, self.states = every[:n_layers], every[n_layers : 2 * n_layers]
        self.sources = dict(zip(sorted(self.places), every[2 * n_layers :], strict=True))
        base = embedded(sweep.model, rows.tokens)
        n_tiles = 1 + len(rows.cells)
        # The runs' tokens, then those of the tiles.
        of_runs, self.n_run_tokens = self.runs.hidden[0], self.runs.packing.tokens
        self.hidden = base.new_empty(self.n_run_tokens + n_tiles * len(base), base.shape[1])
        self.hidden[: self.n_run_tokens] = of_runs
        self.runs.hidden = self.hidden[None, : self.n_run_tokens]
        self.rows = Rows(base, rows.packing.n, self._tiles(self.hidden[None]))

    def through(self, layer: int) -> None:
        """Bring runs and rows behind a layer, with new rows for its changes."""
        of_runs = self.runs.stages(layer)
        assert isinstance(of_runs, TritonStages)
        n = self.n_run_tokens
        hidden = self.hidden[None, : n + len(self.rows.used) * self.packing.tokens]
        mixer_in = of_runs.normed(hidden)
        in_x, gate = of_runs.projected(mixer_in)
        keys = [key for key in self.sources if key[1] == layer]
        source_states = [self.sources[key] for key in keys if self._short(key) == "state"]
        record = self.runs.record(of_runs, [self.states[layer], *source_states])
        assert record is not None
        window = self.runs.at(self.windows[layer].places).of_tokens(in_x[:, :n])
        past = Past(window.unflatten(0, (self.packing.n, -1)), of_runs.past.state)
        of_rows = TritonStages(of_runs.block, past, self.packing, of_runs.A)
        x, gated = (in_x.new_empty(in_x.shape) for _ in range(2))
        of_runs.activate_into(x[:, :n], in_x[:, :n])
        of_rows.activate_into(self._tiles(x), self._tiles(in_x))
        inputs = of_runs.scan_inputs(x)
        run_inputs, row_inputs = inputs.at(slice(n)), inputs.map(self._tiles)
        of_runs.gated(run_inputs, gate[:, :n], record.to_be_written, out=gated[:, :n])
        state, *states = record.given()
        of_rows.past = past._replace(state=state)  # which only now is there
        of_rows.gated(row_inputs, self._tiles(gate), out=self._tiles(gated))
        held = Held(of_runs, hidden[:, :n], mixer_in[:, :n], in_x[:, :n], gate[:, :n], run_inputs, gated[:, :n])
        sources = [
            states.pop(0) if self._short(key) == "state" else held.value(self._short(key), self._at(key))
            for key in keys
        ]
        of_tiles = [self._tiles(tensor) for tensor in (mixer_in, in_x, gate)]
        taken_in = TakenIn(self.rows.used, of_tiles[0], of_tiles[1], of_tiles[2], row_inputs)
        Layer(self.sweep, of_rows, self._changes(keys, sources)).branch(self.rows, taken_in)
        of_runs.add_out(hidden, gated, hidden)

    def through_the_last(
        self, reads: Places
    ) -> tuple[Float[Tensor, "m d_model"], list[int], Float[Tensor, "cells n_keep d_model"]]:
        """The last layer, where less is wanted of the rows than of the runs."""
        model = self.sweep.model
        layer = model.cfg.n_layers - 1
        keys = [key for key in self.sources if key[1] == layer]
        read = Wanted(model.hook_points[f"blocks.{layer}.hook_resid_post"], reads)
        wanted = [self.windows[layer], self.states[layer], read, *(self.sources[key] for key in keys)]
        window, state, residual, *sources = self.runs.through(layer, wanted)
        past = Past(window.unflatten(0, (self.packing.n, -1)), state)
        stages = TritonStages(model.blocks[layer], past, self.packing, self.runs.A[layer], self.keep)
        kept = Layer(self.sweep, stages, self._changes(keys, sources)).run(self.rows)
        assert kept is not None
        return residual, self.rows.cells, kept[1:]

    def _changes(self, keys: Sequence[tuple[int, int]], sources: Sequence[Tensor]) -> list[Changes]:
        sweep, n_selections = self.sweep, len(self.sweep.selections)
        changes = []
        for key, source in zip(keys, sources, strict=True):
            cells = self.places[key]
            selections = [cell % n_selections for cell in cells]
            changes.append(Changes(sweep.point(sweep.specs[key[0]], key[1]), cells, selections, source, self.sites))
        return changes

    def _tiles(self, tensor: Float[Tensor, "1 all_tokens width"]) -> Float[Tensor, "tiles tokens width"]:
        """The rows' part."""
        return tensor[0, self.n_run_tokens :].unflatten(0, (-1, self.packing.tokens))

    def _short(self, key: tuple[int, int]) -> str:
        return self.sweep.specs[key[0]].short

    def _at(self, key: tuple[int, int]) -> At:
        return self.runs.at(self.sources[key].places)
