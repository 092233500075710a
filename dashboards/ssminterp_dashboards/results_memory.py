"""Results of the page Memory, kept for all tabs like those in `results`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import streamlit as st
import xarray as xr

from ssminterp import ModelState, analysis
from ssminterp.cartridges import answer_by_layers, answers, blank
from ssminterp_dashboards import models
from ssminterp_dashboards.models import ModelKey
from ssminterp_dashboards.results import N_RESULTS

# Longer texts take minutes: they are for `ssminterp states read`.
MAX_READ = 20_000


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def horizons(key: ModelKey, prompt: str) -> xr.DataArray:
    """The half-life of every channel's slowest coordinate: (layer, channel)."""
    with models.load(key).ready() as model:
        return analysis.horizons(model, prompt)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def survival(key: ModelKey, prompt: str, layer: int, source: int) -> xr.DataArray:
    """What is left of one token's writing: (target, channel, coordinate)."""
    with models.load(key).ready() as model:
        return analysis.survival(model, prompt, layer, source).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def sinks(key: ModelKey, prompt: str, threshold: float) -> pd.DataFrame:
    """Layers and tokens with an outlying step."""
    with models.load(key).ready() as model:
        return analysis.sinks(model, prompt, threshold=threshold).drop(columns="batch")


@st.cache_data(max_entries=16, show_spinner="Reading the text …")
def cartridge(key: ModelKey, text: str) -> ModelState:
    """The state after a text. Raises ValueError for an empty text, unknown words, and one that is too long."""
    if not text.strip():
        raise ValueError("There is nothing to read: write a text for the cartridge.")
    with models.load(key).ready() as model:
        n_tokens = model.to_tokens(text).shape[1]
        if n_tokens > MAX_READ:
            raise ValueError(
                f"The text has {n_tokens:,} tokens, and this page reads up to {MAX_READ:,}: "
                "`ssminterp states read` takes any length."
            )
        return model.read(text, progress=False)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Asking …")
def answered(key: ModelKey, text: str, other: str, question: str, layers: tuple[int, ...]) -> xr.DataArray:
    """What a question is answered with a cartridge, with some layers of it, and without: (run, token)."""
    own = cartridge(key, text)
    base = cartridge(key, other) if other.strip() else blank(own)
    without = "the other text" if other.strip() else "nothing read"
    with models.load(key).ready() as model:
        runs = {"the cartridge": own, f"layers {_listed(layers)} of it": base.swap(own, list(layers)), without: base}
        if len(layers) in (0, own.n_layers):
            del runs[f"layers {_listed(layers)} of it"]
        return answers(model, question, runs, k=3)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Swapping layers …")
def by_layers(key: ModelKey, text: str, other: str, question: str) -> xr.Dataset:
    """How probable the cartridge's answer is with some of its layers: (swap, layer, example)."""
    own = cartridge(key, text)
    base = cartridge(key, other) if other.strip() else None
    with models.load(key).ready() as model:
        return answer_by_layers(model, question, own, base)


def as_file(state: ModelState) -> bytes:
    """The safetensors file that `ModelState.load` reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cartridge.safetensors"
        state.save(path)
        return path.read_bytes()


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
