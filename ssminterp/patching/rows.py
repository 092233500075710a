"""One pass of the resuming engine: all cells of some sites, from the place of the change to the end.

A change at layer l and position t leaves everything below l and before t as it was. So every row of a pass starts at
its own site, from the conv windows and states that the base run had there, and the batch grows with the layers. In its
own layer a changed row takes from the base row of its site whatever the change cannot reach:

    changed before the conv     the first d_conv positions are computed, the scan and what follows at all positions
    changed between and state   the state at the site is computed, the scan goes on from there
    changed after the state     the site alone: the rest of the row is the base row, up to the next layer's conv

The last layer is computed only where the metrics read. Rows come in tiles of n sites each, a tile for every cell, and
lie in a tile as `Packing` says: without padding, the sites themselves, position 0 of the rows, first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.patching.base_rows import BaseRows
from ssminterp.patching.changes import Changes
from ssminterp.patching.compiled_stages import stages_of
from ssminterp.patching.request import Sweep
from ssminterp.patching.stages import Past, ScanInputs, Stages, embedded, every_A, read
from ssminterp.patching.tiles import Pile, Rows
from ssminterp_kernels.rows import Packing

# Hooks whose changes make another state of the one before.
OF_STATE = ("A_bar", "B_bar", "state")


class TakenIn(NamedTuple):
    """What tiles make of their residual stream up to the scan, [tiles, tokens, …]; gate where it is kept."""

    resid: Tensor
    mixer_in: Tensor
    in_x: Tensor
    gate: Tensor
    inputs: ScanInputs

    def base_rows(self, stages: Stages) -> BaseRows:
        """The first tile."""
        inputs = self.inputs.map(lambda tensor: tensor[:1])
        return BaseRows(stages, self.resid, self.mixer_in, self.in_x, self.gate[:1], inputs)


class Fork(NamedTuple):
    """Rows that part from the base in a layer.

    gated: [tiles, tokens, d_inner], of the tokens that the layer is computed at.
    resid_pre: [tiles, n, d_model] at position 0, where it is no longer the base's.
    """

    cells: list[int]
    gated: Tensor
    resid_pre: Tensor | None = None


class Layer:
    """One layer of a pass: where its changes part from the base, and what all rows make of it."""

    def __init__(self, sweep: Sweep, stages: Stages, groups: Sequence[Changes]) -> None:
        self.sweep = sweep
        self.stages = stages
        self.groups = groups
        self.kept_sites = stages.kept_sites

    def run(self, rows: Rows) -> Tensor | None:
        """Bring the rows behind the layer; with `keep`, [tiles, n_keep, d_model] of `rows.cells` comes back."""
        stages = self.stages
        blocks = rows.used.split(stages.tiles_at_once())
        first = self._taken_in(blocks[0])
        forks, local = self.parted(rows, first.base_rows(stages))
        if stages.keep is not None:
            return self._last(rows, blocks, first, forks, local)
        self._grow(rows, forks, local)
        for i, block in enumerate(blocks):
            taken_in = self._taken_in(block) if i else first
            stages.add_out(block, stages.gated(taken_in.inputs, taken_in.gate), block)
        return None

    def parted(self, rows: Rows, base: BaseRows) -> tuple[list[Fork], Pile]:
        """The rows that part from the base rows in this layer, and those that differ from them behind it at their
        sites alone."""
        forks = [fork for fork in (self._before_conv(rows, base), self._up_to_state(base)) if fork is not None]
        return forks, self._after_state(base)

    def _grow(self, rows: Rows, forks: Sequence[Fork], local: Pile) -> None:
        """New tiles start from the base's residual stream before it goes on."""
        for fork in forks:
            tiles, base = rows.added(fork.cells), rows.hidden[:1]
            if fork.resid_pre is None:
                self.stages.add_out(base, fork.gated, tiles)
            else:
                tiles.copy_(base.expand_as(tiles))
                tiles[:, : self.stages.n] = fork.resid_pre
                self.stages.add_out(tiles, fork.gated, tiles)
        rows.put_first(local)

    def _taken_in(self, block: Float[Tensor, "tiles tokens d_model"]) -> TakenIn:
        stages = self.stages
        mixer_in = stages.normed(block)
        in_x, gate = stages.projected_where_read(mixer_in)
        return TakenIn(block, mixer_in, in_x, gate, stages.scan_inputs(stages.activated(in_x)))

    def _last(
        self, rows: Rows, blocks: Sequence[Tensor], first: TakenIn, forks: Sequence[Fork], local: Pile
    ) -> Float[Tensor, "tiles n_keep d_model"]:
        stages, kept = self.stages, self.kept_sites
        parts = []
        for i, block in enumerate(blocks):
            taken_in = self._taken_in(block) if i else first
            before = block[:, stages.at]
            parts.append(before + stages.out(stages.gated(taken_in.inputs, taken_in.gate)))
        for fork in forks:
            tiles = blocks[0][:1, stages.at].repeat(len(fork.cells), 1, 1)
            if fork.resid_pre is not None:
                tiles[:, : len(kept)] = fork.resid_pre[:, kept]
            parts.append(tiles + stages.out(fork.gated))
            rows.cells += fork.cells
        if local.tensor is not None:
            tiles = parts[0][:1].repeat(local.tiles, 1, 1)
            tiles[:, : len(kept)] = local.tensor[:, kept]
            parts.append(tiles)
            rows.cells += local.cells
        return torch.cat(parts)

    def _of(self, *shorts: str) -> list[Changes]:
        return [group for group in self.groups if group.spec.short in shorts]

    def _changed(self, pile: Pile, base: BaseRows, *shorts: str) -> None:
        """Add the rows that are changed at some hooks of one stage."""
        for group in self._of(*shorts):
            pile.add(group.cells, group.applied(self.sweep, base))

    def _before_conv(self, rows: Rows, base: BaseRows) -> Fork | None:
        """Changes that the conv carries on: what the previous layer changed at the site alone is one of them."""
        stages = self.stages
        pile = Pile(rows.first_cells, rows.first)
        self._changed(pile, base, "resid_pre")
        resid, n_resid = pile.tensor, pile.tiles
        pile.map(stages.normed)
        self._changed(pile, base, "mixer_in")
        gates: list[Tensor] = []

        def project(mixer_in: Tensor) -> Tensor:
            in_x, gate = stages.projected(mixer_in)
            gates.append(gate)
            return in_x

        pile.map(project)
        self._changed(pile, base, "in_x")
        if not pile:
            return None
        assert pile.tensor is not None
        assert resid is not None
        early = stages.scan_inputs(stages.activated_early(pile.tensor, base.all_in_x))
        first_gate = gates[0] if self.kept_sites and gates else None
        if n_resid < pile.tiles:
            resid = torch.cat([resid, base.resid_pre.expand(pile.tiles - n_resid, -1, -1)])
        return Fork(pile.cells, stages.rejoined(early, first_gate, base.inputs, base.all_gate), resid)

    def _up_to_state(self, base: BaseRows) -> Fork | None:
        """Changes of what goes into the scan at the site, or of the state there: they go on through the state alone."""
        stages, n = self.stages, self.stages.n
        conv = Pile()
        for group in self._of("conv_taps"):
            conv.add(group.cells, stages.conv_of_taps(group.applied(self.sweep, base)))
        self._changed(conv, base, "conv")
        conv.map(stages.mixer.act)
        self._changed(conv, base, "x")
        steps: list[ScanInputs] = []
        cells = conv.cells
        groups = self._of("delta", "B")
        raw = stages.are_launches and all(group.is_raw for group in groups if group.spec.short == "delta")
        if conv.tensor is not None:
            step = stages.scan_inputs(conv.tensor)
            steps.append(step if raw else step._replace(delta=stages.delta(step.delta), raw=False))
        for group in groups:
            new, here = group.applied(self.sweep, base), base.inputs.map(lambda tensor: tensor[:1, :n])
            if group.spec.short == "B":
                step = here._replace(B=new) if raw else here._replace(delta=base.delta[None], B=new, raw=False)
            else:
                step = here._replace(delta=stages.delta(new) if group.is_raw and not raw else new, raw=raw)
            steps.append(step.map(functools.partial(_on_tiles, tiles=len(group.cells))))
            cells = cells + list(group.cells)
        states = self._states(base)
        cells = cells + states.cells
        if not cells:
            return None
        whole = None if not steps else steps[0] if len(steps) == 1 else ScanInputs.cat(steps, 0)
        return Fork(cells, stages.carried(whole, states.tensor, base.inputs, base.all_gate))

    def _states(self, base: BaseRows) -> Pile:
        """The states at the sites where they, or what makes them from those before, are changed."""
        pile = Pile()
        past = self.stages.past.state
        for group in self._of(*OF_STATE):
            new = group.applied(self.sweep, base)
            if group.spec.short == "A_bar":
                new = new * past + base.inflow
            elif group.spec.short == "B_bar":
                new = base.A_bar * past + new * base.x[..., None].float()
            pile.add(group.cells, new)
        return pile

    def _after_state(self, base: BaseRows) -> Pile:
        """Changes that stay at the site in this layer: the residual stream there."""
        pile = Pile()
        if not self.kept_sites:
            return pile
        for group in self._of("C"):
            C = group.applied(self.sweep, base)
            pile.add(group.cells, read(base.state, C).to(base.x.dtype))
        self._changed(pile, base, "y")
        pile.map(lambda y: y + self.stages.D * base.x)
        self._changed(pile, base, "ssm_out")
        pile.map(lambda ssm_out: ssm_out * F.silu(base.gate))
        for group in self._of("gate"):
            gate = group.applied(self.sweep, base)
            pile.add(group.cells, base.ssm_out * F.silu(gate))
        self._changed(pile, base, "gated")
        pile.map(self.stages.out)
        self._changed(pile, base, "mixer_out")
        pile.map(lambda mixer_out: base.resid_pre + mixer_out)
        self._changed(pile, base, "resid_post")
        return pile


