"""Direct logit attribution: how each layer, source token or channel moves a logit, or a difference of two.

With the final norm's scale frozen at what it was in the run, a logit is linear in the residual stream, which is the sum
of the embedding and of what the layers added: the parts add up exactly.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", section "The residual stream".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from xarray import DataArray

from ssminterp.analysis.arrays import Coords, labelled, position_labels, resolve_indices, resolve_pairs
from ssminterp.analysis.contributions import contribution_values, pair_coords
from ssminterp.analysis.runs import Run, check_unchanged, effective_weight, mixer_of, recorded, scan_hook_names, scan_of
from ssminterp.analysis.unembedding import Token, norm_scale, token_ids, unembedding
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.positions import Positions, resolve_positions


@torch.no_grad()
def logit_direction(
    model: HookedMamba, run: Run, answer: Token, instead: Token | None = None, positions: Positions = -1
) -> Float[Tensor, "batch n_positions d_model"]:
    """The direction of the residual stream that is the logit of `answer` (minus that of `instead`) at each position.

    The product with the residual stream after the last layer is the logit itself; it is linear, the final norm's scale
    being that of the run. For `token_contributions(…, to=direction, targets=positions)`.

    answer, instead: an id, the text of one token, or a list with one for each example.

    Raises ValueError for tokens that do not exist or are the same, and positions out of range.
    """
    cache = recorded(model, run, [_last_resid(model)])
    batch, length = cache.tokens.shape
    at = list(resolve_positions(positions, length) or ())
    resid = cache[_last_resid(model)][:, at]
    ids = token_ids(model, answer, batch)
    against = None if instead is None else token_ids(model, instead, batch)
    same = [] if against is None else (ids == against).nonzero().flatten().tolist()
    if same:
        raise ValueError(
            f"answer and instead are the same token in examples {same[:5]}: no direction leads between them"
        )
    difference = unembedding(model, resid, ids.tolist())
    if against is not None:
        difference = difference - unembedding(model, resid, against.tolist())
    return difference[:, None] * norm_scale(model, resid)


@torch.no_grad()
def attribute_to_layers(
    model: HookedMamba, run: Run, answer: Token, instead: Token | None = None, *, positions: Positions = -1
) -> DataArray:
    """What the embedding and each layer add to a logit or logit difference: dims (batch, position, component).

    component is "embed", "0", "1", …; their sum is the logit (difference) of the run, up to rounding.

    run: a text, several, tokens, or a cache with hook_embed, every hook_mixer_out and the last hook_resid_post.
    answer, instead: an id, the text of one token, or a list with one for each example.

    Raises ValueError for tokens that do not exist, positions out of range, and a run in which hooks changed the
    residual stream between the layers, so that it is no sum of these parts.
    """
    names = ["hook_embed", *(f"blocks.{layer}.hook_mixer_out" for layer in range(model.cfg.n_layers))]
    cache = recorded(model, run, [*names, _last_resid(model)])
    direction = logit_direction(model, cache, answer, instead, positions)
    at = list(resolve_positions(positions, cache.tokens.shape[1]) or ())
    parts = torch.stack([(cache[name][:, at].to(direction) * direction).sum(-1) for name in names], dim=-1)
    total = (cache[_last_resid(model)][:, at].to(direction) * direction).sum(-1)
    _check_adds_up(parts, total, model.cfg.dtype)
    coords: Coords = {
        "batch": cache.tokens.shape[0],
        "position": position_labels(model, cache.tokens, at),
        "component": ["embed", *map(str, range(model.cfg.n_layers))],
    }
    return labelled(parts, model, coords, "attribution", of=described(model, answer, instead))


@torch.no_grad()
def attribute_to_channels(
    model: HookedMamba,
    run: Run,
    answer: Token,
    instead: Token | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = -1,
) -> DataArray:
    """What each channel of each layer adds to a logit or logit difference: dims (batch, layer, position, channel).

    Summed over channels this is what `attribute_to_layers` gives the layer, without out_proj's bias.

    run: a text, several, tokens, or a cache with the layers' hook_gated and the last hook_resid_post.
    answer, instead: an id, the text of one token, or a list with one for each example.

    Raises ValueError for layers or tokens that do not exist and positions out of range.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    cache = recorded(model, run, [*scan_hook_names(chosen, ["gated"]), _last_resid(model)])
    direction = logit_direction(model, cache, answer, instead, positions)
    at = list(resolve_positions(positions, cache.tokens.shape[1]) or ())
    rows = []
    for layer in chosen:
        gated = cache["gated", layer]
        weight = effective_weight(mixer_of(model, layer).out_proj, gated.to(model.cfg.dtype)).to(direction)
        rows.append((gated[:, at].to(direction) * (direction @ weight)).cpu())
    coords: Coords = {
        "batch": cache.tokens.shape[0],
        "layer": chosen,
        "position": position_labels(model, cache.tokens, at),
        "channel": model.cfg.d_inner,
    }
    return labelled(torch.stack(rows, dim=1), model, coords, "attribution", of=described(model, answer, instead))


