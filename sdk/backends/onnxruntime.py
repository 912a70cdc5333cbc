"""ONNX Runtime: the CPU provider; onnxruntime_cuda.py has the other."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from . import Backend, HostBackend, Request, thread_count
from .forking import spared

LOG = logging.getLogger(__name__)
# ONNX Runtime has no exception type for it; these are the words of its allocators.
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "CUDA failure 2")


def open_backend(request: Request) -> Backend:
    """Open a session on the device asked for; "auto" is the first GPU where ONNX Runtime can use one.

    Raises: BackendUnavailable if ONNX Runtime, the provider or the precision is not there.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise BackendUnavailable("onnxruntime is not installed: pip install 'sr-sdk[cpu]' or 'sr-sdk[gpu]'") from exc
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if request.device.startswith("cuda"):
        if not has_cuda:
            raise BackendUnavailable(
                "this onnxruntime has no CUDA provider: pip install 'sr-sdk[gpu]' in a fresh environment"
            )
        return _open_cuda(onnxruntime, request)
    if request.device == "auto" and has_cuda:
        try:
            return _open_cuda(onnxruntime, replace(request, device="cuda:0"))
        except BackendUnavailable as exc:
            LOG.warning("onnxruntime runs on the CPU: %s", exc)
    precision = "fp32" if request.precision == "auto" else request.precision
    if precision not in ("fp32", "int8"):  # its CPU provider computes fp16 graphs in fp32
        raise BackendUnavailable(f"onnxruntime does not compute in {precision} on the CPU")
    if precision == "int8":
        if not request.stage.has_graph(precision=precision, ends=request.ends):
            raise BackendUnavailable(request.stage.lack_of(precision=precision, ends=request.ends))
        # It has 8-bit convolutions only with 8-bit results, which would cost precision on every other engine too.
        LOG.warning("onnxruntime's CPU provider multiplies 8-bit values in fp32, slower than fp32: OpenVINO is faster")
    return OnnxRuntimeBackend(onnxruntime, _graph(request, precision), precision=precision)


def _open_cuda(onnxruntime: Any, request: Request) -> Backend:
    from .onnxruntime_cuda import OnnxRuntimeCudaBackend, open_device

    precision = request.precision
    if precision == "auto":
        precision = "fp16" if request.stage.has_graph(precision="fp16", ends=request.ends) else "fp32"
    if precision in ("bf16", "int8"):
        raise BackendUnavailable(f"onnxruntime does not compute in {precision} on CUDA")
    device = open_device(int(request.device.removeprefix("cuda:")))
    return OnnxRuntimeCudaBackend(
        onnxruntime, device, _graph(request, precision), scale=request.scale, precision=precision
    )


def _graph(request: Request, precision: str) -> str:
    return str(request.folder / request.stage.graph(precision=precision, ends=request.ends).file.name)


class OnnxRuntimeBackend(HostBackend):
    """One inference session on the CPU; `run` is thread-safe because a session is."""

    name = "onnxruntime"

    def __init__(self, onnxruntime: Any, graph: str, *, precision: str):
        self.precision = precision
        self.engine = f"onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count() or 0  # 0: one for each core, whatever the process may use
        options.enable_mem_pattern = False  # twice the memory, and a plan kept for every size of picture
        options.log_severity_level = 4  # errors arrive as exceptions
        try:
            self._session: Any = spared(
                onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            )
        except Exception as exc:  # ONNX Runtime raises its own classes straight below Exception
            raise translate(exc, f"{graph} cannot be loaded") from exc
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        session = self._session  # close() in another thread lets this run finish
        if session is None:
            raise BackendError("this backend is closed")
        try:
            (output,) = session.run(None, {self._input: batch})
        except Exception as exc:
            raise translate(exc, f"a batch of shape {batch.shape} failed") from exc
        return np.asarray(output)

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """See Backend.expect: one session runs every shape alike."""

    def close(self) -> None:
        """See Backend.close."""
        self._session = None


def translate(exc: Exception, what: str) -> BackendError:
    """Make an error of ours from what ONNX Runtime raised."""
    text = str(exc)
    if isinstance(exc, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return OutOfMemory(f"onnxruntime: {what}: out of memory")
    return BackendError(f"onnxruntime: {what}: {' '.join(text.split())}")
