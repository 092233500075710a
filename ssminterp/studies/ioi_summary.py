"""What the study of indirect object identification says in words and numbers, and where its tools disagree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ssminterp.analysis import flow_graph, strongest_paths
from ssminterp.studies.ioi import ENOUGH, INSIDE, IOIStudy

# A place matters if so much of the way to the clean answer, or of the accuracy, hangs on it.
HALF = 0.5
# Two tools disagree if their answers are so far apart, in shares of the whole way.
GAP = 0.4
# The path that the summary names has at least this share of the logit difference in each edge.
PATH_SHARE = 0.3

MEANINGLESS = "so what follows says nothing of how it is done"

PAPER = "mamba-370m"


def summary(study: IOIStudy) -> pd.DataFrame:
    """The model's bottlenecks, one question a row: question, answer, evidence."""
    three = study.baseline.iloc[0]
    rows = [
        (
            "Does it do the task?",
            f"{three['accuracy']:.0%} right" + ("" if three["accuracy"] > HALF else f": no, {MEANINGLESS}"),
            f"probability of the right name {three['probability']:.2f}, logit difference {three['logit_diff']:.1f}",
        ),
        _needed(study),
        _differing(study),
        _sets(study),
        _removable(study),
        *_sites(study),
        _tap(study),
        _exchange(study),
        _read(study),
        _paths(study),
    ]
    return pd.DataFrame(rows, columns=["question", "answer", "evidence"])


def key_layers(ablated: xr.Dataset) -> list[int]:
    """The layers without which the right name has at most half of its probability."""
    probability = ablated["probability"]
    enough = (1 - HALF) * probability.attrs["baseline"]
    return [int(layer) for layer in probability["layer"].values if float(probability.sel(layer=layer)) <= enough]


def share_in_sets(study: IOIStudy) -> pd.Series:
    """For each layer, the share of the minimal sets that hold it."""
    sets = study.minimal_sets["layers"]
    every = [int(layer) for layer in study.zero["layer"].values]
    return pd.Series({layer: sum(layer in layers for layers in sets) / len(sets) for layer in every})


def _in_every_set(study: IOIStudy) -> list[int]:
    return [
        layer for layer in share_in_sets(study).index.tolist() if all(layer in s for s in study.minimal_sets["layers"])
    ]


def _needed(study: IOIStudy) -> tuple[str, str, str]:
    evidence = f"with zero ablation, {_worst(study.zero)}"
    return "Without which layer's output does it fail?", _listed(key_layers(study.zero)), evidence


def _differing(study: IOIStudy) -> tuple[str, str, str]:
    evidence = f"with the output resampled, {_worst(study.resample)}"
    return "Which layers' output depends on the names?", _listed(key_layers(study.resample)), evidence


def _worst(ablated: xr.Dataset, n: int = 4) -> str:
    """The layers that cost most, in words."""
    worst = ablated.sortby("probability").isel(layer=slice(n))
    shown = [
        f"layer {int(layer)} {float(probability):.2f} ({float(accuracy):.0%} right)"
        for layer, probability, accuracy in zip(
            worst["layer"].values, worst["probability"].values, worst["accuracy"].values, strict=True
        )
    ]
    return f"probability of the right name: {', '.join(shown)}"


def _sets(study: IOIStudy) -> tuple[str, str, str]:
    always = _in_every_set(study)
    evidence = "; ".join(f"{row.format}: {row.layers}" for row in study.minimal_sets.itertuples())
    answer = f"{_listed(always)}, in every set that suffices" if always else "none is in every set that suffices"
    return "Which layers pass the names on?", answer, evidence


def _removable(study: IOIStudy) -> tuple[str, str, str]:
    last = study.removal["accuracy"].iloc[-1]
    enough = min(ENOUGH, study.removal["accuracy"].iloc[0])
    gone = study.removal["layer"].tolist()[1:] if last >= enough else study.removal["layer"].tolist()[1:-1]
    kept = study.removal["accuracy"].iloc[len(gone)]
    question = "How many layers can go, one by one?"
    return question, f"{len(gone)} of {study.zero.sizes['layer']}", f"without {gone} accuracy is {kept:.0%}"


