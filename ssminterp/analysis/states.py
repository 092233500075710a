"""The state itself: how large it is at each token, what it holds at one, and where two texts begin to leave traces.

Source of the state's equations: Gu & Dao 2023, arXiv:2312.00752, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.analysis.arrays import Coords, labelled, position_labels, provenance, resolve_indices
from ssminterp.analysis.lenses import state_lens, top_tokens
from ssminterp.analysis.runs import (
    LayerScan,
    Run,
    check_unchanged,
    layer_scan,
    recorded,
    scan_hook_names,
    scan_of,
    states_of,
)
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.positions import Positions, resolve_positions
from ssminterp_kernels.selective_scan import selective_scan

# Elements of the states that are held at once: 32 MB in float32.
CHUNK_ELEMENTS = 2**23


@torch.no_grad()
def state_norms(model: HookedMamba, run: Run, layers: int | Sequence[int] | None = None) -> xr.DataArray:
    """‖h_t‖ over channels and coordinates: dims (batch, layer, position). States are made in chunks and not kept.

    run: a text, several, tokens, or a cache with the layers' x, delta, gate, B and C.

    Raises ValueError for layers that do not exist, and a run whose state is changed by hooks.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    cache = _scans_recorded(model, run, chosen)
    norms = [
        torch.cat([states.flatten(2).norm(dim=-1) for states in _state_chunks(scan_of(model, cache, layer))], 1).cpu()
        for layer in chosen
    ]
    labels = position_labels(model, cache.tokens)
    coords: Coords = {"batch": cache.tokens.shape[0], "layer": chosen, "position": labels}
    return labelled(torch.stack(norms, 1), model, coords, "state_norm")


@torch.no_grad()
def states_at(model: HookedMamba, run: Run, layer: int, positions: Positions = -1) -> xr.DataArray:
    """The states of a layer after chosen tokens: dims (batch, position, channel, coordinate).

    run: a text, several, tokens, or a cache with the layer's x, delta, gate, B and C.

    Raises ValueError for a layer or positions that do not exist, and a run whose state is changed by hooks.
    """
    scan, cache = layer_scan(model, run, layer)
    at = list(resolve_positions(positions, cache.tokens.shape[1]) or ())
    coords: Coords = {
        "batch": cache.tokens.shape[0],
        "position": position_labels(model, cache.tokens, at),
        "channel": model.cfg.d_inner,
        "coordinate": model.cfg.d_state,
    }
    return labelled(states_of(scan, at), model, coords, "state", layer=layer)


@torch.no_grad()
def state_words(
    model: HookedMamba, run: Run, position: int = -1, *, read_at: int | None = None, k: int = 8
) -> xr.Dataset:
    """The words that every layer's state after one token comes closest to: dims (batch, layer, rank).

    The best `k` tokens of `state_lens`, layer by layer: token, id, logit, and probability among the whole vocabulary.
    read_at: whose C, gate and norm read it; None means the position's own.

    run: a text, several, tokens, or a cache with every layer's x, delta, gate, B, C and the last hook_resid_post.

    Raises ValueError for positions that do not exist, more tokens than there are, and hooks that change states.
    """
    layers = range(model.cfg.n_layers)
    if not isinstance(run, ActivationCache):
        check_unchanged(model, layers)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    cache = recorded(model, run, [*scan_hook_names(layers), last])
    found = [top_tokens(model, state_lens(model, cache, layer, position, read_at=read_at), k) for layer in layers]
    words = xr.concat([one.isel(position=0) for one in found], xr.IndexVariable("layer", list(layers)))
    del words.attrs["layer"]
    return words.transpose("batch", "layer", "rank")


@torch.no_grad()
def compare_states(
    model: HookedMamba, first: Input, second: Input, layers: int | Sequence[int] | None = None
) -> xr.Dataset:
    """The states of two texts beside each other, token by token: dims (layer, position).

    norm_first, norm_second: ‖h_t‖. distance: ‖h_t - h'_t‖ over the mean of the two norms; 0 where they are the same.
    Only as many positions as the shorter text has. The attribute `parts_at` is the first position whose tokens
    differ; it is that number where the texts are the same so far.

    Raises ValueError for layers that do not exist, more than one text on a side, and hooks that change states.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    caches = [_scans_recorded(model, text, chosen) for text in (first, second)]
    if any(cache.tokens.shape[0] != 1 for cache in caches):
        raise ValueError(f"two texts are compared, got {[cache.tokens.shape[0] for cache in caches]}: pass one a side")
    length = min(cache.tokens.shape[1] for cache in caches)
    tokens = torch.cat([cache.tokens[:, :length].cpu() for cache in caches])
    rows: dict[str, list[Tensor]] = {"norm_first": [], "norm_second": [], "distance": []}
    for layer in chosen:
        one, other = (_shortened(scan_of(model, cache, layer), length) for cache in caches)
        parts = []
        for a, b in zip(_state_chunks(one), _state_chunks(other), strict=True):
            parts.append(torch.stack([s.flatten(2).norm(dim=-1)[0] for s in (a, b, a - b)]))
        norm_first, norm_second, apart = torch.cat(parts, 1).cpu()
        rows["norm_first"].append(norm_first)
        rows["norm_second"].append(norm_second)
        rows["distance"].append(apart / ((norm_first + norm_second) / 2).clamp(min=torch.finfo(apart.dtype).tiny))
    coords: Coords = {"layer": chosen, "position": position_labels(model, tokens)}
    arrays = {name: labelled(torch.stack(values), model, coords, name) for name, values in rows.items()}
    return xr.Dataset(arrays, attrs={"parts_at": parting(tokens), **provenance(model)})


def parting(tokens: Int[Tensor, "2 pos"]) -> int:
    """The first position at which two texts differ; their length if they do not."""
    differs = (tokens[0] != tokens[1]).nonzero()
    return int(differs[0]) if len(differs) else tokens.shape[1]


def _scans_recorded(model: HookedMamba, run: Run, layers: Sequence[int]) -> ActivationCache:
    if not isinstance(run, ActivationCache):
        check_unchanged(model, layers)
    return recorded(model, run, scan_hook_names(layers))


def _shortened(scan: LayerScan, length: int) -> LayerScan:
    x, delta, gate, B, C = (values[:, :length] for values in (scan.x, scan.delta, scan.gate, scan.B, scan.C))
    return LayerScan(x, delta, gate, scan.A, B, C, scan.D, scan.out_weight)


def _state_chunks(scan: LayerScan) -> Iterator[Float[Tensor, "batch n_positions d_inner d_state"]]:
    """All states in order, a bounded number at a time."""
    batch, length, d_inner = scan.x.shape
    size = max(1, CHUNK_ELEMENTS // (batch * d_inner * scan.A.shape[1]))
    state = None
    for start in range(0, length, size):
        span = slice(start, start + size)
        x, delta, B, C = (values[:, span] for values in (scan.x, scan.delta, scan.B, scan.C))
        out = selective_scan(x, delta, scan.A, B, C, initial_state=state, states="all")
        assert out.states is not None
        state = out.final_state
        yield out.states
