"""What engines on a GPU have in common: lanes of buffers, page-locked staging, pictures that stay on the GPU."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from . import DeviceBackend, Transfer
from .cuda import Buffer, Device
from .forking import spared
from .recurring import Recurring

AnyLane = TypeVar("AnyLane", bound="Lane")


class Lane:
    """What one run at a time uses: buffers on both sides, and a stream."""

    def __init__(self, device: Device):
        self._device = device
        self.stream = device.new_stream()
        self.input, self.output = Buffer(device), Buffer(device)
        self._staged_in = self._staged_out = np.empty(0, np.uint8)  # page-locked when they are needed

    def reserve(self, input_bytes: int, output_bytes: int) -> None:
        """Make room on the device."""
        if input_bytes > self.input.size or output_bytes > self.output.size:
            self.forget()
            self.input.reserve(input_bytes)
            self.output.reserve(output_bytes)

    def stage_in(self, batch: np.ndarray) -> np.ndarray:
        """Copy a batch into page-locked memory."""
        if batch.nbytes > self._staged_in.nbytes:
            self._staged_in = self._device.page_locked(batch.nbytes)
        staged = self._staged_in[: batch.nbytes].view(batch.dtype).reshape(batch.shape)
        np.copyto(staged, batch)
        return staged

    def stage_out(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Give page-locked memory for a result; the next run of this lane uses it again."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._staged_out.nbytes:
            self._staged_out = self._device.page_locked(size)
        return self._staged_out[:size].view(dtype).reshape(shape)

    def forget(self) -> None:
        """Drop what holds addresses of the buffers: they move, or go."""

    def free(self) -> None:
        """Give the memory back."""
        self.forget()
        self.input.free()
        self.output.free()
        self._staged_in = self._staged_out = np.empty(0, np.uint8)

    def close(self) -> None:
        """Give everything back; the lane is not used again."""
        self.free()


class GpuBackend(Generic[AnyLane]):
    """An engine on one GPU. A run fills the input buffer of a lane, computes, and empties its output buffer.

    What recurs is run as a CUDA graph, unless SR_CUDA_GRAPHS is 0.
    """

    name: str
    engine: str
    batch: int
    max_batch: int | None = None
    max_side: int | None = None
    is_checked = False

    def __init__(self, gpu: Device, lanes: Sequence[AnyLane], *, scale: int, precision: str):
        self.gpu = gpu
        self.device = f"cuda:{gpu.index}"
        self.precision = precision
        self.lanes = len(lanes)
        self._scale = scale
        self._closed, self._closing = False, threading.Lock()
        self._captures = os.environ.get("SR_CUDA_GRAPHS") != "0"
        self._recurring = Recurring()
        self._idle: queue.SimpleQueue[AnyLane] = queue.SimpleQueue()
        for lane in lanes:
            self._idle.put(lane)
        spared(self)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        batch = np.ascontiguousarray(batch)
        shape = self._output_shape(batch.shape)
        results: list[np.ndarray] = []

        def fill(device: Device, address: int, stream: int) -> None:
            device.upload(address, lane.stage_in(batch), stream)

        def take(device: Device, address: int, stream: int) -> None:
            staged = lane.stage_out(shape, batch.dtype)
            device.download(staged, address, stream)
            device.synchronize(stream)
            results.append(staged.copy())

        with self._lane() as lane:
            self._run(lane, batch.shape, batch.dtype, fill, take)
        return results[0]

    def run_on_device(self, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        """See DeviceBackend.run_on_device."""
        with self._lane() as lane:
            self._run(lane, shape, dtype, fill, take)

    def on_device(self, index: int | None) -> DeviceBackend:
        """See Backend.on_device."""
        if index not in (None, self.gpu.index):
            raise BackendUnavailable(f"the picture is on cuda:{index}, the engine on {self.device}")
        return self

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """See Backend.expect: a shape that comes often is run as a CUDA graph."""
        self._recurring.expect(shape, runs=runs)

    def free_bytes(self) -> int:
        """See Backend.free_bytes."""
        return self.gpu.free_bytes()

    def close(self) -> None:
        """See Backend.close: lets runs that are under way finish."""
        self._closed = True
        with self._closing:
            lanes = [self._idle.get() for _ in range(self.lanes)]
            for lane in lanes:
                lane.close()
                self._idle.put(lane)

    def _run(self, lane: AnyLane, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        """Compute a batch in a lane; everything is done when this returns."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _lane(self) -> Iterator[AnyLane]:
        """Wait for an idle lane."""
        lane = self._idle.get()
        try:
            if self._closed:
                raise BackendError("this backend is closed")
            yield lane
        finally:
            self._idle.put(lane)

    def _reserve(self, lane: AnyLane, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Make room for a batch in a lane. Raises: OutOfMemory, after which what nobody uses is given back."""
        try:
            lane.reserve(*(math.prod(sides) * dtype.itemsize for sides in (shape, self._output_shape(shape))))
        except OutOfMemory:  # what is run next will be smaller
            lane.free()
            self._free_idle()
            raise

    def _free_idle(self) -> None:
        """Give back the memory of the lanes that nobody uses now."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for lane in idle:
            lane.free()
            self._idle.put(lane)

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        count, height, width, channels = shape
        return count, height * self._scale, width * self._scale, channels
