"""Triton's interpreter at half its time: most of what it did is bookkeeping, which the tests need done but once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# Pointers, that is 256 KiB: several times what all frames below a kernel take.
ROOM = 2**15


def quicken_interpreter() -> None:
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter.GridExecutor.__call__ = _with_room(interpreter.GridExecutor.__call__)


def _patch_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter puts its own functions into the language for a kernel, and again for each function called in it;
    this leaves the language alone as long as they are there."""

    @functools.cache
    def languages(function: Callable[..., Any]) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_once(function: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_once


def _with_room(call: Callable[..., Any]) -> Callable[..., Any]:
    """CPython keeps frames in chunks of 16 KiB, and maps and unmaps one at every call at which one happens to be full:
    up to half of a kernel's time. A frame that is said to be large gets a chunk in which those below it lie, too."""

    def with_room(*arguments: Any, **options: Any) -> Any:
        return call(*arguments, **options)

    with_room.__code__ = with_room.__code__.replace(co_stacksize=ROOM)
    return with_room
