"""The edges of the flow graph weighted by what patching each of them does.

An edge is patched by giving its receiver what it would get from its sender in the clean run, through this edge alone;
everything after the receiver is computed anew. All edges but those into x end in the residual stream, where this adds
a vector at one token: many edges of a layer run on from there as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu
from tqdm.auto import tqdm

from ssminterp.analysis.arrays import position_labels
from ssminterp.analysis.contributions import scan_pairs
from ssminterp.analysis.flow import flow_dataset
from ssminterp.analysis.pairs import Pairs
from ssminterp.analysis.runs import LayerScan, mixer_of, scan_hook_names, scan_of
from ssminterp.interventions import steer
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.metrics import Metric, Readout, checked
from ssminterp.patching.request import as_metrics, sweep_tokens

# Elements of logits that are held at once.
MAX_LOGITS = 2**26


class Edge(NamedTuple):
    """An edge's place in the variable `kind` of a flow, and what it adds at `position`.

    vector: to the residual stream before layer `depth` [batch, d_model], or for a conv edge to the conv of that layer
    [batch, d_inner].
    """

    kind: str
    place: tuple[int, ...]
    depth: int
    position: int
    vector: Tensor


@torch.no_grad()
def flow_patches(
    model: HookedMamba,
    clean: Input,
    corrupted: Input,
    metric: Metric,
    *,
    max_rows: int = 256,
    progress: bool = True,
) -> xr.Dataset:
    """How far patching each edge, by itself, from the clean into the corrupted run moves a metric.

    Unlike contributions these need not add up: two edges may each do the whole work, or only both together.

    clean, corrupted: texts, or tokens [batch, pos], of the same shape.
    metric: logits [batch, pos, vocab] to one number per example, [batch].
    max_rows: the most prompts that run as one batch, at least one pair's.

    Returns the variables of `flow_contributions` but bias: residual, conv, state, skip, node (the token's residual
    stream patched by itself) and total (clean minus corrupted), changes of the metric from the corrupted run. In a
    state edge the source's write, its decay and the target's C are the clean run's, the target's gate is the corrupted
    one's. Labels are the clean run's.

    About length²/2 runs a layer; edges whose senders are the same in both runs are 0 and not run.

    Raises ValueError for prompts of different shape, attached hooks, and a metric of another shape or NaN.
    """
    if any(point.is_listened_to for point in model.hook_points.values()):
        raise ValueError("hooks are attached to the model: edges are patched in parts of it run by themselves")
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    source, base = sweep_tokens(model, clean, corrupted)
    metrics = as_metrics(metric)
    if len(metrics) > 1:
        raise ValueError(f"edges have one weight: pass one metric, got {list(metrics)}")
    runner = _Runner(model, Readout.of(model, metrics, *base.shape), *_both(model, source, base), max_rows)
    ((name, function),) = metrics.items()
    start, goal = (checked(name, function(model(tokens)), len(base)).cpu() for tokens in (base, source))
    values = _zeros(model, *base.shape)
    depths = range(model.cfg.n_layers + 1)
    for depth in tqdm(depths, desc="patching edges", unit="layer", disable=not progress):
        for part in runner.batches([edge for edge in runner.edges(depth) if edge.vector.any()]):
            for edge, moved in zip(part, runner.measure(part), strict=True):
                values[edge.kind].movedim(0, -1)[edge.place] = moved.cpu() - start
    values["total"] = goal - start
    labels = position_labels(model, source)
    ends = runner.readout.reads.unique().tolist()
    end = labels[ends[0]] if len(ends) == 1 else ""
    return flow_dataset(model, values, labels, of=name, end=end, weights="patching effect")


def _both(model: HookedMamba, source: Tensor, base: Tensor) -> tuple[ActivationCache, ActivationCache]:
    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers] + [f"blocks.{layers[-1]}.hook_resid_post"]
    names += scan_hook_names(layers, ("x", "delta", "gate", "B", "C", "in_x"))
    return model.run_with_cache(source, names)[1], model.run_with_cache(base, names)[1]


def _zeros(model: HookedMamba, batch: int, length: int) -> dict[str, Tensor]:
    layers = model.cfg.n_layers
    shapes = {
        "residual": (layers, length),
        "conv": (layers, length, model.cfg.d_conv),
        "state": (layers, length, length),
        "skip": (layers, length),
        "node": (layers + 1, length),
    }
    return {kind: torch.zeros(batch, *shape) for kind, shape in shapes.items()}


@dataclass(frozen=True, eq=False)
class _Runner:
    """The two runs, and how edges between them are patched."""

    model: HookedMamba
    readout: Readout
    source: ActivationCache
    base: ActivationCache
    max_rows: int

    @property
    def _shape(self) -> tuple[int, int]:
        batch, length = self.base.tokens.shape
        return batch, length

    def _resid(self, cache: ActivationCache, depth: int) -> Float[Tensor, "batch pos d_model"]:
        last = self.model.cfg.n_layers
        return cache["resid_pre", depth] if depth < last else cache["resid_post", last - 1]

    def edges(self, depth: int) -> Iterator[Edge]:
        """The nodes after `depth` layers, and the edges of the next layer, with what they add to the corrupted run."""
        change = self._resid(self.source, depth) - self._resid(self.base, depth)
        for t in range(self._shape[1]):
            yield Edge("node", (depth, t), depth, t, change[:, t])
        if depth == self.model.cfg.n_layers:
            return
        for t in range(self._shape[1]):
            yield Edge("residual", (depth, t), depth + 1, t, change[:, t])
        yield from self._state_edges(depth)
        yield from self._conv_edges(depth)

    def _state_edges(self, layer: int) -> Iterator[Edge]:
        source, base = (scan_of(self.model, cache, layer) for cache in (self.source, self.base))
        for t in range(self._shape[1]):
            gate = silu(base.gate[:, t])
            read = _read_from_each(source, t) - _read_from_each(base, t)
            out = (read * gate[:, None]) @ base.out_weight.mT
            for s in range(t + 1):
                yield Edge("state", (layer, t, s), layer + 1, t, out[:, s])
            skipped = (source.D * (source.x[:, t] - base.x[:, t]) * gate) @ base.out_weight.mT
            yield Edge("skip", (layer, t), layer + 1, t, skipped)

    def _conv_edges(self, layer: int) -> Iterator[Edge]:
        change = self.source["in_x", layer] - self.base["in_x", layer]
        taps = mixer_of(self.model, layer).conv1d.weight[:, 0].detach()
        for t in range(self._shape[1]):
            for back in range(min(self.model.cfg.d_conv, t + 1)):
                yield Edge("conv", (layer, t, back), layer, t, change[:, t - back] * taps[:, -1 - back])

    def batches(self, edges: Sequence[Edge]) -> Iterator[list[Edge]]:
        """Edges that can run as one batch: those of one kind of receiver at one depth."""
        together: dict[tuple[bool, int], list[Edge]] = {}
        for edge in edges:
            together.setdefault((edge.kind == "conv", edge.depth), []).append(edge)
        size = max(1, self.max_rows // self._shape[0])
        for group in together.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def measure(self, edges: Sequence[Edge]) -> Float[Tensor, "edges batch"]:
        """The metric with each of the edges patched."""
        depth, into_conv = edges[0].depth, edges[0].kind == "conv"
        hidden = self._resid(self.base, depth).repeat(len(edges), 1, 1)
        vectors = torch.cat([edge.vector for edge in edges])[:, None]
        at = torch.tensor([edge.position for edge in edges]).repeat_interleave(self._shape[0])
        if into_conv:
            patched = [steer(f"blocks.{depth}.mixer.hook_conv", vectors, positions=at[:, None])]
        else:
            patched = []
            hidden[torch.arange(len(hidden)), at] += vectors[:, 0].to(hidden)
        with self.model.intervene(*patched):
            for block in self.model.blocks[depth:]:
                hidden = block(hidden)
        hidden = hidden.unflatten(0, (len(edges), -1))
        rows = torch.arange(hidden.shape[1], device=hidden.device)[:, None]
        reads = self.readout.reads.to(hidden.device)
        (measured,) = self.readout.values(hidden[:, rows, reads], MAX_LOGITS).values()
        return measured


def _read_from_each(scan: LayerScan, target: int) -> Float[Tensor, "batch n_sources d_inner"]:
    """What y at the target reads of each source up to it."""
    sources = range(target + 1)
    ones = torch.ones_like(scan.x[:, [target]])
    every = range(scan.x.shape[2])
    return scan_pairs(scan, every, [target], sources, ones, scan.delta * scan.x, Pairs.by_channel)[:, 0]
