"""Requests that are answered with the result: a bounded number at a time, and the threads that work on them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .models import Models
from .orders import Failure, Order, Watch

SMOOTHING = 0.1  # weight of the latest request in the running mean of how long they take
MAX_RETRY_S = 60


class Desk:
    """Takes requests in, a bounded number at a time, and hands them to its threads in order.

    workers: threads. places: requests under way, those that wait or are still being received among them.
    Thread-safe.
    """

    def __init__(self, models: Models, *, workers: int, places: int):
        self._models, self._workers, self._places = models, workers, places
        self._pool = ThreadPoolExecutor(workers, "sr-request")
        self._lock = threading.Lock()
        self._mean_s = 1.0
        self.taken = self.working = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a request. Raises: Failure with when to come again if there is none."""
        with self._lock:
            if self.taken >= self._places:
                wait_s = min(MAX_RETRY_S, math.ceil(self._mean_s * self._places / self._workers))
                raise Failure(429, f"{self.taken} requests are under way: try again later", retry_after_s=wait_s)
            self.taken += 1
        try:
            yield
        finally:
            with self._lock:
                self.taken -= 1

    def submit(self, order: Order, source: Path, watch: Watch) -> Future[Path]:
        """Have an order carried out on a file, which is removed. The future gives the result's file.

        It raises Failure, or Stopped.
        """
        future = self._pool.submit(self._work, order, source, watch)
        future.add_done_callback(lambda _: source.unlink(missing_ok=True))
        return future

    def _work(self, order: Order, source: Path, watch: Watch) -> Path:
        started = time.monotonic()
        with self._lock:
            self.working += 1
        try:
            return self._models.enlarge(order, source, watch)
        finally:
            with self._lock:
                self.working -= 1
                self._mean_s += SMOOTHING * (time.monotonic() - started - self._mean_s)

    def close(self) -> None:
        """End the threads; no request is under way any more."""
        self._pool.shutdown(cancel_futures=True)


def discard(future: Future[Path]) -> None:
    """Remove the result of a request that nobody waits for, now or when it comes."""

    def remove(done: Future[Path]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().unlink(missing_ok=True)

    future.cancel()
    future.add_done_callback(remove)