@torch.no_grad()
def attribute_to_sources(
    model: HookedMamba,
    run: Run,
    answer: Token,
    instead: Token | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    channels: int | Sequence[int] | None = None,
    targets: Positions = -1,
    sources: Positions | None = None,
) -> DataArray:
    """What each source token adds, through each layer's state, to a logit (difference) at each target.

    Returns dims (batch, layer, target, source). What goes round the state, through D, counts for the target itself.
    Summed over all sources this is what `attribute_to_layers` gives the layer, without out_proj's bias.

    run: a text, several, tokens, or a cache with the layers' x, delta, gate, B, C and the last hook_resid_post.
    answer, instead: an id, the text of one token, or a list with one for each example.
    channels: through which; None means all. sources: None means all up to the last target.

    Raises ValueError for layers, channels, positions or tokens that do not exist, a source after every target, and a
    run whose state is changed by hooks.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    kept = resolve_indices("channels", channels, model.cfg.d_inner)
    if not isinstance(run, ActivationCache):
        check_unchanged(model, chosen)
    cache = recorded(model, run, [*scan_hook_names(chosen), _last_resid(model)])
    to, since = resolve_pairs(targets, sources, cache.tokens.shape[1])
    direction = logit_direction(model, cache, answer, instead, list(to))
    rows = [
        contribution_values(scan_of(model, cache, layer), direction, kept, to, since, skip=True).cpu()
        for layer in chosen
    ]
    batch, *pair = pair_coords(model, cache.tokens, to, since).items()
    coords: Coords = dict([batch, ("layer", chosen), *pair])
    return labelled(torch.stack(rows, dim=1), model, coords, "attribution", of=described(model, answer, instead))


def described(model: HookedMamba, answer: Token, instead: Token | None) -> str:
    """ "logit of Mary - John", for titles."""

    def text(token: Token) -> str:
        if not isinstance(token, str | int) and len(token) == 1:
            (token,) = token.tolist() if isinstance(token, Tensor) else token
        if isinstance(token, str):
            return token.strip()
        if isinstance(token, int):
            return str(token) if model.tokenizer is None else model.to_str_tokens(torch.tensor([token]))[0].strip()
        return "the example's token"

    return f"logit of {text(answer)}" + ("" if instead is None else f" - {text(instead)}")


def _last_resid(model: HookedMamba) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def _check_adds_up(parts: Tensor, total: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if the parts do not sum to the total beyond rounding."""
    tolerance = 1e-3 if dtype.itemsize >= 4 else 5e-2
    off = (parts.sum(-1) - total).abs() / parts.abs().sum(-1).clamp(min=1e-12)
    if float(off.max()) > tolerance:
        raise ValueError(
            f"the embedding and the layers sum to {parts.sum(-1).flatten().tolist()}, the logits come from "
            f"{total.flatten().tolist()}: hook functions changed the residual stream between the layers, attribute a "
            "run without them"
        )
