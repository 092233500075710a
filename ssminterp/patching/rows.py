"""One pass of the resuming engine: all cells of some sites, from the place of the change to the end.

A change at layer l and position t leaves everything below l and before t as it was. So every row of a pass starts at
its own site, from the conv windows and states that the base run had there, and the batch grows with the layers. In its
own layer a changed row takes from the base row of its site whatever the change cannot reach:

    changed before the conv     the first d_conv positions are computed, the scan and what follows at all positions
    changed between and state   the state at the site is computed, the scan goes on from there
    changed after the state     the site alone: the rest of the row is the base row, up to the next layer's conv

The last layer is computed only where the metrics read. Position 0 of a row is always its site, and rows come in tiles
of n sites each, a tile for every cell, so that row r belongs to site r mod n.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookPoint
from ssminterp.models.hook_points import HookSpec
from ssminterp.patching.base_rows import BaseRows
from ssminterp.patching.compiled_stages import stages_of
from ssminterp.patching.moved import Place
from ssminterp.patching.request import Sweep
from ssminterp.patching.sites import Sites
from ssminterp.patching.stages import Past, ScanInputs, Stages, read, tiled
from ssminterp.patching.tiles import Pile, Rows

# Where a change takes hold in its own layer. All other hooks come after the state.
BEFORE_CONV = ("resid_pre", "mixer_in", "in_x")
BEFORE_STATE = ("conv_taps", "conv", "x", "delta", "B")
OF_STATE = ("A_bar", "B_bar", "state")


class Changes(NamedTuple):
    """What is changed at one hook of one layer: a tile of rows for each selection.

    cells: the number of each cell. selections: which selection of the sweep each is.
    source: [n, *features], the new values' source at each of the sites.
    """

    point: HookPoint
    cells: Sequence[int]
    selections: Sequence[int]
    source: Tensor
    sites: Sites

    @property
    def spec(self) -> HookSpec:
        return self.point.spec

    def applied(self, sweep: Sweep, now: Float[Tensor, "n *features"]) -> Float[Tensor, "rows *features"]:
        """The rows' new values at their sites."""
        now = now.expand(len(self.cells), *now.shape)
        source = self.source.expand_as(now)
        examples, columns = (index.repeat(len(self.cells)) for index in (self.sites.example, self.sites.column))
        place = Place(self.point, examples, columns)
        new = sweep.new_value(now.flatten(0, 1), source.flatten(0, 1), place).unflatten(0, now.shape[:2])
        mask = self._masks(sweep, now.device)
        return (new if mask is None else torch.where(mask, new, now)).flatten(0, 1)

    def _masks(self, sweep: Sweep, device: torch.device) -> Tensor | None:
        """[cells, 1, *features]: what each cell changes; None if all change everything."""
        selections = [sweep.selections[i] for i in self.selections]
        if all(selection.is_everything for selection in selections):
            return None
        masks = [selection.mask(self.spec, device) for selection in selections]
        return torch.stack(torch.broadcast_tensors(*masks))[:, None]


class _TakenIn(NamedTuple):
    """What some rows of a layer make of their residual stream up to the scan, [rows, pos, …]; gate where it is kept."""

    resid: Tensor
    mixer_in: Tensor
    in_x: Tensor
    gate: Tensor
    inputs: ScanInputs

    def of_base(self, n: int) -> _TakenIn:
        """The first n rows."""
        resid, mixer_in, in_x, gate = (tensor[:n] for tensor in self[:4])
        return _TakenIn(resid, mixer_in, in_x, gate, self.inputs.map(lambda tensor: tensor[:n]))


class _Fork(NamedTuple):
    """Rows that part from the base in a layer.

    gated: [rows, pos, d_inner], of the positions that the layer is computed at.
    resid_pre: [rows, d_model] at position 0, where it is no longer the base's.
    """

    cells: list[int]
    gated: Tensor
    resid_pre: Tensor | None = None


