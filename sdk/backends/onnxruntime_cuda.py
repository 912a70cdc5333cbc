"""ONNX Runtime's CUDA provider: buffers that stay where they are, copies beside the computing, CUDA graphs.

A run fills an input buffer on the device, computes, and empties an output buffer. Runs share one session, which
computes one batch at a time; each has a lane of its own, so that the copies of one pass while another computes.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from . import Transfer
from .cuda import Buffer, Device, open_device
from .forking import spared
from .locks import SharedLock
from .onnxruntime import translate
from .recurring import Recurring

__all__ = ["OnnxRuntimeCudaBackend", "open_device"]
BATCH = 8
LANES = 2  # one computes while the other copies
KEPT_BINDINGS = 16  # shapes of one lane
MAX_GRAPHS = 16  # of one session: ONNX Runtime frees a captured graph only with the session
NO_GRAPH = -1  # ONNX Runtime's id for a run that neither captures nor replays

# ONNX Runtime captures in CUDA's global mode, which other calls of the process can spoil: it is done alone.
_calls = SharedLock()


class OnnxRuntimeCudaBackend:
    """One session on one GPU."""

    name = "onnxruntime"
    batch = BATCH
    lanes = LANES

    def __init__(self, onnxruntime: Any, device: Device, graph: str, *, scale: int, precision: str):
        self.device = f"cuda:{device.index}"
        self.precision = precision
        self.engine = f"onnxruntime {onnxruntime.__version__}"
        self.gpu = device
        self._scale = scale
        self._session: Any = spared(_open_session(onnxruntime, graph, device.index))
        self._run_options = onnxruntime.RunOptions
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name
        self._computing = threading.Lock()  # replays of one session must not overlap
        self._recurring = Recurring()
        self._graphs = 0  # ids given away
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(LANES):
            self._idle.put(_Lane(device))
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

    def on_device(self, index: int | None) -> OnnxRuntimeCudaBackend:
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
        with self._computing:
            self._session = None
        for _ in range(LANES):
            with self._lane(closing=True):
                pass

    @contextlib.contextmanager
    def _lane(self, *, closing: bool = False) -> Iterator[_Lane]:
        """Wait for an idle lane; it is emptied once the backend is closed."""
        lane = self._idle.get()
        try:
            if self._session is None and not closing:
                raise BackendError("this backend is closed")
            yield lane
        finally:
            if self._session is None:
                lane.free()
            self._idle.put(lane)

    def _run(self, lane: _Lane, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        with _calls.shared():
            try:
                lane.reserve(*(math.prod(side) * dtype.itemsize for side in (shape, self._output_shape(shape))))
            except OutOfMemory:  # what is run next will be smaller
                lane.free()
                self._free_idle()
                raise
            fill(self.gpu, lane.input.address, lane.stream)
            self.gpu.synchronize(lane.stream)
        with self._computing:
            if self._session is None:
                raise BackendError("this backend is closed")
            graph, is_new = self._graph_of(lane, shape)
            options = self._run_options()
            options.add_run_config_entry("gpu_graph_id", str(graph))
            try:
                with _calls.alone() if is_new else _calls.shared():
                    # Returns when the output is there.
                    self._session.run_with_iobinding(self._binding_of(lane, shape, dtype), options)
            except Exception as exc:
                lane.forget()
                raise translate(exc, f"a batch of shape {shape} failed") from exc
        with _calls.shared():
            take(self.gpu, lane.output.address, lane.stream)
            self.gpu.synchronize(lane.stream)

    def _free_idle(self) -> None:
        """Give back the memory of the lanes that nobody uses now."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for lane in idle:
            lane.free()
            self._idle.put(lane)

    def _graph_of(self, lane: _Lane, shape: tuple[int, ...]) -> tuple[int, bool]:
        """Give the id of the CUDA graph for a shape in a lane, and whether the next run captures it."""
        if not self._recurring.comes(shape):
            return NO_GRAPH, False
        if shape in lane.graphs:
            return lane.graphs[shape], False
        if self._graphs == MAX_GRAPHS:
            return NO_GRAPH, False
        lane.graphs[shape] = self._graphs
        self._graphs += 1
        return lane.graphs[shape], True

    def _binding_of(self, lane: _Lane, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Give the binding of a lane's buffers in a shape."""
        if shape not in lane.bindings:
            binding = self._session.io_binding()
            place = ("cuda", self.gpu.index, dtype)
            binding.bind_input(self._input, *place, shape, lane.input.address)
            binding.bind_output(self._output, *place, self._output_shape(shape), lane.output.address)
            lane.bindings[shape] = binding
            if len(lane.bindings) > KEPT_BINDINGS:
                lane.bindings.popitem(last=False)
        return lane.bindings[shape]

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        count, height, width, channels = shape
        return count, height * self._scale, width * self._scale, channels


class _Lane:
    """What one run at a time uses: buffers on both sides, and a stream for its copies."""

    def __init__(self, device: Device):
        self._device = device
        self.stream = device.new_stream()
        self.input, self.output = Buffer(device), Buffer(device)
        self._staged_in = self._staged_out = np.empty(0, np.uint8)  # page-locked when they are needed
        self.bindings: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.graphs: dict[tuple[int, ...], int] = {}  # shape -> id of its CUDA graph

    def reserve(self, input_bytes: int, output_bytes: int) -> None:
        """Make room on the device. Bindings and graphs hold addresses: they go when a buffer moves."""
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
        """Drop what holds addresses: bindings and graphs are made anew."""
        self.bindings.clear()
        self.graphs.clear()

    def free(self) -> None:
        """Give the memory back."""
        self.forget()
        self.input.free()
        self.output.free()
        self._staged_in = self._staged_out = np.empty(0, np.uint8)


def _open_session(onnxruntime: Any, graph: str, index: int) -> Any:
    """Open a session that computes on the GPU alone: what it cannot do there is an error, not done on the CPU."""
    if hasattr(onnxruntime, "preload_dlls"):  # CUDA and cuDNN from NVIDIA's wheels; it prints what it does not find
        with contextlib.redirect_stdout(None):
            onnxruntime.preload_dlls()
    cuda = {
        "device_id": str(index),
        "use_tf32": "0",  # keeps 10 bits: fp32 is the path of 16-bit pictures
        "cudnn_conv_algo_search": "HEURISTIC",  # sizes change
        "arena_extend_strategy": "kSameAsRequested",  # not in powers of two
        "enable_cuda_graph": "1",
    }
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions; a fallback is checked for
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[("CUDAExecutionProvider", cuda)])
    except Exception as exc:  # ONNX Runtime raises its own classes straight below Exception
        if "assigned to the default CPU EP" in str(exc):
            raise BackendUnavailable(
                f"onnxruntime cannot use cuda:{index}: its CUDA provider could not be loaded, or lacks something that "
                "the model needs; pip install 'sr-sdk[gpu]' brings the CUDA and cuDNN that fit"
            ) from exc
        raise translate(exc, f"{graph} cannot be loaded on cuda:{index}") from exc
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise BackendUnavailable(
            f"onnxruntime cannot use cuda:{index} (it fell back to {session.get_providers()[0]}); "
            "check the driver and the CUDA libraries, or use device='cpu'"
        )
    return session
