"""Results of the pages Learn and State, kept for all tabs like those in `results`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import streamlit as st
import xarray as xr

from ssminterp.analysis import (
    compare_states,
    half_lives,
    state_norms,
    state_shares,
    state_words,
    states_at,
    step_sizes,
)
from ssminterp.learn import OneChannel, channel_of
from ssminterp_dashboards import models
from ssminterp_dashboards.models import ModelKey
from ssminterp_dashboards.results import N_RESULTS


@st.cache_data(max_entries=N_RESULTS, show_spinner=False)
def channel(key: ModelKey, prompt: str, layer: int, channel: int) -> tuple[OneChannel, np.ndarray]:
    """One channel of a layer, and y as the model itself has it."""
    with models.load(key).ready() as model:
        y = model.run_with_cache(prompt, f"blocks.{layer}.mixer.hook_y")[1]["y", layer]
        return channel_of(model, prompt, layer, channel), y[0, :, channel].float().cpu().numpy()


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def norms(key: ModelKey, prompt: str) -> xr.DataArray:
    """The size of every layer's state: (layer, position)."""
    with models.load(key).ready() as model:
        return state_norms(model, prompt).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def words(key: ModelKey, prompt: str, position: int, read_at: int | None, k: int = 6) -> xr.Dataset:
    """The words that each layer's state after one token comes closest to: (layer, rank)."""
    with models.load(key).ready() as model:
        return state_words(model, prompt, position, read_at=read_at, k=k).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def shares(key: ModelKey, prompt: str, layer: int, by: Literal["norm", "read_out"]) -> xr.DataArray:
    """Whose a layer's state is at each token: (target, source)."""
    with models.load(key).ready() as model:
        return state_shares(model, prompt, layer, by).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def state(key: ModelKey, prompt: str, layer: int, position: int) -> xr.DataArray:
    """A layer's state after one token: (channel, coordinate)."""
    with models.load(key).ready() as model:
        return states_at(model, prompt, layer, position).isel(batch=0, position=0)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def decays(key: ModelKey, prompt: str) -> xr.Dataset:
    """Steps and decays of every layer and token: (layer, position)."""
    with models.load(key).ready() as model:
        return step_sizes(model, prompt).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def lives(key: ModelKey, prompt: str, layer: int) -> xr.DataArray:
    """Half-lives of a layer's state in tokens: (channel, coordinate)."""
    with models.load(key).ready() as model:
        return half_lives(model, prompt, layer).isel(batch=0, drop=True)


@st.cache_data(max_entries=N_RESULTS, show_spinner="Running the model …")
def compared(key: ModelKey, first: str, second: str) -> xr.Dataset:
    """The states of two prompts beside each other: (layer, position)."""
    with models.load(key).ready() as model:
        return compare_states(model, first, second)
