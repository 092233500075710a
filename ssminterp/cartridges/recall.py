"""Does a cartridge answer a bare question, and which of its layers are needed?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.analysis.answers import answer_table
from ssminterp.analysis.unembedding import Token, token_ids
from ssminterp.cartridges.algebra import blank
from ssminterp.models import HookedMamba, ModelState
from ssminterp.tasks import TaskBatch
from ssminterp.versions import versions

# Which layers of the cartridge are put in, for the layer that a column stands for.
SWAPS = {
    "only this layer": lambda layer, n: [layer],
    "this layer and those before": lambda layer, n: list(range(layer + 1)),
    "this layer and those after": lambda layer, n: list(range(layer, n)),
    "all but this layer": lambda layer, n: [i for i in range(n) if i != layer],
}


@torch.no_grad()
def accuracy_by_layers(
    model: HookedMamba,
    batch: TaskBatch,
    question: Int[Tensor, " batch"],
    *,
    base: Literal["nothing", "corrupted"] = "nothing",
    metric: str = "top1",
) -> xr.Dataset:
    """Answers to bare questions with all layers of a cartridge, with some of them, and without one.

    Every clean prompt is cut where its question begins. What comes before is read into a cartridge; the question is
    then asked of a state in which some layers, conv windows and SSM states alike, are the cartridge's.

    question: the position [batch] of the question's first token. base: what the other layers hold: nothing, or what
        the corrupted prompt's text leaves there. metric: as in `TaskBatch.metric`, of those that need no baselines.

    Returns `moved` (swap, layer, example), the metric with the swapped layers, and `baseline` (run, example): the
    base alone ("without the cartridge"), "the whole cartridge", and "the text in one piece".

    Raises ValueError for a question that does not lie inside its prompt, with some text before it, and for an unknown
    base or metric.

    >>> from ssminterp import HookedMamba
    >>> from ssminterp.tasks import make_task
    >>> model = HookedMamba.from_pretrained("tiny-mamba", device="cpu")
    >>> batch = make_task("key_value", model.tokenizer, n=8)       # "Given red: tiger, … . Now iron:"
    >>> recall = accuracy_by_layers(model, batch, batch.role("query") - 1)
    >>> recall["baseline"].mean("example").values.round().tolist()
    [0.0, 1.0, 1.0]
    """
    if base not in ("nothing", "corrupted"):
        raise ValueError(f"base must be 'nothing' or 'corrupted', got {base!r}")
    n_layers, size = model.cfg.n_layers, len(batch)
    moved = np.zeros((len(SWAPS), n_layers, size))
    baseline = np.zeros((3, size))
    for rows, start in _alike(batch, question):
        part = batch[rows]
        asked = _Asked(model, part, start, metric)
        cartridge = model.read(part.clean[:, :start], progress=False)
        other = blank(cartridge) if base == "nothing" else model.read(part.corrupted[:, :start], progress=False)
        baseline[:, rows] = [asked.of(other), asked.of(cartridge), asked.of(None)]
        for i, chosen in enumerate(SWAPS.values()):
            for layer in range(n_layers):
                layers = chosen(layer, n_layers)
                moved[i, layer, rows] = asked.of(other.swap(cartridge, layers) if layers else other)
    attrs = {"task": batch.task, "metric": metric, "base": base, "model": model.cfg.model_name} | versions()
    return xr.Dataset(
        {"moved": (("swap", "layer", "example"), moved), "baseline": (("run", "example"), baseline)},
        coords={
            "swap": list(SWAPS),
            "layer": np.arange(n_layers),
            "example": np.arange(size),
            "run": ["without the cartridge", "the whole cartridge", "the text in one piece"],
        },
        attrs=attrs,
    )


@torch.no_grad()
def answers(model: HookedMamba, question: str, states: Mapping[str, ModelState | None], k: int = 4) -> xr.DataArray:
    """What comes after a question, asked of several states: probabilities, dims (run, token).

    states: by name; None means nothing read before. k: so many of the best tokens of every run are among the tokens,
        which are ordered by their largest probability in any run. The coordinate `id` is the token's.

    Raises ValueError for a question without tokens, states of another model, no states, and k out of the vocabulary.

    >>> model = HookedMamba.from_pretrained("tiny-mamba", device="cpu")
    >>> state = model.read("Given red: tiger, iron: lamp.")
    >>> answers(model, "Now iron:", {"with it": state, "without": None}).sel(run="with it").idxmax("token").item()
    'lamp'
    """
    return answer_table(model, {run: model(question, state=state)[0, -1] for run, state in states.items()}, k, question)


@torch.no_grad()
def answer_by_layers(
    model: HookedMamba,
    question: str,
    cartridge: ModelState,
    base: ModelState | None = None,
    answer: Token | None = None,
) -> xr.Dataset:
    """How probable one answer is with all layers of a cartridge, with some of them, and without it.

    cartridge, base: states of one example. base: what the other layers hold; None means nothing.
    answer: a token; None means the one that is most probable with the whole cartridge.

    Returns what `accuracy_by_layers` does, for one example; the attribute `metric` names the answer.

    Raises ValueError for states of another model or of several examples, and for an answer that is no token.
    """
    other = blank(cartridge) if base is None else base

    def probabilities(state: ModelState) -> Tensor:
        return model(question, state=state)[0, -1].float().softmax(-1)

    whole = probabilities(cartridge)
    (token,) = token_ids(model, int(whole.argmax()) if answer is None else answer, 1).tolist()
    n_layers = model.cfg.n_layers
    moved = [
        [[float(probabilities(other.swap(cartridge, chosen(layer, n_layers)))[token])] for layer in range(n_layers)]
        for chosen in SWAPS.values()
    ]
    text = str(token) if model.tokenizer is None else model.to_str_tokens(torch.tensor([token]))[0].strip()
    attrs = {
        "task": f"“{question}”",
        "metric": f"probability of “{text}”",
        "base": "nothing" if base is None else "another cartridge",
        "model": model.cfg.model_name,
    }
    return xr.Dataset(
        {
            "moved": (("swap", "layer", "example"), np.array(moved)),
            "baseline": (("run", "example"), [[float(probabilities(other)[token])], [float(whole[token])]]),
        },
        coords={
            "swap": list(SWAPS),
            "layer": np.arange(n_layers),
            "example": [0],
            "run": ["without the cartridge", "the whole cartridge"],
        },
        attrs=attrs | versions(),
    )


class _Asked:
    """The question of prompts that are equally long and cut at the same position."""

    def __init__(self, model: HookedMamba, batch: TaskBatch, start: int, metric: str) -> None:
        self.model = model
        self.batch = batch
        self.question = batch.clean[:, start:]
        end = batch.role("end")
        self.whole = batch.metric(metric)
        self.bare = replace(batch, roles={"end": end - start}).metric(metric)

    def of(self, state: ModelState | None) -> Float[np.ndarray, " batch"]:
        """The metric of the answers: after `state`, or in the whole prompt."""
        if state is None:
            return self.whole(self.model(self.batch.clean)).cpu().numpy()
        return self.bare(self.model(self.question, state=state)).cpu().numpy()


def _alike(batch: TaskBatch, question: Int[Tensor, " batch"]) -> Iterator[tuple[list[int], int]]:
    """Examples of one length whose questions begin at one position, and that position."""
    starts = torch.as_tensor(question).tolist()
    lengths = batch.lengths.tolist()
    if len(starts) != len(lengths):
        raise ValueError(f"question names {len(starts)} positions for a batch of {len(lengths)}")
    outside = [(i, s) for i, (s, length) in enumerate(zip(starts, lengths, strict=True)) if not 0 < s < length]
    if outside:
        raise ValueError(
            f"the question of example {outside[0][0]} begins at position {outside[0][1]}, which must lie inside its "
            f"prompt of {lengths[outside[0][0]]} tokens, with some text before it"
        )
    for kind in sorted(set(zip(lengths, starts, strict=True))):
        yield [i for i, own in enumerate(zip(lengths, starts, strict=True)) if own == kind], kind[1]
