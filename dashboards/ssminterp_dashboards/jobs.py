"""Long work beside the page: a thread that reports how far it is, can be stopped, and keeps what is finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

# A job that no page has asked after for so long belongs to a closed tab.
FORGOTTEN_AFTER = 30.0


class Job:
    """Runs parts one after the other in a thread of its own, until they are done, one fails, or it is stopped.

    name: what it was asked for, so that a page knows whether this is the job that it wants.
    parts: what to run, by name; their results appear in `finished` as they come.
    """

    def __init__(self, name: Hashable, parts: Mapping[Hashable, Callable[[], Any]]) -> None:
        self.name = name
        self.total = len(parts)
        self.finished: dict[Hashable, Any] = {}
        self.error: Exception | None = None
        self.stopped = False
        self._parts = dict(parts)
        self._stop = threading.Event()
        self._asked_after = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ssminterp-job")
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        self._asked_after = time.monotonic()
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for the end, but not longer than this. Returns whether it is over."""
        self._thread.join(seconds)
        return self.over

    def stop(self) -> None:
        """Ask it to stop after the part that it is at."""
        self._stop.set()

    def _run(self) -> None:
        for name, part in self._parts.items():
            if self._stop.is_set() or time.monotonic() - self._asked_after > FORGOTTEN_AFTER:
                self.stopped = True
                return
            try:
                self.finished[name] = part()
            except Exception as error:  # the page shows it: see errors.message_of
                self.error = error
                return