class _Layer:
    """One layer of a pass: where its changes part from the base, and what all rows make of it."""

    def __init__(self, sweep: Sweep, stages: Stages, groups: Sequence[Changes]) -> None:
        self.sweep = sweep
        self.stages = stages
        self.groups = groups
        self.site_is_kept = stages.keep is None or stages.keep[0] == 0

    def run(self, rows: Rows) -> Tensor | None:
        """Bring the rows behind the layer; with `keep`, [tiles, n, n_keep, d_model] of `rows.cells` comes back."""
        stages, n = self.stages, self.stages.n
        blocks = rows.used.split(stages.tiles_at_once(rows.suffix))
        first = self._taken_in(blocks[0])
        base = BaseRows(stages, *first.of_base(n))
        forks = [fork for fork in (self._before_conv(rows, base), self._up_to_state(base)) if fork is not None]
        local = self._after_state(base)
        if stages.keep is not None:
            return self._last(rows, blocks, first, forks, local)
        # Before the base rows go on: new tiles start from their residual stream.
        for fork in forks:
            self._grow(rows, fork)
        for i, block in enumerate(blocks):
            block += self._mixer_out(self._taken_in(block) if i else first).view_as(block)
        rows.first_cells, rows.first = local.cells, rows.first[:0] if local.tensor is None else local.tensor
        return None

    def _taken_in(self, block: Float[Tensor, "tiles n suffix d_model"]) -> _TakenIn:
        stages = self.stages
        resid = block.flatten(0, 1)
        mixer_in = stages.normed(resid)
        in_x, gate = stages.projected_where_read(mixer_in)
        return _TakenIn(resid, mixer_in, in_x, gate, stages.scan_inputs(stages.activated(in_x)))

    def _mixer_out(self, taken_in: _TakenIn) -> Float[Tensor, "rows n_keep d_model"]:
        return self.stages.out(self.stages.gated(taken_in.inputs, taken_in.gate))

    def _grow(self, rows: Rows, fork: _Fork) -> None:
        tiles = rows.added(fork.cells)
        if fork.resid_pre is not None:
            tiles[:, :, 0] = fork.resid_pre.reshape(tiles[:, :, 0].shape)
        tiles += self.stages.out(fork.gated).view_as(tiles)

    def _last(
        self, rows: Rows, blocks: Sequence[Tensor], first: _TakenIn, forks: Sequence[_Fork], local: Pile
    ) -> Float[Tensor, "tiles n n_keep d_model"]:
        parts = []
        for i, block in enumerate(blocks):
            before = block[:, :, self.stages.at]
            parts.append(before + self._mixer_out(self._taken_in(block) if i else first).view_as(before))
        base = blocks[0][0, :, self.stages.at]
        for fork in forks:
            tiles = base.repeat(len(fork.cells), 1, 1, 1)
            if fork.resid_pre is not None and self.site_is_kept:
                tiles[:, :, 0] = fork.resid_pre.reshape(tiles[:, :, 0].shape)
            parts.append(tiles + self.stages.out(fork.gated).view_as(tiles))
            rows.cells += fork.cells
        if local:
            tiles = parts[0][0].repeat(local.tiles, 1, 1, 1)
            tiles[:, :, 0] = local.tensor.reshape(tiles[:, :, 0].shape)  # type: ignore[union-attr]
            parts.append(tiles)
            rows.cells += local.cells
        return torch.cat(parts)

    def _of(self, *shorts: str) -> list[Changes]:
        return [group for group in self.groups if group.spec.short in shorts]

    def _changed(self, pile: Pile, base: BaseRows, *shorts: str) -> None:
        """Add the rows that are changed at some hooks of one stage."""
        for group in self._of(*shorts):
            pile.add(group.cells, group.applied(self.sweep, base.value(group.spec.short)))

    def _before_conv(self, rows: Rows, base: BaseRows) -> _Fork | None:
        """Changes that the conv carries on: what the previous layer changed at the site alone is one of them."""
        stages = self.stages
        pile = Pile(stages.n, rows.first_cells, rows.first)
        self._changed(pile, base, "resid_pre")
        resid, n_resid = pile.tensor, pile.tiles
        pile.map(stages.normed)
        self._changed(pile, base, "mixer_in")
        n_gates = pile.tiles
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
        reach = min(len(stages.taps), base.all_in_x.shape[1])
        in_x = torch.cat([pile.tensor[:, None], tiled(base.all_in_x[:, 1:reach], pile.tiles)], 1)
        early = stages.scan_inputs(stages.activated(in_x))
        first_gate = gates[0] if self.site_is_kept and n_gates else None
        first = torch.cat([resid, tiled(base.resid_pre, pile.tiles - n_resid)]) if n_resid < pile.tiles else resid
        return _Fork(pile.cells, stages.rejoined(early, first_gate, base.inputs, base.all_gate), first)

    def _up_to_state(self, base: BaseRows) -> _Fork | None:
        """Changes of what goes into the scan at the site, or of the state there: they go on through the state alone."""
        stages = self.stages
        conv = Pile(stages.n)
        for group in self._of("conv_taps"):
            conv.add(group.cells, stages.conv_of_taps(group.applied(self.sweep, base.conv_taps)))
        self._changed(conv, base, "conv")
        conv.map(stages.mixer.act)
        self._changed(conv, base, "x")
        steps: list[ScanInputs] = []
        cells = conv.cells
        if conv.tensor is not None:
            raw = stages.scan_inputs(conv.tensor[:, None])
            steps.append(raw._replace(delta=stages.delta(raw.delta), raw=False))
        here = ScanInputs(base.x[:, None], base.delta[:, None], base.B[:, None], base.C[:, None], raw=False)
        for group in self._of("delta", "B"):
            tiles = len(group.cells)
            new = group.applied(self.sweep, base.value(group.spec.short))[:, None]
            others = here.map(functools.partial(tiled, tiles=tiles))
            steps.append(others._replace(delta=new) if group.spec.short == "delta" else others._replace(B=new))
            cells = cells + list(group.cells)
        states = self._states(base)
        cells = cells + states.cells
        if not cells:
            return None
        step = ScanInputs.cat(steps, 0) if steps else None
        return _Fork(cells, stages.carried(step, states.tensor, base.inputs, base.all_gate))

    def _states(self, base: BaseRows) -> Pile:
        """The states at the sites where they, or what makes them from those before, are changed."""
        pile = Pile(self.stages.n)
        past, inflow = self.stages.past.state, base.x[..., None].float()
        for group in self._of(*OF_STATE):
            new = group.applied(self.sweep, base.value(group.spec.short))
            tiles = len(group.cells)
            if group.spec.short == "A_bar":
                new = new * tiled(past, tiles) + tiled(base.B_bar * inflow, tiles)
            elif group.spec.short == "B_bar":
                new = tiled(base.A_bar * past, tiles) + new * tiled(inflow, tiles)
            pile.add(group.cells, new)
        return pile

    def _after_state(self, base: BaseRows) -> Pile:
        """Changes that stay at the site in this layer: the residual stream there."""
        pile = Pile(self.stages.n)
        if not self.site_is_kept:
            return pile
        for group in self._of("C"):
            C = group.applied(self.sweep, base.C)
            pile.add(group.cells, read(tiled(base.state, len(group.cells)), C).to(base.x.dtype))
        self._changed(pile, base, "y")
        pile.map(lambda y: y + self.stages.D * tiled(base.x, pile.tiles))
        self._changed(pile, base, "ssm_out")
        pile.map(lambda ssm_out: ssm_out * F.silu(tiled(base.gate, pile.tiles)))
        for group in self._of("gate"):
            gate = group.applied(self.sweep, base.gate)
            pile.add(group.cells, tiled(base.ssm_out, len(group.cells)) * F.silu(gate))
        self._changed(pile, base, "gated")
        pile.map(self.stages.out)
        self._changed(pile, base, "mixer_out")
        pile.map(lambda mixer_out: tiled(base.resid_pre, pile.tiles) + mixer_out)
        self._changed(pile, base, "resid_post")
        return pile


