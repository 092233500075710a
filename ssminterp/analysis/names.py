"""What a token leaves at a hook, averaged over contexts.

Source: Ensign & Garriga-Alonso 2024, "Investigating the Indirect Object Identification circuit in Mamba",
arXiv:2407.14008: the conv moves a name one position on, so its average `hook_x` is taken at its next position. What the
averages can do is in `ssminterp.analysis.substitution`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from xarray import DataArray

from ssminterp.analysis.activations import activations_at, feature_dims, layer_groups, places_of
from ssminterp.analysis.arrays import Coords, labelled, resolve_indices
from ssminterp.analysis.runs import Run
from ssminterp.models import HookedMamba
from ssminterp.patching.columns import Column, SweepPositions
from ssminterp.patching.request import sweep_specs


@torch.no_grad()
def token_averages(
    model: HookedMamba,
    run: Run,
    positions: SweepPositions,
    hook: str = "x",
    *,
    layers: int | Sequence[int] | None = None,
    offset: int = 1,
    progress: bool = True,
) -> DataArray:
    """The average of a hook for every token that stands at a position: dims (layer, position, token, channel, …).

    run: texts, tokens, or a cache with the hooks: prompts in which different tokens stand at the positions.
    positions: where the tokens stand: positions, or {role: positions [batch]} like `TaskBatch.roles`.
    hook: a short name. layers: which ones; None means all.
    offset: how many tokens later the hook is read; the conv has moved the name by one.

    token is labelled by the token's text; the coordinate `token_id` holds its id, `count` (position, token) over how
    many examples the average goes. A token that never stands at a position has NaN there.

    Raises ValueError for hooks, layers, positions or roles that do not exist, and places after the last position.
    """
    (spec,) = sweep_specs(model, hook)
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    tokens, columns = places_of(model, run, positions)
    at = tokens_at(tokens, columns)
    ids, of_example = at.unique(return_inverse=True)
    counts = torch.stack([torch.bincount(row, minlength=len(ids)) for row in of_example])
    values = []
    with tqdm(total=len(chosen), desc="averaging", unit="layer", disable=not progress) as bar:
        for group in layer_groups(model, [spec], chosen, columns):
            for found in activations_at(model, run, [spec.name(layer) for layer in group], columns, offset).values():
                values.append(_means(found, of_example, counts))
                bar.update()
    features = dict(zip(feature_dims(spec), values[0].shape[2:], strict=True))
    names = token_texts(model, ids.tolist())
    coords: Coords = {"layer": chosen, "position": [c.label for c in columns], "token": names, **features}
    averages = labelled(torch.stack(values), model, coords, "token_average", hook=spec.short, offset=offset)
    of_token = {"token_id": ("token", ids.numpy()), "count": (("position", "token"), counts.numpy())}
    return averages.assign_coords(of_token)


def _means(
    found: Float[Tensor, "column batch *features"],
    of_example: Int[Tensor, "column batch"],
    counts: Int[Tensor, "column token"],
) -> Float[Tensor, "column token *features"]:
    """The mean over the examples of every token; NaN for a token that no example has."""
    sums = found.new_zeros(*counts.shape, *found.shape[2:])
    for total, row, values in zip(sums, of_example, found, strict=True):
        total.index_add_(0, row, values)
    return sums / counts.reshape(*counts.shape, *(1,) * (found.dim() - 2))


def tokens_at(tokens: Int[Tensor, "batch pos"], columns: Sequence[Column]) -> Int[Tensor, "column batch"]:
    """The token that stands at each column's place."""
    return torch.stack([tokens.cpu()[torch.arange(len(tokens)), column.positions] for column in columns])


def token_texts(model: HookedMamba, ids: Sequence[int]) -> list[str]:
    """The texts of tokens, with their ids where two texts would be the same."""
    if model.tokenizer is None:
        return [str(token) for token in ids]
    texts = [text.strip() for text in model.to_str_tokens(torch.tensor([list(ids)]))]
    return [text if texts.count(text) == 1 else f"{text} ({token})" for text, token in zip(texts, ids, strict=True)]
