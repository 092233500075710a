"""Every view is a link: choices live in the query parameters of the page's address."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import streamlit as st

Value = TypeVar("Value")


def choice(key: str, default: Value, options: Iterable[object] | None = None) -> Value:
    """The value of the choice `key`, to be called before the widget of that key, which then takes no default itself.

    The value is the reader's; else the link's; else `default`, which is left out of the link. It is kept while other
    pages are shown.

    default: a text, a number, a bool, or a list of texts (joined by commas in the link).
    options: what may be chosen. Anything else, from an old link or after the options changed, becomes the default.
    """
    value = st.session_state.get(key)
    if value is None:
        value = _parsed(st.query_params.get(key), default)
    if options is not None:
        allowed = list(options)
        if isinstance(value, list):
            value = [one for one in value if one in allowed] or default
        elif value not in allowed:
            value = default
    st.session_state[key] = value
    if value == default:
        if key in st.query_params:
            del st.query_params[key]
    elif st.query_params.get(key) != _written(value):
        st.query_params[key] = _written(value)
    return value


def _parsed(text: str | None, default: object) -> object:
    """The text of a link as a value of the default's type; the default where it is none."""
    if text is None:
        return default
    if isinstance(default, bool):
        return text == "yes"
    if isinstance(default, list):
        return [part for part in text.split(",") if part]
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            return default
    return text


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
