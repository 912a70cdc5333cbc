"""Which batch shapes come often enough for an engine to make something of its own for them."""

from __future__ import annotations

import threading
from collections import deque

RECENT, OFTEN = 16, 4  # a shape that came OFTEN times among the RECENT ones recurs


class Recurring:
    """Remembers the latest shapes; thread-safe."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, ...]] = deque(maxlen=RECENT)
        self._expected: deque[tuple[int, ...]] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def comes(self, shape: tuple[int, ...]) -> bool:
        """Note a shape, and tell whether it recurs."""
        with self._lock:
            self._recent.append(shape)
            return shape in self._expected or self._recent.count(shape) >= OFTEN

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """Note that a shape will come so often."""
        with self._lock:
            if runs >= OFTEN and shape not in self._expected:
                self._expected.append(shape)