def _sites(study: IOIStudy) -> Iterable[tuple[str, str, str]]:
    key = study.sites.sel(layer=study.key_layer)
    inputs = key.sel(hook="mixer_in")
    strong = [str(p) for p in inputs["position"].values if abs(float(inputs.sel(position=p))) >= HALF]
    evidence = ", ".join(f"{p} {float(inputs.sel(position=p)):+.2f}" for p in inputs["position"].values)
    yield (
        f"At which tokens does layer {study.key_layer} get the names?",
        _listed(strong),
        f"its input patched at {evidence}",
    )
    inside = {hook: key.sel(hook=hook).values for hook in INSIDE if hook != "mixer_in"}
    strongest = {hook: float(moved[np.abs(moved).argmax()]) for hook, moved in inside.items()}
    carriers = [hook for hook, moved in strongest.items() if abs(moved) >= HALF]
    evidence = ", ".join(f"{hook} {moved:+.2f}" for hook, moved in strongest.items())
    yield "In what of that layer are they?", _listed(carriers), f"strongest patch of each: {evidence}"
    states = key.sel(hook="state")
    enough = [str(p) for p in states["position"].values if float(states.sel(position=p)) >= ENOUGH]
    evidence = ", ".join(f"{p} {float(states.sel(position=p)):+.2f}" for p in states["position"].values)
    yield "From where on is its state enough?", _listed(enough), f"state patched at {evidence}"


def _tap(study: IOIStudy) -> tuple[str, str, str]:
    strongest = abs(study.taps).max("position")
    evidence = ", ".join(f"{int(back)}: {float(strongest.sel(back=back)):.2f}" for back in strongest["back"].values)
    answer = "the token's own" if study.key_tap == 0 else f"{study.key_tap} back"
    return "Which tap of that layer's conv carries them?", answer, f"strongest patch of tap (tokens back) {evidence}"


def _exchange(study: IOIStudy) -> tuple[str, str, str]:
    question = f"Does exchanging a name's average x exchange the name ({study.key_tap} after it)?"
    if study.substitution.empty:
        return question, "not tested", "no name of the prompts was seen at the same mention in others"
    shares = ", ".join(f"{row.mention} {row.as_if_replaced:.0%}" for row in study.substitution.itertuples())
    return question, f"{study.substitution['as_if_replaced'].mean():.0%} of the prompts", f"by mention: {shares}"


def _read(study: IOIStudy) -> tuple[str, str, str]:
    probability = study.knockouts["probability"]
    of_sources = {str(name): probability.sel(source=name) for name in probability["source"].values}
    enough = (1 - HALF) * probability.attrs["baseline"]
    needed = [name for name, values in of_sources.items() if float(values.min()) <= enough]
    lowest = ", ".join(f"{name} {float(values.min()):.2f} ({_window(values)})" for name, values in of_sources.items())
    evidence = f"lowest probability of the right name without the read of {lowest}"
    return "Which names must the last token read from a state?", _listed(needed), evidence


def _window(values: xr.DataArray) -> str:
    """The window of layers with the lowest value, in words."""
    lowest = values.isel(layer=int(values.values.argmin()))
    first, last = int(lowest["layer"]), int(lowest["last_layer"])
    return f"in layer {first}" if first == last else f"in layers {first} to {last}"


def _paths(study: IOIStudy) -> tuple[str, str, str]:
    paths = strongest_paths(flow_graph(study.flow, PATH_SHARE), 4)
    rows = paths.to_dict("records")
    shown = "; ".join(f"{row['path']} ({row['sign'] * row['strength']:+.1f})" for row in rows)
    total = float(study.flow["total"])
    towards = paths[paths["sign"] * total > 0]
    answer = towards["path"].iloc[0] if len(towards) else "none that strong"
    return "Which way does the answer come?", answer, f"of a logit difference of {total:.1f}: {shown}"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items)) or "none"


def disagreements(study: IOIStudy) -> pd.DataFrame:
    """Where two tools answer the same question differently, and what in their making explains it.

    Columns: question, one, other, why. Only what differs in this study is listed.
    """
    rows = [
        *_zero_and_resample(study),
        *_output_and_conv(study),
        *_input_and_x(study),
        *_estimate_and_patch(study),
        *_flows_differ(study),
    ]
    return pd.DataFrame(rows, columns=["question", "one", "other", "why"])


def _zero_and_resample(study: IOIStudy) -> Iterable[tuple[str, str, str, str]]:
    for layer in sorted(set(key_layers(study.zero)) ^ set(key_layers(study.resample))):
        yield (
            f"Is layer {layer} needed?",
            f"zero ablation of its output: {_left(study.zero, layer)}",
            f"resampling of its output: {_left(study.resample, layer)}",
            "Zeros also take away what is the same with other names, such as where in the sentence a token stands; "
            "resampling changes the names alone. With its mean at each position over prompts of one template instead: "
            f"{_left(study.alike, layer)}.",
        )


def _output_and_conv(study: IOIStudy) -> Iterable[tuple[str, str, str, str]]:
    for layer in sorted(set(key_layers(study.resample)) ^ set(key_layers(study.conv))):
        yield (
            f"Do names pass through layer {layer}?",
            f"its output resampled: {_left(study.resample, layer)}",
            f"its conv resampled: {_left(study.conv, layer)}",
            "The output is x times the gate. The conv reaches x, Δ, B, C and the state; the gate still has the token's "
            "own name, so what a layer does within a token may survive.",
        )


