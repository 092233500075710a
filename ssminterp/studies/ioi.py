"""Indirect object identification, by the protocol of Ensign & Garriga-Alonso 2024, on any Mamba.

"Investigating the Indirect Object Identification circuit in Mamba", arXiv:2407.14008, and the experiments beside it
(github.com/Phylliida/investigating-mamba-ioi). Their prompts, three names each, are asked about layers: what is lost
without each, which few pass names from token to token, which can go, and whether exchanging a name's average exchanges
the name. Two-name prompts, in which every token has one role, are asked where the name is: resample ablation of layer
inputs, patches of what is inside the key layer, its conv's taps, knockout, and the flow graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ssminterp.analysis import (
    flow_contributions,
    flow_patches,
    knockout_sweep,
    patch_taps,
    substitution_test,
    token_averages,
)
from ssminterp.models import HookedMamba
from ssminterp.patching import (
    ablate_layers,
    edge_attribution,
    patch_sweep,
    position_columns,
    remove_layers,
    restore_layers,
)
from ssminterp.tasks import TaskBatch, make_task
from ssminterp.tasks.ioi import ENSIGN_FORMATS

METRICS = ("accuracy", "probability", "logit_diff")
# What the key layer's information may be in; with the layer's input, and its state, which all others feed.
INSIDE = ("mixer_in", "x", "delta", "B", "C", "gate", "state")
# The accuracy at which the paper stops giving layers back.
ENOUGH = 0.9
# The names' averages are taken from so many pairs of prompts for each that is tested, but no fewer than these.
AVERAGED, AVERAGED_AT_LEAST = 8, 128
FLOW_PROMPTS, PATCHED_PAIRS = 8, 2
ATTRIBUTION_STEPS = 8
MENTIONS = ("N1", "N2", "N3", "R1", "R2")


@dataclass(frozen=True, eq=False)
class IOIStudy:
    """What the study found.

    model_name, n: the checkpoint, and how many pairs of prompts each part had.
    example: a clean and a corrupted prompt of both kinds, with their answers.
    baseline: prompts × metrics of the unchanged model.
    zero, resample, conv: metrics by layer with mixer_out zeroed, mixer_out or conv resampled, at all positions.
    alike: metrics by layer with mixer_out replaced by its mean over prompts of one template, at each position.
    minimal_sets: by format of the names, the layers that had to be given back, and the accuracy with them.
    removal: the order in which layers can go.
    key_layer: the layer that is given back first on all prompts.
    sites: share of the way back to the clean answer, (hook, layer, position); taps: the same, (layer, back, position).
    substitution: by mention of a name, the share of prompts in which exchanging averages does what exchanging the names
        themselves does.
    knockouts: accuracy and probability by source and window of layers, no longer read at the end.
    edges: edges of the residual stream by integrated gradients, (edge, position), in logit difference.
    flow, patched_flow: the flow's edges by contribution and by patching.
    """

    model_name: str
    n: int
    example: pd.DataFrame
    baseline: pd.DataFrame
    zero: xr.Dataset
    resample: xr.Dataset
    conv: xr.Dataset
    alike: xr.Dataset
    minimal_sets: pd.DataFrame
    removal: pd.DataFrame
    key_layer: int
    sites: xr.DataArray
    taps: xr.DataArray
    substitution: pd.DataFrame
    knockouts: xr.Dataset
    edges: xr.DataArray
    flow: xr.Dataset
    patched_flow: xr.Dataset

    @property
    def key_tap(self) -> int:
        """How many tokens back the key layer's strongest tap reaches."""
        return int(self.taps["back"].values[abs(self.taps).max("position").values.argmax()])


