"""Text from prompts, made safe and readable in labels."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def plain(text: str) -> str:
    """The text as markdown that shows it as it is: no HTML, links, images, formulas, icons or emphasis."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def token_chip(position: int, token: str) -> str:
    """A token and its position as markdown, with what cannot be seen made visible."""
    shown = token.strip() or {"\n": "↵", "\t": "⇥", " ": "␣"}.get(token[:1], "∅")
    return f"{plain(shown)} :gray[{position}]"


def size(n_bytes: float) -> str:
    """Bytes in words: "6.8 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"
