"""What a model answers, beside what it answers when something is done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.analysis.arrays import position_labels, provenance
from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input, Intervention
from ssminterp.positions import resolve_positions


@torch.no_grad()
def intervened_answers(
    model: HookedMamba, text: Input, runs: Mapping[str, Sequence[Intervention]], k: int = 4, *, position: int = -1
) -> xr.DataArray:
    """What comes after a text in several runs, each with its interventions: probabilities, dims (run, token).

    runs: interventions by the name of the run; an empty list is the run as it is.
    k: so many of the best tokens of every run are among the tokens, which are ordered by their largest probability in
        any run. The coordinate `id` is the token's. position: after which token.

    Raises ValueError for several texts, no runs, a position that does not exist, k out of the vocabulary, and what the
    interventions refuse.

    >>> from ssminterp.interventions import knockout
    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> text = "Then, Shelby and Emma had fun at the school. Shelby gave an apple to"
    >>> cut = knockout(2, sources=4, targets=15)            # "to" must not read "Emma" from the state of layer 2
    >>> found = intervened_answers(model, text, {"as it is": [], "cut": [cut]})
    >>> found.sel(token="Emma").values.round(2)
    array([1., 0.], dtype=float32)
    """
    tokens, at = _one_text(model, text, position)
    rows = {}
    for name, interventions in runs.items():
        with model.intervene(*interventions):
            rows[name] = model(tokens)[0, at]
    return answer_table(model, rows, k, position_labels(model, tokens, at)[0])


def answer_table(
    model: HookedMamba, logits: Mapping[str, Float[Tensor, " vocab"]], k: int, question: str
) -> xr.DataArray:
    """The probabilities of the best `k` tokens of every run, in all runs: dims (run, token).

    logits: by run. question: what they come after. Raises ValueError for no runs, and k out of the vocabulary.
    """
    if not logits or not 0 < k <= model.cfg.vocab:
        raise ValueError(f"at least one run and 1 to {model.cfg.vocab} tokens are needed, got {len(logits)} and k={k}")
    probabilities = torch.stack([row.detach().float().softmax(-1).cpu() for row in logits.values()])
    ids = probabilities.topk(k).indices.unique()
    ids = ids[probabilities[:, ids].amax(0).argsort(descending=True, stable=True)]
    texts = [str(int(i)) if model.tokenizer is None else model.to_str_tokens(i[None])[0].strip() for i in ids]
    labels = [text if texts.count(text) == 1 else f"{text} ({int(i)})" for text, i in zip(texts, ids, strict=True)]
    coords = {"run": list(logits), "token": labels, "id": ("token", ids.numpy())}
    attrs = {"question": question} | provenance(model)
    return xr.DataArray(probabilities[:, ids].numpy(), coords, ("run", "token"), name="probability", attrs=attrs)


@torch.no_grad()
def likely_pair(model: HookedMamba, text: Input, position: int = -1) -> tuple[int, int]:
    """The most probable next token, and the most probable other one among the text's own tokens so far.

    Where the text holds no other token, the second most probable of all. For questions like "why Emma and not Shelby?"
    when nobody has said what the answer competes with.

    Raises ValueError for several texts, and a position that does not exist.
    """
    tokens, at = _one_text(model, text, position)
    logits = model(tokens)[0, at]
    best, second = logits.topk(2).indices.tolist()
    others = [int(i) for i in tokens[0, : at + 1].unique() if int(i) != best]
    return best, max(others, key=lambda i: float(logits[i])) if others else second


def _one_text(model: HookedMamba, text: Input, position: int) -> tuple[Int[Tensor, "one pos"], int]:
    tokens = torch.atleast_2d(text) if isinstance(text, Tensor) else model.to_tokens(text)
    if tokens.shape[0] != 1:
        raise ValueError(f"one text is answered at a time, got {tokens.shape[0]}")
    (at,) = resolve_positions(position, tokens.shape[1]) or ()
    return tokens, at
