"""Models: which there are, loading them once for all tabs, and running them one at a time."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import streamlit as st
import torch
from streamlit.runtime.scriptrunner_utils.script_run_context import get_run_yield_check

from ssminterp import HookedMamba
from ssminterp.checkpoints import BUNDLED
from ssminterp.models.catalogue import Listed, available_models
from ssminterp_dashboards.launch import MODEL_VARIABLE
from ssminterp_dashboards.turns import Turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Models held at once, whichever tabs use them.
N_MODELS = 2
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelKey(NamedTuple):
    """What makes a model this one, in keys of caches and in links."""

    name: str
    revision: str = ""
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(eq=False)
class Loaded:
    """A model that all tabs share."""

    key: ModelKey
    model: HookedMamba
    seconds: float
    _turns: Turns = field(default_factory=Turns)

    @contextmanager
    def ready(self) -> Iterator[HookedMamba]:
        """The model, while no other tab runs it: hooks of one run must not see another. First come, first served.

        A page's run ends at the next layer if its reader stops it or chooses something else.
        """
        with self._turns, torch.no_grad(), _interruptible(self.model):
            yield self.model

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def n_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def revision(self) -> str:
        """The commit of a checkpoint from the hub, "bundled", or "local"."""
        commit = getattr(self.model.lm.config, "_commit_hash", None)
        return str(commit)[:12] if commit else "bundled" if self.key.name in BUNDLED else "local"


@contextmanager
def _interruptible(model: HookedMamba) -> Iterator[None]:
    """Before each layer, do what the reader has asked of Streamlit meanwhile: it raises to stop or run again a page.

    In other threads, where sweeps run, nothing is asked: they have a button of their own.
    """
    check = get_run_yield_check()
    if check is None:
        yield
        return
    handles = [block.register_forward_pre_hook(lambda *_: check()) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _release(loaded: Loaded) -> None:
    """Give a model's memory back; a run that has begun keeps it until it ends."""
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@st.cache_resource(max_entries=N_MODELS, on_release=_release, show_spinner="Loading the model …")
def load(key: ModelKey) -> Loaded:
    """The model of a key, checked against plain transformers. Raises ValueError if it cannot be loaded."""
    name = allowed(key.name)
    start = time.perf_counter()
    model = HookedMamba.from_pretrained(
        name, revision=key.revision or None, device=key.device, dtype=DTYPES[key.dtype], verify=True
    )
    model.eval().requires_grad_(False)
    return Loaded(key, model, time.perf_counter() - start)


def device() -> str:
    """Where models are loaded."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def current_key() -> ModelKey:
    """The model that this tab has chosen."""
    state = st.session_state
    return ModelKey(state["model"], state.get("revision") or "", state.get("dtype") or "float32", device())


def current() -> Loaded:
    """The model that this tab has chosen, loaded. Raises ValueError if it cannot be loaded."""
    return load(current_key())


def allowed(name: str) -> str:
    """The name, if a browser may ask for it: bundled, named when the app was started, or a name on the hub.

    Raises ValueError for anything else, above all for paths.
    """
    if name in BUNDLED or name == started_with():
        return name
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{name!r} is neither a bundled model ({', '.join(BUNDLED)}) nor a name on the hub (owner/model). "
            "Folders are opened only if the app was started with them: ssminterp dashboard --model FOLDER"
        )
    if Path(name).exists():
        raise ValueError(
            f"{name!r} is a folder beside the running app: start the app with it, ssminterp dashboard --model {name}"
        )
    return name


def started_with() -> str | None:
    """The model that the command line named."""
    return os.environ.get(MODEL_VARIABLE) or None


@st.cache_data(ttl=60, show_spinner=False)
def listed() -> dict[str, Listed]:
    """The checkpoints that there are, by name: bundled, cached on this machine, and known on the hub."""
    return {one.name: one for one in available_models()}


def choices() -> list[str]:
    """The models to offer: the one the app was started with, then all that are listed."""
    first = started_with()
    return list(dict.fromkeys([*([first] if first else []), *listed()]))


def label(name: str) -> str:
    """A model's name, its size, and whether it must be fetched first."""
    one = listed().get(name)
    if one is None:
        return name
    size = "" if one.parameters is None else f" · {one.parameters / 1e6:,.3g} M parameters"
    return f"{name}{size}{' · on the hub' if one.place == 'hub' else ''}"


def needs_download(name: str) -> bool:
    """Whether opening this model would fetch it from the network."""
    return name != started_with() and (name not in listed() or listed()[name].place == "hub")