def _on_tiles(tensor: Float[Tensor, "some n width"], tiles: int) -> Float[Tensor, "tiles n width"]:
    return tensor.expand(tiles, -1, -1)


def run_rows(
    sweep: Sweep,
    tokens: Int[Tensor, " tokens"],
    packing: Packing,
    pasts: Sequence[Past],
    changes: Mapping[int, Sequence[Changes]],
    keep: list[int],
) -> tuple[list[int], Float[Tensor, "cells n_keep d_model"]]:
    """The numbers of cells, and their residual stream after the last layer at the tokens `keep` of a tile, ascending.

    Cells that cannot matter there are left out: those whose change stays at their site in the last layer.

    tokens: of the base run from each site on. packing: how they lie. pasts: of every layer. changes: by layer.
    """
    model = sweep.model
    base = embedded(model, tokens)
    n_tiles = 1 + sum(len(group.cells) for groups in changes.values() for group in groups)
    rows = Rows(base, packing.n, base.new_empty(n_tiles, *base.shape))
    decays = every_A(model)
    for layer, past in enumerate(pasts):
        rows.hidden, rows.first = (tensor.to(past.state.device) for tensor in (rows.hidden, rows.first))
        last = layer == len(pasts) - 1
        stages = stages_of(model.blocks[layer], past, packing, decays[layer], keep if last else None)
        hidden = Layer(sweep, stages, changes.get(layer, ())).run(rows)
        if hidden is not None:
            return rows.cells, hidden[1:]
    raise AssertionError("a model has at least one layer")