def _left(ablated: xr.Dataset, layer: int) -> str:
    at = ablated.sel(layer=layer)
    return f"probability {float(at['probability']):.2f}, {float(at['accuracy']):.0%} right"


def _input_and_x(study: IOIStudy) -> Iterable[tuple[str, str, str, str]]:
    for layer in study.sites["layer"].values:
        inputs, x, gate = (study.sites.sel(layer=layer, hook=hook) for hook in ("mixer_in", "x", "gate"))
        for position in inputs["position"].values:
            whole, of_x, of_gate = (float(moved.sel(position=position)) for moved in (inputs, x, gate))
            if abs(whole - of_x) >= GAP:
                yield (
                    f"How does layer {layer} take the name at {position}?",
                    f"its input patched: {whole:+.2f} of the way",
                    f"its x alone: {of_x:+.2f}, its gate alone: {of_gate:+.2f}",
                    "The input feeds x and the gate, and the output is their product: each alone meets the other run's "
                    "partner. The flow by contributions holds the gate and gives all to x.",
                )


def _estimate_and_patch(study: IOIStudy) -> Iterable[tuple[str, str, str, str]]:
    inputs = study.sites.sel(hook="mixer_in")
    for layer in inputs["layer"].values:
        into = study.edges.isel(edge=study.edges["receiver"].values == f"blocks.{layer}.mixer_in").sum("edge")
        for position in inputs["position"].values:
            one = float(into.sel(position=position)) / (study.edges.attrs["clean"] - study.edges.attrs["corrupted"])
            other = float(inputs.sel(layer=layer, position=position))
            if abs(one - other) >= GAP:
                yield (
                    f"What does the input of layer {layer} at {position} bring?",
                    f"edge attribution (EAP-IG) into it: {one:+.2f} of the way",
                    f"its patch: {other:+.2f} of the way",
                    "The estimate averages slopes over runs in which all embeddings lie between corrupted and clean; "
                    "the patch changes this one place in the corrupted run, where other slopes hold.",
                )


def _flows_differ(study: IOIStudy) -> Iterable[tuple[str, str, str, str]]:
    end = study.flow.attrs["end"]
    shares = [
        flow["state"].sel(layer=study.key_layer, target=end) / float(flow["total"])
        for flow in (study.flow, study.patched_flow)
    ]
    for source in study.flow["source"].values:
        one, other = (float(share.sel(source=source)) for share in shares)
        if abs(one - other) >= GAP:
            yield (
                f"What does {source} bring to {end} through the state of layer {study.key_layer}?",
                f"flow, by contribution: {one:+.0%} of the clean logit difference",
                f"flow, by patching: {other:+.0%} of the way from corrupted to clean",
                "A contribution is what is there: names that cancel are large and opposite. A patch is what changes: "
                "with one of two names exchanged the rest no longer cancels, and the final norm and what follows "
                "respond to the whole.",
            )


def beside_the_paper(study: IOIStudy) -> pd.DataFrame:
    """The paper's figures for mamba-370m beside this study's. Columns: quantity, paper, here.

    The paper's are what Ensign & Garriga-Alonso 2024, arXiv:2407.14008, report, from their prompts; ours are measured
    here, on prompts made in the same way.

    Raises ValueError for another checkpoint.
    """
    if PAPER not in study.model_name:
        raise ValueError(f"the paper's figures are of {PAPER}, the study is of {study.model_name}")
    three = study.baseline.iloc[0]
    accuracy = study.zero["accuracy"]
    hardest = [int(layer) for layer in accuracy["layer"].values[np.argsort(accuracy.values, kind="stable")[:2]]]
    always = _in_every_set(study)
    early = study.substitution[study.substitution["mention"].isin(["N1", "N2", "N3"])]
    rows = [
        ("accuracy of the full model", "about 96 %", f"{three['accuracy']:.1%}"),
        ("probability of the right name", "83 %", f"{three['probability']:.1%}"),
        ("layers that zero ablation hits hardest", "0 and 39", _listed(sorted(hardest))),
        ("layers in every minimal set", "39, with 15", _listed(sorted(always))),
        ("key layer", "39", str(study.key_layer)),
        ("tap of that layer that carries the name", "one position back", f"{study.key_tap} back"),
        (
            "exchange of averages works, early mentions",
            "over 95 %",
            _listed([f"{row.mention} {row.as_if_replaced:.0%}" for row in early.itertuples()]),
        ),
    ]
    return pd.DataFrame(rows, columns=["quantity", "paper", "here"])
