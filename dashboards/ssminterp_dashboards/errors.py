"""What goes wrong becomes a message in the page; the app goes on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import streamlit as st
import torch

from ssminterp_dashboards.text import plain

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])


def message_of(error: Exception) -> str:
    """What a reader is told about an error.

    ValueErrors of ssminterp say what happened and what to do. Anything else is a defect, and belongs in the log.
    """
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error):
        return "There is not enough memory for this: take a shorter prompt, fewer prompts, or a smaller model."
    log.exception("the dashboards met an error they did not expect", exc_info=error)
    return f"This did not work, for a reason that nobody foresaw ({type(error).__name__}). The terminal says more."


@contextmanager
def guarded() -> Iterator[None]:
    """Show what goes wrong inside as a message."""
    try:
        yield
    except Exception as error:
        st.error(plain(message_of(error)), icon=":material/error:")


def rerun_whole_page() -> None:
    """For callbacks of widgets in a panel that change a choice made outside of it: a fragment would run alone."""
    st.session_state["whole_page"] = True


def panel(function: Function) -> Function:
    """A fragment: widgets in it rerun it alone. What goes wrong in it is shown in it."""

    @functools.wraps(function)
    def shown(*args: Any, **kwargs: Any) -> Any:
        if st.session_state.pop("whole_page", False):
            st.rerun()
        with guarded():
            return function(*args, **kwargs)

    return st.fragment(shown)
