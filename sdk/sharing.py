"""Batches that calls in several threads share: what waits for the engine goes into its next run together.

Nothing waits for company: a batch is what has come while the engine was busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import OutOfMemory

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """One caller's windows. outputs: None until they have been run, and for good if the batch they were in failed."""

    inputs: np.ndarray
    outputs: np.ndarray | None = None
    is_taken: bool = False
    is_done: bool = False

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
        self._free = lanes
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []  # in the order in which they came

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Run windows, with those of other callers that wait too.

        Raises: what the engine raises for these windows alone.
        """
        call = _Call(inputs)
        with self._changed:
            self._waiting.append(call)
            self._changed.wait_for(lambda: call.is_done or (self._free and not call.is_taken))
            batch = [] if call.is_done else self._take(call)
        if batch:
            self._run(batch)
        if call.outputs is not None:
            return call.outputs
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            self._free -= 1
        try:
            return self._engine(inputs)
        finally:
            self._give_back()

    def _take(self, call: _Call) -> list[_Call]:
        """Take a lane, a call, and what fits into one batch with it."""
        batch, count, most = [call], len(call.inputs), self._most()
        for other in self._waiting:
            if other is not call and other.fits(call) and count + len(other.inputs) <= most:
                batch.append(other)
                count += len(other.inputs)
        for taken in batch:
            taken.is_taken = True
            self._waiting.remove(taken)
        self._free -= 1
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
        except Exception as exc:
            if len(batch) == 1:
                raise
            # Whatever it is, it need not be every caller's: each is run alone, and told of its own.
            LOG.warning("a batch of %d calls failed, each is run alone: %s", len(batch), exc)
            if isinstance(exc, (OutOfMemory, MemoryError)):
                self._shrink(sum(len(call.inputs) for call in batch))
        finally:
            for call in batch:
                call.is_done = True
            self._give_back()

    def _give_back(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def _shrink(self, count: int) -> None:
        """After a lack of memory, let batches of several calls have half as many windows."""
        most, half = self._most, count // 2
        self._most = lambda: min(half, most())
