"""Batches that calls in several threads share: what waits for the engine goes into its next run together.

Nothing waits for company: a batch is what has come while the engine was busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .errors import BackendError, OutOfMemory

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """One caller's windows. outputs: None until they have been run, and for good if the batch they were in failed."""

    inputs: np.ndarray
    outputs: np.ndarray | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def fits(self, other: _Call) -> bool:
        """Tell whether the windows of both can stand in one batch."""
        return (self.inputs.shape[1:], self.inputs.dtype) == (other.inputs.shape[1:], other.inputs.dtype)


class SharedBatches:
    """Runs windows for many threads, at most `lanes` batches at a time.

    engine: (N, h, w, C) -> (N, h*scale, w*scale, C). most: gives how many windows a batch may have now.
    Thread-safe.
    """

    def __init__(self, engine: Callable[[np.ndarray], np.ndarray], *, lanes: int, most: Callable[[], int]):
        self._engine, self._most = engine, most
        self._lanes = threading.Semaphore(lanes)
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []  # in the order in which they came

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Run windows, with those of other callers that wait too.

        Raises: what the engine raises for these windows alone.
        """
        call = _Call(inputs)
        with self._lock:
            self._waiting.append(call)
        with self._lanes:
            batch = self._take(call)
            if batch:
                self._run(batch)
        call.done.wait()
        if call.outputs is not None:
            return call.outputs
        with self._lanes:
            return self._engine(inputs)

    def _take(self, call: _Call) -> list[_Call]:
        """Take a call and what fits into one batch with it; nothing if another thread has taken it."""
        with self._lock:
            if call not in self._waiting:
                return []
            batch, count = [call], len(call.inputs)
            for other in self._waiting:
                if other is not call and other.fits(call) and count + len(other.inputs) <= self._most():
                    batch.append(other)
                    count += len(other.inputs)
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            return batch

    def _run(self, batch: list[_Call]) -> None:
        """Run a batch, and give every caller its part. Raises: what the engine raises, for a call that is alone."""
        try:
            if len(batch) == 1:
                batch[0].outputs = self._engine(batch[0].inputs)
                return
            outputs = self._engine(np.concatenate([call.inputs for call in batch]))
            ends = np.cumsum([len(call.inputs) for call in batch])[:-1]
            for call, part in zip(batch, np.split(outputs, ends), strict=True):
                call.outputs = part
        except BackendError as exc:
            if len(batch) == 1:
                raise
            LOG.warning("a batch of %d calls failed, each is run alone: %s", len(batch), exc)
            if isinstance(exc, OutOfMemory):
                self._shrink(sum(len(call.inputs) for call in batch))
        finally:
            for call in batch:
                call.done.set()

    def _shrink(self, count: int) -> None:
        """After a lack of memory, let batches of several calls have half as many windows."""
        most, half = self._most, count // 2
        self._most = lambda: min(half, most())
