"""Checks of arguments that are made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Check = TypeVar("Check", bound=Callable[..., None])

# Of one check; more than these are forgotten and checked anew, so that memory does not grow for ever.
MOST_LAYOUTS = 4096


def once_per_layout(check: Check) -> Check:
    """Marks a check, of tensors (or None) given by position, that looks at shapes, dtypes and devices alone: it is not
    made again of tensors that have the same ones. All checks together would take a quarter of a short scan's time.
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(check)
    def wrapper(*tensors: Tensor | None) -> None:
        if torch.compiler.is_compiling():
            check(*tensors)
            return
        layout = tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        if layout in passed:
            return
        check(*tensors)
        if len(passed) >= MOST_LAYOUTS:
            passed.clear()
        passed.add(layout)

    return cast("Check", wrapper)
