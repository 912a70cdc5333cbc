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
RECEIVING = 4  # bodies that may be coming in for each place


class Desk:
    """Takes requests in, a bounded number at a time, and hands them to its threads in order.

    workers: threads. places: requests under way, from when their picture is there until their result is gone.
    Thread-safe.
    """

    def __init__(self, models: Models, *, workers: int, places: int):
        self._models, self._workers, self._places = models, workers, places
        self._pool = ThreadPoolExecutor(workers, "sr-request")
        self._lock = threading.Lock()
        self._mean_s = 1.0
        self._submitted: set[Watch] = set()
        self._working: set[Watch] = set()
        self.taken = self.receiving = 0

    @contextmanager
    def receive(self, *, needs_place: bool) -> Iterator[None]:
        """Let a picture come in.

        needs_place: for a request that is answered at once, not for a job.
        Raises: Failure if there is no place, or too many come in.
        """
        with self._lock:
            is_full = needs_place and self.taken >= self._places
            if is_full or self.receiving >= RECEIVING * self._places:
                raise self._busy()
            self.receiving += 1
        try:
            yield
        finally:
            with self._lock:
                self.receiving -= 1

    def take_place(self) -> None:
        """Hold a place for a request, until `give_back`. Raises: Failure with when to come again."""
        with self._lock:
            if self.taken >= self._places:
                raise self._busy()
            self.taken += 1

    def give_back(self) -> None:
        """Give a place back."""
        with self._lock:
            self.taken -= 1

    def _busy(self) -> Failure:
        wait_s = min(MAX_RETRY_S, math.ceil(self._mean_s * self._places / self._workers))
        return Failure(429, f"{self.taken} requests are under way: try again later", retry_after_s=wait_s)

    def submit(self, order: Order, source: Path, watch: Watch) -> Future[Path]:
        """Have an order carried out on a file, which is removed. The future gives the result's file.

        It raises Failure, or Stopped.
        """
        with self._lock:
            self._submitted.add(watch)
        future = self._pool.submit(self._work, order, source, watch)

        def end(_: Future[Path]) -> None:
            source.unlink(missing_ok=True)
            with self._lock:
                self._submitted.discard(watch)

        future.add_done_callback(end)
        return future

    def _work(self, order: Order, source: Path, watch: Watch) -> Path:
        started = time.monotonic()
        with self._lock:
            self._working.add(watch)
        try:
            return self._models.enlarge(order, source, watch)
        finally:
            with self._lock:
                self._working.discard(watch)
                self._mean_s += SMOOTHING * (time.monotonic() - started - self._mean_s)

    @property
    def working(self) -> int:
        """How many requests are being worked on."""
        return len(self._working)

    @property
    def is_stuck(self) -> bool:
        """Whether all threads are at work that nobody waits for, in steps that cannot be stopped."""
        with self._lock:
            return sum(watch.is_over for watch in self._working) >= self._workers

    def stop(self) -> None:
        """Stop the work on every request; those that wait for it are told."""
        with self._lock:
            for watch in self._submitted:
                watch.stop()

    def close(self, stop_s: float) -> bool:
        """End the threads; no request is under way any more. Returns: False if one cannot be stopped within a time."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        ends = time.monotonic() + stop_s
        while self._working and time.monotonic() < ends:
            time.sleep(0.01)
        return not self._working


def discard(future: Future[Path]) -> None:
    """Remove the result of a request that nobody waits for, now or when it comes."""

    def remove(done: Future[Path]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().unlink(missing_ok=True)

    future.cancel()
    future.add_done_callback(remove)
