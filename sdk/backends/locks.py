"""A lock that many may hold together, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Not reentrant. Who wants it alone waits until nobody holds it; later sharers wait for him."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held by who wants it alone, from then on
        self._condition = threading.Condition()
        self._sharers = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it together with others."""
        with self._turn, self._condition:
            self._sharers += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharers -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone."""
        with self._turn:
            with self._condition:
                self._condition.wait_for(lambda: self._sharers == 0)
            yield
