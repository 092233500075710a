"""What the residual stream, and what the state, would say if they were all there is: projections on the vocabulary.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens", for the residual stream; for the state, the layer's
own way out (C, D, the gate, out_proj) comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from einops import einsum
from torch.nn.functional import silu

from ssminterp.analysis.arrays import Coords, labelled, position_labels, resolve_indices
from ssminterp.analysis.runs import Run, check_unchanged, recorded, scan_hook_names, scan_of, states_of
from ssminterp.analysis.unembedding import check_vocab, norm_scale, unembedding
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.models.memory import free_bytes
from ssminterp.positions import Positions, resolve_positions


@torch.no_grad()
def logit_lens(
    model: HookedMamba,
    run: Run,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions | None = None,
    vocab: Sequence[int] | None = None,
) -> xr.DataArray:
    """The logits if the model ended after each layer: dims (batch, layer, position, vocab).

    layer is "embed" (before the first layer) and then "0", "1", …; the last layer's are the model's logits.

    run: a text, several, tokens, or a cache with blocks.0.hook_resid_pre and the layers' hook_resid_post.
    layers: None means all, and "embed" before them. vocab: the ids of the tokens to return; None means all.

    Raises ValueError for layers, positions or tokens that do not exist, and for a result that does not fit in memory.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    names = [f"blocks.{layer}.hook_resid_post" for layer in chosen]
    rows = [str(layer) for layer in chosen]
    if layers is None:
        names, rows = ["blocks.0.hook_resid_pre", *names], ["embed", *rows]
    ids = check_vocab(model, vocab)
    cache = recorded(model, run, names)
    batch, length = cache.tokens.shape
    at = list(resolve_positions(slice(None) if positions is None else positions, length) or ())
    _check_fits(batch, len(rows), len(at), len(ids))
    values = torch.empty(batch, len(rows), len(at), len(ids))
    weight = unembedding(model, cache[names[-1]], vocab)
    for row, name in enumerate(names):
        resid = cache[name][:, at].to(weight)
        values[:, row] = (resid * norm_scale(model, resid)) @ weight.mT
    coords: Coords = {
        "batch": batch,
        "layer": rows,
        "position": position_labels(model, cache.tokens, at),
        "vocab": ids,
    }
    return labelled(values, model, coords, "logit_lens")


@torch.no_grad()
def lens_summary(model: HookedMamba, run: Run, k: int = 10, max_logits: int = 50_000_000) -> xr.Dataset:
    """`top_tokens` of the logit lens at every layer and position, without holding the logits of all of them at once.

    run: as for `logit_lens`. max_logits: how many to hold at once, but those of one position.

    Raises ValueError for what `logit_lens` and `top_tokens` refuse.
    """
    names = ["blocks.0.hook_resid_pre"] + [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    cache = recorded(model, run, names)
    batch, length = cache.tokens.shape
    step = max(1, max_logits // (batch * len(names) * model.cfg.vocab))
    parts = [
        top_tokens(model, logit_lens(model, cache, positions=range(start, min(start + step, length))), k)
        for start in range(0, length, step)
    ]
    return xr.concat(parts, dim="position", combine_attrs="override")


@torch.no_grad()
def state_lens(
    model: HookedMamba,
    run: Run,
    layer: int,
    positions: Positions = -1,
    *,
    read_at: int | None = None,
    skip: bool = False,
    vocab: Sequence[int] | None = None,
) -> xr.DataArray:
    """What a layer's state at each position adds to the logits, read out by C: dims (batch, position, vocab).

    C, the gate and the scale of the final norm are those of the position itself, or of `read_at`: what would the token
    there read if the state were the one of `positions`? Nothing decays in between. The scale being frozen, this is in
    units of logits: with `skip`, at its own position, it is the layer's exact direct contribution (without out_proj's
    bias).

    run: a text, several, tokens, or a cache with the layer's x, delta, gate, B, C and the last layer's hook_resid_post.
    skip: add D·x of the reading position. vocab: the ids of the tokens to return; None means all.

    Raises ValueError for a layer, positions or tokens that do not exist, and a run whose state is changed by hooks.
    """
    model.check_layers([layer])
    ids = check_vocab(model, vocab)
    if not isinstance(run, ActivationCache):
        check_unchanged(model, [layer])
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    cache = recorded(model, run, [*scan_hook_names([layer]), last])
    scan = scan_of(model, cache, layer)
    length = cache.tokens.shape[1]
    at = list(resolve_positions(positions, length) or ())
    reading = at if read_at is None else list(resolve_positions(read_at, length) or ()) * len(at)
    states = states_of(scan, at)
    ssm_out = einsum(scan.C[:, reading], states, "batch p d_state, batch p d_inner d_state -> batch p d_inner")
    if skip:
        ssm_out = ssm_out + scan.D * scan.x[:, reading]
    out = (ssm_out * silu(scan.gate[:, reading])) @ scan.out_weight.mT
    resid = cache[last][:, reading].to(out.device)
    values = (out * norm_scale(model, resid)).float() @ unembedding(model, resid, vocab).mT
    labels = position_labels(model, cache.tokens, at)
    coords: Coords = {"batch": cache.tokens.shape[0], "position": labels, "vocab": ids}
    reader = "its own position" if read_at is None else position_labels(model, cache.tokens, read_at)[0]
    return labelled(values, model, coords, "state_lens", layer=layer, read_at=reader, skip=int(skip))


def _check_fits(batch: int, n_layers: int, n_positions: int, n_vocab: int) -> None:
    needed, free = 4 * batch * n_layers * n_positions * n_vocab, free_bytes(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"batch {batch} × {n_layers} layers × {n_positions} positions × {n_vocab} tokens need "
            f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: pass positions=, layers= or vocab="
        )


def top_tokens(model: HookedMamba, lens: xr.DataArray, k: int = 5) -> xr.Dataset:
    """The tokens with the highest logits of a lens: its dims with rank instead of vocab.

    token: its text, or its id where the model has no tokenizer. logit: of the lens. probability: softmax over the
    tokens that the lens holds; for a state lens, which is only a part of the logits, not a prediction.

    Raises ValueError if the array has no dim vocab, or fewer than k tokens.
    """
    if "vocab" not in lens.dims:
        raise ValueError(f"the array has dims {lens.dims}, none of them is vocab: pass what a lens returned")
    if not 0 < k <= lens.sizes["vocab"]:
        raise ValueError(f"k={k} tokens were asked for, the lens holds {lens.sizes['vocab']}")
    logits = lens.transpose(..., "vocab")
    values, order = torch.from_numpy(logits.values).topk(k, dim=-1)
    probabilities = torch.from_numpy(logits.values).softmax(-1).gather(-1, order)
    ids = logits["vocab"].values[order.numpy()]
    texts = {
        i: str(i) if model.tokenizer is None else model.to_str_tokens(torch.tensor([i]))[0] for i in np.unique(ids)
    }
    dims = [*logits.dims[:-1], "rank"]
    return xr.Dataset(
        {
            "token": (dims, np.vectorize(texts.__getitem__, otypes=[object])(ids).astype(str)),
            "id": (dims, ids),
            "logit": (dims, values.numpy()),
            "probability": (dims, probabilities.numpy()),
        },
        coords={str(dim): logits[dim] for dim in logits.dims[:-1]} | {"rank": np.arange(1, k + 1)},
        attrs=lens.attrs | {"lens": str(lens.name)},
    )
