"""When a run reports, looks at its pictures and saves; the running means between two reports."""

from __future__ import annotations

import math
import time

from torch import Tensor, zeros_like

REPORT_SECONDS = 2.0


class Clock:
    """Decides by the time; the first step is reported at once, so that one sees that something happens."""

    def __init__(self, *, panel_seconds: float, checkpoint_seconds: float):
        self._panel_seconds, self._checkpoint_seconds = panel_seconds, checkpoint_seconds
        now = time.monotonic()
        self._started = self._last_checkpoint = now
        self._last_panel = -math.inf
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._images = self._reports = 0

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        """Note a step's loss terms; none of a step that was skipped."""
        for name, term in terms.items():
            total, count = self._sums.get(name, (zeros_like(term), 0))
            self._sums[name] = total + term, count + 1
        self._images += images

    def has_news(self) -> bool:
        """Tell whether a step has been noted since the last report."""
        return self._images > 0

    def wants_report(self) -> bool:
        """Tell whether it is time for news."""
        return self._reports == 0 or time.monotonic() - self._started > REPORT_SECONDS

    def wants_panel(self) -> bool:
        """Tell whether it is time to look at pictures."""
        return time.monotonic() - self._last_panel > self._panel_seconds

    def wants_checkpoint(self) -> bool:
        """Tell whether it is time to save."""
        return time.monotonic() - self._last_checkpoint > self._checkpoint_seconds

    def has_saved(self) -> None:
        """Begin to count anew until the next checkpoint."""
        self._last_checkpoint = time.monotonic()

    def has_reported(self, *, looked: bool) -> None:
        """Begin to count anew until the next report, and the next panel if there was one."""
        self._started = time.monotonic()
        self._reports += 1
        if looked:
            self._last_panel = self._started

    def take_means(self) -> tuple[dict[str, float], float]:
        """Give the terms' means and the images a second since the last report."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        speed = self._images / max(1e-9, time.monotonic() - self._started)
        self._sums, self._images = {}, 0
        return means, speed
