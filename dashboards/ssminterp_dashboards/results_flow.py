"""Results of the page Flow, kept for all tabs like those in `results`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import networkx as nx
import streamlit as st
import xarray as xr
from torch import Tensor

from ssminterp import HookedMamba, analysis
from ssminterp.analysis import flow_contributions, flow_graph, intervened_answers, knockout_sweep, likely_pair
from ssminterp.interventions import knockout
from ssminterp_dashboards import models
from ssminterp_dashboards.models import ModelKey
from ssminterp_dashboards.results import N_RESULTS

Decay = Literal["kept", "skipped"]


class Question(NamedTuple):
    """Two tokens that compete to come next, and what they are called."""

    answer: int
    instead: int
    answer_text: str
    instead_text: str


class Edge(NamedTuple):
    """Reads that are cut: of a source by a target, in some layers."""

    source: int
    target: int
    layers: tuple[int, ...]
    decay: Decay


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def question(key: ModelKey, prompt: str, answer: str, instead: str) -> Question:
    """The tokens of two words; the model's own answer, and what it competes with, for empty ones.

    Raises ValueError for words that are not one token.
    """
    with models.load(key).ready() as model:
        own = likely_pair(model, prompt)
        ids = [_token(model, word) if word.strip() else i for word, i in zip((answer, instead), own, strict=True)]
        if ids[0] == ids[1] and not instead.strip():
            ids[1] = own[0]
        texts = model.to_str_tokens(model.to_tokens(prompt).new_tensor(ids))
        if ids[0] == ids[1]:
            raise ValueError(f"Both words are {texts[0].strip()!r}: name two that compete, or leave one empty.")
        return Question(ids[0], ids[1], texts[0].strip(), texts[1].strip())


def _token(model: HookedMamba, word: str) -> int:
    """The token of a word inside a sentence, where most tokenizers keep the space with it."""
    pieces = [model.to_tokens(text)[0].tolist() for text in (f" {word.strip()}", word.strip())]
    single = [ids[0] for ids in pieces if len(ids) == 1]
    if not single:
        raise ValueError(f"{word!r} is {len(pieces[0])} tokens for this model: name a word that is one.")
    return single[0]


@st.cache_data(max_entries=16, show_spinner="Following the answer …")
def flow(key: ModelKey, prompt: str, asked: Question) -> xr.Dataset:
    """What every edge carries of the logit difference at the last token."""
    with models.load(key).ready() as model:
        return flow_contributions(model, prompt, asked.answer, asked.instead).isel(batch=0, drop=True)


@st.cache_data(max_entries=16, show_spinner=False)
def graph(key: ModelKey, prompt: str, asked: Question, threshold: float) -> nx.DiGraph:
    """The strong edges."""
    found = flow_graph(flow(key, prompt, asked), threshold)
    found.graph["of"] = f"logit of “{asked.answer_text}” − “{asked.instead_text}”"
    return found


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def attention(key: ModelKey, prompt: str, layer: int) -> xr.DataArray:
    """Hidden attention, mean over channels: (target, source)."""
    with models.load(key).ready() as model:
        return analysis.hidden_attention(model, prompt, layer).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Cutting the edge …")
def cut(key: ModelKey, prompt: str, edge: Edge) -> xr.DataArray:
    """What the model answers as it is, and without the edge: (run, token)."""
    with models.load(key).ready() as model:
        knocked_out = knockout(list(edge.layers), sources=edge.source, targets=edge.target, decay=edge.decay)
        return intervened_answers(model, prompt, {"as it is": [], "edge cut": [knocked_out]}, k=3)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Cutting the edge in every layer …")
def by_layer(key: ModelKey, prompt: str, asked: Question, edge: Edge) -> xr.DataArray:
    """The logit difference with the edge cut in one layer at a time: (source, layer)."""

    def difference(logits: Tensor) -> Tensor:
        return logits[:, -1, asked.answer] - logits[:, -1, asked.instead]

    with models.load(key).ready() as model:
        source = f"{edge.source} {model.to_str_tokens(prompt)[edge.source].strip()}"
        sweep = knockout_sweep(
            model, prompt, difference, {source: edge.source}, edge.target, decay=edge.decay, progress=False
        )
        return sweep.rename(f"{asked.answer_text} − {asked.instead_text}, logits")
