"""Several GPUs as one: each batch of windows goes to the one that is idle."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BackendUnavailable

if TYPE_CHECKING:
    from . import Backend, DeviceBackend


class Several:
    """Backends of one engine and graph on different devices. A batch is computed whole by one of them."""

    is_checked = True  # each has been

    def __init__(self, backends: Sequence[Backend]):
        first = backends[0]
        self.name, self.precision, self.engine, self.batch = first.name, first.precision, first.engine, first.batch
        self.device = "cuda:" + ",".join(backend.device.removeprefix("cuda:") for backend in backends)
        self.lanes = sum(backend.lanes for backend in backends)
        self.max_batch = min((most for backend in backends if (most := backend.max_batch)), default=None)
        self.max_side = min((side for backend in backends if (side := backend.max_side)), default=None)
        self._backends = list(backends)
        self._idle: queue.SimpleQueue[Backend] = queue.SimpleQueue()
        for _ in range(max(backend.lanes for backend in backends)):  # all devices once before any takes a second batch
            for backend in backends:
                self._idle.put(backend)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        backend = self._idle.get()
        try:
            return backend.run(batch)
        finally:
            self._idle.put(backend)

    def on_device(self, index: int | None) -> DeviceBackend:
        """See Backend.on_device."""
        for backend in self._backends:
            if backend.device == f"cuda:{index}":
                return backend.on_device(index)
        where = "a GPU that its array does not name" if index is None else f"cuda:{index}"
        raise BackendUnavailable(f"the picture is on {where}, the engine on {self.device}")

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """See Backend.expect."""
        for backend in self._backends:
            backend.expect(shape, runs=runs)

    def free_bytes(self) -> int | None:
        """See Backend.free_bytes: of the fullest device."""
        return min((free for backend in self._backends if (free := backend.free_bytes()) is not None), default=None)

    def close(self) -> None:
        """See Backend.close."""
        for backend in self._backends:
            backend.close()
