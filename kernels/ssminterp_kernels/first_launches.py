"""Telling who waits for a result that kernels are launched for the first time, which may mean to compile them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], object] | None] = ContextVar("listener to first launches", default=None)


@contextmanager
def told_of_first_launches(listener: Callable[[str], object]) -> Iterator[None]:
    """A context in which `listener` is called, with a name, before kernels are launched that this process has not yet
    launched with arguments of that layout. To compile one takes up to some seconds; what an earlier process has
    compiled is found on disk."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_of_first_launch(name: str) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(name)
