"""Choices that several pages share: they are kept from page to page and from link to link."""

from __future__ import annotations

import streamlit as st
from xarray import DataArray

from ssminterp.plots import strongest_part
from ssminterp_dashboards import links
from ssminterp_dashboards.models import Loaded

# More layers than this do not fit on one line.
MOST_BUTTONS = 12
# More tokens than this cannot be read as rows and columns of a map.
MOST_TOKENS = 60


def choose_layer(loaded: Loaded) -> int:
    """The layer to look at; a third of the way up by default, where the bundled models keep what they read."""
    layers = range(loaded.model.cfg.n_layers)
    layer = links.choice("layer", len(layers) // 3, layers)
    if len(layers) <= MOST_BUTTONS:
        st.segmented_control("Layer", layers, key="layer", required=True)
    else:
        st.selectbox("Layer", layers, key="layer")
    return layer


def take_layer(row: int, column: int) -> None:
    """For clicks on a map whose rows are layers: look at that layer."""
    st.session_state["layer"] = row


def choose_token(
    texts: list[str], label: str = "After which token", key: str = "token", first: int | None = None
) -> int:
    """A token of the prompt. first: the one to begin with; None means the last."""
    places = range(len(texts))
    position = links.choice(key, len(texts) - 1 if first is None else first, places)
    st.select_slider(label, places, format_func=lambda i: f"{i} {texts[i].strip()}", key=key)
    return position


def readable(values: DataArray, key: str) -> DataArray:
    """A map of (target, source) that can be read: its strongest rows and columns, unless the reader wants all."""
    n = max(values.sizes["target"], values.sizes["source"])
    if n <= MOST_TOKENS:
        return values
    everything = links.choice(key, False)
    st.toggle(f"All {n} tokens, not only the {MOST_TOKENS} strongest", key=key)
    return values if everything else strongest_part(values, MOST_TOKENS)