def run_rows(
    sweep: Sweep,
    tokens: Int[Tensor, "n suffix"],
    pasts: Sequence[Past],
    changes: Mapping[int, Sequence[Changes]],
    keep: list[int],
) -> tuple[list[int], Float[Tensor, "cells n n_keep d_model"]]:
    """The residual stream of cells after the last layer at the positions `keep`, ascending, and the cells' numbers.

    Cells that cannot matter there are left out: those whose change stays at their site in the last layer.

    tokens: of the base run from each site on. pasts: of every layer. changes: by layer.
    """
    model = sweep.model
    embedded = model.lm.get_input_embeddings()(tokens)
    if model.lm.config.residual_in_fp32:
        embedded = embedded.float()
    rows = Rows(embedded, 1 + sum(len(group.cells) for groups in changes.values() for group in groups))
    for layer, past in enumerate(pasts):
        rows.hidden, rows.first = (tensor.to(past.state.device) for tensor in (rows.hidden, rows.first))
        last = layer == len(pasts) - 1
        groups = changes.get(layer, ())
        stages = stages_of(model.blocks[layer], past, keep if last else None)
        hidden = _Layer(sweep, stages, groups).run(rows)
        if hidden is not None:
            return rows.cells, hidden[1:]
    raise AssertionError("a model has at least one layer")
