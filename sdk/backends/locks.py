"""A lock that many may hold together, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Who wants it alone waits until nobody holds it; later sharers wait for him.

    A thread that holds it may share it once more: finalizers run wherever Python collects garbage. None that shares it
    may ask for it alone.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()  # held by who wants it alone, from then on
        self._condition = threading.Condition()
        self._sharers = 0
        self._mine = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others."""
        if getattr(self._mine, "count", 0):
            yield
            return
        with self._turn, self._condition:
            self._sharers += 1
        self._mine.count = 1
        try:
            yield
        finally:
            self._mine.count = 0
            with self._condition:
                self._sharers -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone."""
        with self._turn:
            with self._condition:
                self._condition.wait_for(lambda: self._sharers == 0)
            self._mine.count = 1
            try:
                yield
            finally:
                self._mine.count = 0