@torch.no_grad()
def ioi_study(model: HookedMamba, n: int = 32, seed: int = 0, *, progress: bool = True) -> IOIStudy:
    """The whole protocol.

    n: pairs of prompts in each part. Time grows with it, with the layers, and for `minimal_sets` and `removal` with
    their square.

    Raises ValueError if the model has no tokenizer, or one for which too few names are single tokens.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("the study writes its own prompts: load the model with its tokenizer")
    three = make_task("ioi_ensign", tokenizer, n=(n + 1) // 2, seed=seed).to(model.device)
    two = make_task("ioi", tokenizer, n=n, seed=seed).to(model.device)
    metrics = {name: three.metric(name) for name in METRICS}
    first = restore_layers(model, three.clean, three.corrupted, metrics, until=float("inf"), at_most=1)
    key_layer = int(first["layer"].iloc[-1])
    moved = _moved(model, two)
    taps = patch_taps(model, two.clean, two.corrupted, moved, [key_layer], two.roles, progress=progress)
    taps = taps.isel(layer=0)
    key_tap = int(taps["back"].values[abs(taps).max("position").values.argmax()])
    resampled: dict[str, Any] = {"method": "resample", "others": three.corrupted, "progress": progress}
    template = make_task("ioi", tokenizer, n=1, seed=seed).templates
    alike = make_task("ioi", tokenizer, n=n, templates=template, seed=seed).to(model.device)
    flows = _flows(model, alike, progress)
    return IOIStudy(
        model_name=model.cfg.model_name,
        n=n,
        example=_examples(model, three, two),
        baseline=_baseline(model, {"three names": three, "two names": two}),
        zero=ablate_layers(model, three.clean, metrics, progress=progress),
        resample=ablate_layers(model, three.clean, metrics, **resampled),
        conv=ablate_layers(model, three.clean, metrics, "conv", **resampled),
        alike=ablate_layers(
            model,
            alike.clean,
            {name: alike.metric(name) for name in METRICS},
            method="position_mean",
            progress=progress,
        ),
        minimal_sets=minimal_sets(model, tokenizer, n, seed),
        removal=remove_layers(model, three.clean, metrics, down_to=_enough(model, three)),
        key_layer=key_layer,
        sites=patch_sweep(model, two.clean, two.corrupted, INSIDE, moved, positions=two.roles, progress=progress),
        taps=taps,
        substitution=_substitution(model, tokenizer, n, key_layer, key_tap, seed),
        knockouts=_knockouts(model, two, progress),
        edges=edge_attribution(
            model, two.clean, two.corrupted, two.metric(), positions=two.roles, steps=ATTRIBUTION_STEPS
        ),
        flow=flows["contribution"],
        patched_flow=flows["patching effect"],
    )


def minimal_sets(model: HookedMamba, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> pd.DataFrame:
    """For each of the paper's five ways to change the names, the layers that it takes to answer right again.

    Columns: format, layers (in the order in which they were given back), accuracy, probability.
    """
    rows = []
    for pair in ENSIGN_FORMATS:
        batch = make_task("ioi_ensign", tokenizer, n=max(1, n // 4), formats=[pair], seed=seed).to(model.device)
        metrics = {name: batch.metric(name) for name in METRICS}
        steps = restore_layers(model, batch.clean, batch.corrupted, metrics, until=_enough(model, batch))
        last = steps.iloc[-1]
        layers = steps["layer"].tolist()[1:]
        rows.append([" / ".join(pair), layers, float(last["accuracy"]), float(last["probability"])])
    return pd.DataFrame(rows, columns=["format", "layers", "accuracy", "probability"])


def _enough(model: HookedMamba, batch: TaskBatch) -> float:
    """The accuracy that counts as enough: the paper's, or the model's own if that is lower."""
    return min(ENOUGH, float(batch.metric("accuracy")(model(batch.clean)).mean()))


def _moved(model: HookedMamba, batch: TaskBatch) -> Any:
    """The logit difference from the corrupted (0) to the clean run (1)."""
    return batch.metric("normalised_logit_diff", model(batch.clean), model(batch.corrupted))


def _examples(model: HookedMamba, *batches: TaskBatch) -> pd.DataFrame:
    rows = []
    for batch in batches:
        answers = [model.to_str_tokens(tokens[:1])[0].strip() for tokens in (batch.answers, batch.wrong_answers)]
        rows.append([batch.clean_prompts[0], answers[0], batch.corrupted_prompts[0], answers[1]])
    return pd.DataFrame(rows, columns=["clean", "answer", "corrupted", "its answer"])


def _baseline(model: HookedMamba, batches: Mapping[str, TaskBatch]) -> pd.DataFrame:
    rows = []
    for name, batch in batches.items():
        logits = model(batch.clean)
        values = [float(batch.metric(metric)(logits).mean()) for metric in METRICS]
        rows.append([name, len(batch), *values])
    return pd.DataFrame(rows, columns=["prompts", "n", *METRICS])


def _substitution(
    model: HookedMamba, tokenizer: PreTrainedTokenizerBase, n: int, layer: int, offset: int, seed: int
) -> pd.DataFrame:
    """At each mention: x of the key layer, `offset` after it, minus the name's average plus another name's.

    At the first three mentions only prompts whose answer stands there are tested and a new name is put in its place; at
    the repeated ones the answer's name is, which makes the name that stood there the answer.
    """
    tested = make_task("ioi_ensign", tokenizer, n=n, seed=seed).to(model.device)
    many = make_task("ioi_ensign", tokenizer, n=max(AVERAGED_AT_LEAST, AVERAGED * n), seed=seed + 1).to(model.device)
    roles = {role: many.role(role) for role in MENTIONS}
    averages = token_averages(model, many.clean, roles, layers=layer, offset=offset, progress=False)
    rows = []
    for role in MENTIONS:
        here = _tokens_at(tested.clean, tested.role(role))
        known = torch.isin(here.cpu(), _averaged(averages, role))
        if role.startswith("N"):
            chosen, new = known & (here == tested.answers).cpu(), None
        else:
            chosen, new = known & torch.isin(tested.answers.cpu(), _averaged(averages, role)), tested.answers
        part = tested[chosen.nonzero()[:, 0]]
        if not len(part):
            continue
        new = None if new is None else new[chosen.to(new.device)]
        found = substitution_test(
            model,
            part.clean,
            averages.sel(position=[role]),
            {role: part.role(role)},
            new=new,
            ends=part.role("end"),
            seed=seed,
            progress=False,
        )
        shares = {name: float(found[name].squeeze()) for name in ("as_if_replaced", "changes")}
        rows.append({"mention": role, "prompts": len(part), "layer": layer, "offset": offset, **shares})
    return pd.DataFrame(rows)


def _tokens_at(tokens: Int[Tensor, "batch pos"], at: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    return tokens.gather(1, at.to(tokens.device)[:, None])[:, 0]


def _averaged(averages: xr.DataArray, role: str) -> Int[Tensor, " n"]:
    """The tokens that have an average at a role."""
    return torch.from_numpy(averages["token_id"].values[averages["count"].sel(position=role).values > 0])


def _knockouts(model: HookedMamba, batch: TaskBatch, progress: bool) -> xr.Dataset:
    """The end no longer reads IO, S1 or S2 from the states of a seventh of the layers."""
    return knockout_sweep(
        model,
        batch.clean,
        {name: batch.metric(name) for name in METRICS},
        ["IO", "S1", "S2"],
        "end",
        window=max(1, round(model.cfg.n_layers / 7)),
        roles=batch.roles,
        progress=progress,
    )


def _flows(model: HookedMamba, alike: TaskBatch, progress: bool) -> dict[str, xr.Dataset]:
    """Means over prompts of one template, so that a token position means the same in all of them."""
    batch, few = alike[:FLOW_PROMPTS], alike[:PATCHED_PAIRS]
    flows = {
        "contribution": flow_contributions(model, batch.clean, batch.answers, batch.wrong_answers),
        "patching effect": flow_patches(model, few.clean, few.corrupted, few.metric("logit_diff"), progress=progress),
    }
    labels = [column.label for column in position_columns(model, batch.clean, roles=batch.roles)]
    return {
        name: flow.mean("batch", keep_attrs=True)
        .assign_coords(position=labels, target=labels, source=labels)
        .assign_attrs(of="logit of IO - S", end=labels[-1])
        for name, flow in flows.items()
    }
