"""Whether a model answers as if a token were another one when only its average at a hook is exchanged.

Source: Ensign & Garriga-Alonso 2024, arXiv:2407.14008, as in `ssminterp.analysis.names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from xarray import DataArray, Dataset

from ssminterp.analysis.activations import places_of
from ssminterp.analysis.arrays import provenance
from ssminterp.analysis.names import token_texts, tokens_at
from ssminterp.analysis.unembedding import Token, token_ids
from ssminterp.interventions import steer
from ssminterp.models import HookedMamba, Intervention
from ssminterp.models.hooked_mamba import Input
from ssminterp.patching.columns import Column, SweepPositions
from ssminterp.patching.request import sweep_specs
from ssminterp.positions import resolve_positions


@torch.no_grad()
def substitution_test(
    model: HookedMamba,
    prompts: Input,
    averages: DataArray,
    positions: SweepPositions,
    *,
    new: Token | None = None,
    ends: int | Int[Tensor, " batch"] = -1,
    among: Literal["averaged", "vocab"] = "averaged",
    seed: int = 0,
    reduce: Literal["mean"] | None = "mean",
    progress: bool = True,
) -> Dataset:
    """Does the answer change as if the token were another one, when only its average at a hook is exchanged?

    At every layer and position of the averages, in turn, the average of the token that stands there is subtracted and
    that of the new token added: dims (layer, position[, example]).

    prompts: texts, or tokens [batch, pos], best not those that were averaged.
    averages: from `token_averages`; they say hook, layers and offset. positions: where the tokens stand, the columns
        the averages have, or some of them.
    new: the new token, or one for each example. None: for each example one of the averaged tokens, drawn by `seed`
        among those that its prompt does not hold.
    ends: where the answer is read, one position or one for each example.
    among: the answer is the best of the averaged tokens ("averaged"), or of all tokens ("vocab").

    Variables, shares of examples, or for each with reduce=None: `becomes_new`, the answer is the new token;
    `as_if_replaced`, it is what the model answers when the token itself is replaced in the prompt; `changes`, it is
    another than before; and `logit_diff`, that of the new token over the old one, beside `logit_diff_before`. Over
    (position[, example]): `replaced_becomes_new`, the share when the token itself is replaced.

    Raises ValueError for columns or tokens that have no average, new tokens that do not exist, and positions out of
    range.
    """
    if among not in ("averaged", "vocab"):
        raise ValueError(f"among must be 'averaged' or 'vocab', got {among!r}")
    if reduce not in ("mean", None):
        raise ValueError(f"reduce must be 'mean' or None, got {reduce!r}")
    test = _Test.of(model, prompts, averages, positions, new, ends, among, seed)
    layers, n_columns, batch = averages["layer"].values.tolist(), len(test.columns), len(test.tokens)
    names = ("becomes_new", "as_if_replaced", "changes", "logit_diff")
    values = {name: np.empty((len(layers), n_columns, batch), dtype=np.float32) for name in names}
    of_column = {
        name: np.empty((n_columns, batch), dtype=np.float32) for name in ("replaced_becomes_new", "logit_diff_before")
    }
    before = test.logits(test.tokens)
    answers_before = test.answers(before)
    with tqdm(total=len(layers) * n_columns, desc="substituting", disable=not progress) as bar:
        for k in range(n_columns):
            replaced = test.answers(test.logits(test.with_new(k)))
            of_column["replaced_becomes_new"][k] = replaced == test.new[k]
            of_column["logit_diff_before"][k] = test.difference(before, k)
            for j, layer in enumerate(layers):
                with model.intervene(test.exchange(layer, k)):
                    logits = test.logits(test.tokens)
                answers = test.answers(logits)
                values["becomes_new"][j, k] = answers == test.new[k]
                values["as_if_replaced"][j, k] = answers == replaced
                values["changes"][j, k] = answers != answers_before
                values["logit_diff"][j, k] = test.difference(logits, k)
                bar.update()
    dims = ("layer", "position", "example")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {name: (dims, value) for name, value in values.items()}
    variables |= {name: (dims[1:], value) for name, value in of_column.items()}
    coords = {"layer": layers, "position": [column.label for column in test.columns], "example": np.arange(batch)}
    about = {"hook": averages.attrs["hook"], "offset": averages.attrs["offset"], "among": among, "examples": batch}
    found = Dataset(variables, coords=coords, attrs=about | provenance(model))
    return found.mean("example", keep_attrs=True) if reduce == "mean" else found


@dataclass(frozen=True, eq=False)
class _Test:
    """The prompts of a substitution test with the old and the new token of every column and example.

    rows: of the averages' position axis, one for each column. candidates: ids of the averaged tokens, None for all.
    """

    model: HookedMamba
    averages: DataArray
    tokens: Int[Tensor, "batch pos"]
    columns: list[Column]
    rows: list[int]
    old: Int[Tensor, "column batch"]
    new: Int[Tensor, "column batch"]
    ends: Int[Tensor, " batch"]
    candidates: Int[Tensor, " token"] | None

    @classmethod
    def of(
        cls,
        model: HookedMamba,
        prompts: Input,
        averages: DataArray,
        positions: SweepPositions,
        new: Token | None,
        ends: int | Tensor,
        among: str,
        seed: int,
    ) -> _Test:
        """Raises ValueError for what does not fit the model, the prompts or the averages."""
        if averages.attrs["model"] != model.cfg.model_name:
            raise ValueError(f"the averages are of {averages.attrs['model']}, the model is {model.cfg.model_name}")
        model.check_layers(averages["layer"].values.tolist())
        tokens, columns = places_of(model, prompts, positions)
        tokens = tokens.cpu()
        rows = _rows_of(columns, averages, by_name=isinstance(positions, Mapping))
        old = tokens_at(tokens, columns)
        ids = torch.from_numpy(averages["token_id"].values)
        known = torch.from_numpy(averages["count"].values[rows]) > 0
        _check_averaged(model, old, ids, known, columns, "stands")
        if new is None:
            chosen = _other_tokens(tokens, ids, known, columns, seed)
        else:
            chosen = token_ids(model, new, len(tokens)).expand(len(columns), -1)
        _check_averaged(model, chosen, ids, known, columns, "is to stand")
        if (chosen == old).any():
            column, example = (chosen == old).nonzero()[0].tolist()
            raise ValueError(f"the new token of example {example} is the one at {columns[column].label!r} already")
        at_end = torch.as_tensor(ends).expand(len(tokens))
        ends = torch.tensor([(resolve_positions(int(p), tokens.shape[1]) or ())[0] for p in at_end])
        return cls(model, averages, tokens, columns, rows, old, chosen, ends, ids if among == "averaged" else None)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """At the ends, on the CPU."""
        return self.model(tokens)[torch.arange(len(tokens)), self.ends].float().cpu()

    def answers(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """The best token of each example."""
        return logits.argmax(1) if self.candidates is None else self.candidates[logits[:, self.candidates].argmax(1)]

    def difference(self, logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, " batch"]:
        """The logit of the new token of column k, minus that of the old one."""
        return (logits.gather(1, self.new[k, :, None]) - logits.gather(1, self.old[k, :, None]))[:, 0]

    def with_new(self, k: int) -> Int[Tensor, "batch pos"]:
        """The prompts with the token of column k replaced."""
        replaced = self.tokens.clone()
        replaced[torch.arange(len(replaced)), self.columns[k].positions] = self.new[k]
        return replaced

    def exchange(self, layer: int, k: int) -> Intervention:
        """Subtracts the old token's average and adds the new one's at a layer and the place of column k."""
        values = torch.from_numpy(self.averages.sel(layer=layer).values[self.rows[k]])
        ids = torch.from_numpy(self.averages["token_id"].values)
        of_new, of_old = (values[torch.searchsorted(ids, token)] for token in (self.new[k], self.old[k]))
        (spec,) = sweep_specs(self.model, self.averages.attrs["hook"])
        at = self.columns[k].positions + self.averages.attrs["offset"]
        return steer(spec.name(layer), (of_new - of_old)[:, None], positions=at[:, None])


def _rows_of(columns: Sequence[Column], averages: DataArray, by_name: bool) -> list[int]:
    """The rows of the averages that columns mean: by their names, else in order. Raises ValueError if there is none."""
    labels = averages["position"].values.tolist()
    if not by_name:
        if len(columns) != len(labels):
            raise ValueError(f"{len(columns)} positions were given, the averages have {len(labels)}: {labels}")
        return list(range(len(labels)))
    unknown = [column.label for column in columns if column.label not in labels]
    if unknown:
        raise ValueError(f"there are no averages for {unknown}; they were taken at {labels}")
    return [labels.index(column.label) for column in columns]


def _check_averaged(
    model: HookedMamba,
    wanted: Int[Tensor, "column batch"],
    ids: Int[Tensor, " token"],
    known: Bool[Tensor, "column token"],
    columns: Sequence[Column],
    verb: str,
) -> None:
    """Raises ValueError if a token has no average in its column."""
    for column, row, has in zip(columns, wanted, known, strict=True):
        for example, token in enumerate(row.tolist()):
            if token not in ids[has]:
                text, others = token_texts(model, [token])[0], ", ".join(token_texts(model, ids[has].tolist()))
                raise ValueError(
                    f"{text!r} {verb} at {column.label!r} in example {example}, and has no average there; "
                    f"averaged are {others}"
                )


def _other_tokens(
    tokens: Int[Tensor, "batch pos"],
    ids: Int[Tensor, " token"],
    known: Bool[Tensor, "column token"],
    columns: Sequence[Column],
    seed: int,
) -> Int[Tensor, "column batch"]:
    """For each column and example an averaged token that the prompt does not hold."""
    rng, drawn = np.random.default_rng(seed), []
    for column, has in zip(columns, known, strict=True):
        for example, prompt in enumerate(tokens):
            others = [token for token in ids[has].tolist() if token not in prompt]
            if not others:
                raise ValueError(f"every token averaged at {column.label!r} is in example {example}: average more")
            drawn.append(int(rng.choice(others)))
    return torch.tensor(drawn).reshape(len(columns), len(tokens))
