"""A lock that threads get in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A reentrant lock, first come first served.

    Under Python's own locks a thread that releases and asks again at once, as a sweep does between its parts, can
    keep all others waiting to its end.
    """

    def __init__(self) -> None:
        self._inner = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._inner:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()
        # Whoever released has kept the lock taken for this thread.
        with self._inner:
            self._owner = me
            self._depth = 1

    def __exit__(self, *_: object) -> None:
        with self._inner:
            self._depth -= 1
            if self._depth:
                return
            if self._waiting:
                self._owner = -1
                self._waiting.popleft().set()
            else:
                self._owner = None
