"""ONNX Runtime's CUDA provider: buffers that stay where they are, copies beside the computing, CUDA graphs.

Runs share one session, which computes one batch at a time; each has a lane of its own, so that the copies of one pass
while another computes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable
from . import Transfer
from .cuda import Device, calls, open_device
from .forking import spared
from .gpu import GpuBackend, Lane
from .onnxruntime import translate

__all__ = ["OnnxRuntimeCudaBackend", "open_device"]
BATCH = 8
LANES = 2  # one computes while the other copies
KEPT_BINDINGS = 16  # shapes of one lane
MAX_GRAPHS = 16  # of one session: ONNX Runtime frees a captured graph only with the session
NO_GRAPH = -1  # ONNX Runtime's id for a run that neither captures nor replays


class _Lane(Lane):
    """bindings: of the buffers, by shape; graphs: shape -> id of its CUDA graph."""

    def __init__(self, device: Device):
        super().__init__(device)
        self.bindings: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.graphs: dict[tuple[int, ...], int] = {}

    def forget(self) -> None:
        """See Lane."""
        self.bindings.clear()
        self.graphs.clear()


class OnnxRuntimeCudaBackend(GpuBackend[_Lane]):
    """One session on one GPU."""

    name = "onnxruntime"
    batch = BATCH

    def __init__(self, onnxruntime: Any, device: Device, graph: str, *, scale: int, precision: str):
        self.engine = f"onnxruntime {onnxruntime.__version__}"
        with calls.shared():
            self._session: Any = spared(_open_session(onnxruntime, graph, device.index))
        self._run_options = onnxruntime.RunOptions
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name
        self._computing = threading.Lock()  # replays of one session must not overlap
        self._graphs = 0  # ids given away
        super().__init__(device, [_Lane(device) for _ in range(LANES)], scale=scale, precision=precision)

    def close(self) -> None:
        """See Backend.close."""
        super().close()
        with self._computing, calls.shared():
            self._session = None

    def _run(self, lane: _Lane, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        """See GpuBackend."""
        self._reserve(lane, shape, dtype)
        fill(self.gpu, lane.input.address, lane.stream)
        self.gpu.synchronize(lane.stream)
        with self._computing:
            if self._session is None:
                raise BackendError("this backend is closed")
            graph, is_new = self._graph_of(lane, shape)
            options = self._run_options()
            options.add_run_config_entry("gpu_graph_id", str(graph))
            try:
                # A capture is in CUDA's global mode, which any other call of the process can spoil.
                with calls.alone() if is_new else calls.shared():
                    # Returns when the output is there.
                    self._session.run_with_iobinding(self._binding_of(lane, shape, dtype), options)
            except Exception as exc:
                lane.forget()
                raise translate(exc, f"a batch of shape {shape} failed") from exc
        take(self.gpu, lane.output.address, lane.stream)
        self.gpu.synchronize(lane.stream)

    def _graph_of(self, lane: _Lane, shape: tuple[int, ...]) -> tuple[int, bool]:
        """Give the id of the CUDA graph for a shape in a lane, and whether the next run captures it."""
        if not self._recurring.comes(shape) or not self._captures:
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
