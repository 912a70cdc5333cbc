"""OpenVINO on the CPU: static shapes for windows that come again, bfloat16 where the processor has it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from . import HostBackend, Request, thread_count
from .engine_cache import cache_dir
from .forking import spared
from .recurring import OFTEN, Recurring

LOG = logging.getLogger(__name__)
MIN_BF16_PSNR_DB = 45.0
KEPT_SHAPES = 3  # that stay compiled: each holds some 13 MB, and the buffers of its requests
CACHE_BYTES = 512 << 20  # of compiled models on disk
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of int8 graphs: what they leave in floating point


def prune_cache(folder: Path) -> None:
    """Delete the oldest compiled models until the folder holds at most CACHE_BYTES."""
    found = []
    for path in folder.glob("*.blob"):
        with contextlib.suppress(OSError):  # another process prunes too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= CACHE_BYTES:
            return
        total -= size
        with contextlib.suppress(OSError):
            path.unlink()


def open_backend(request: Request) -> OpenVinoBackend:
    """Open a graph on the CPU.

    precision "auto" is bf16 where the processor multiplies it and the bundle's parity table allows it, never int8; the
    float graph always runs in fp32.
    Raises: BackendUnavailable if OpenVINO, the device or the precision is not there; BackendError in the child of a
    process that used OpenVINO before the fork.
    """
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailable("openvino is not installed: pip install 'sr-sdk[cpu]'") from exc
    if request.device.startswith("cuda"):
        raise BackendUnavailable("openvino has no CUDA device: use device='cpu'")
    try:
        with _one_core:
            process, core = _core(openvino)
        if process != os.getpid():
            raise BackendError(
                "openvino was used before this process was forked, and its threads did not come along: use it first "
                "in the worker process, or start workers with multiprocessing's 'spawn'"
            )
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as exc:
        raise BackendUnavailable(f"openvino has no usable CPU device: {' '.join(str(exc).split())}") from exc
    precision = request.precision
    if precision == "auto":
        trusted = any(row.precision == "bf16" and row.psnr_db >= MIN_BF16_PSNR_DB for row in request.stage.parity)
        precision = "bf16" if has_bf16 and trusted and request.ends == "uint8" else "fp32"
    if precision not in HINTS or (precision == "bf16" and not has_bf16):
        raise BackendUnavailable(f"openvino does not run {precision} on this processor: use fp32")
    arithmetic = "int8" if precision == "int8" else "fp32"  # bf16 is made of the fp32 graph
    if arithmetic == "int8" and not request.stage.has_graph(precision="int8", ends=request.ends):
        raise BackendUnavailable(request.stage.lack_of(precision="int8", ends=request.ends))
    graph = request.folder / request.stage.graph(precision=arithmetic, ends=request.ends).file.name
    return OpenVinoBackend(openvino, core, graph, precision=precision, stride=request.stage.stride)


_one_core = threading.Lock()


@functools.cache
def _core(openvino: Any) -> tuple[int, Any]:
    """Make the process's one Core, and say which process made it.

    Each Core puts a signal stack in place and restores the one before when it goes; with several of them that one
    may be gone too, and the next signal would end the process.
    """
    return os.getpid(), spared(openvino.Core())


class OpenVinoBackend(HostBackend):
    """Runs any shape at once, and compiles the graph for shapes that come often (tiles, video frames).

    A static shape runs up to a quarter faster, and compiling it takes as long as that saves in some three runs. The
    pixels are the same both ways, but in int8: there OpenVINO 2026.4 gives wrong ones for shapes that are free, of
    convolutions without a bias, and every shape is compiled.
    """

    name = "openvino"

    def __init__(self, openvino: Any, core: Any, graph: Path, *, precision: str, stride: int):
        self.precision = precision
        self._stride = stride
        self.engine = f"openvino {openvino.__version__.split('-')[0]}"
        self._core, self._graph = core, graph
        self._config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads := thread_count():
            self._config["INFERENCE_NUM_THREADS"] = threads
        # Without a limit it would keep what it prepares for every shape that ever comes.
        self._config["CPU_RUNTIME_CACHE_CAPACITY"] = 0
        self._any_shape: _Requests | None = None
        self._recurring = Recurring()
        self._shapes: OrderedDict[tuple[int, ...], _Requests] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        try:
            folder = cache_dir("openvino")
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} is not writable")
            self._config["CACHE_DIR"] = str(folder)
        except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: a user without a home folder
            LOG.warning("compiled models are not kept: %s; set SR_CACHE_DIR to a writable folder", exc)

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        if any(side % self._stride for side in batch.shape[1:3]):
            # On one core OpenVINO 2026.4 does not notice, and reads memory that is not the picture's.
            raise BackendError(f"openvino: a batch of shape {batch.shape} is not on the grid of {self._stride} px")
        with _told(batch.shape):
            return self._requests(batch.shape).run(np.ascontiguousarray(batch))

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """See Backend.expect: compiles for the shape if that pays."""
        if runs >= OFTEN:
            with _told(shape), self._lock:
                self._compiled(shape)

    def close(self) -> None:
        """See Backend.close."""
        with self._lock:
            self._closed = True
            self._any_shape = None
            self._shapes.clear()

    def _requests(self, shape: tuple[int, ...]) -> _Requests:
        """Choose what runs a batch: the graph compiled for its shape, or the one for any."""
        with self._lock:
            if self._recurring.comes(shape) or shape in self._shapes or self.precision == "int8":
                return self._compiled(shape)
            self._refuse_if_closed()
            self._any_shape = self._any_shape or self._compile(None)
            return self._any_shape

    def _compiled(self, shape: tuple[int, ...]) -> _Requests:
        """Give the graph compiled for a shape, under the lock."""
        self._refuse_if_closed()
        if shape not in self._shapes:
            self._any_shape = None  # what it holds is as large as what comes now
            while len(self._shapes) >= KEPT_SHAPES:
                self._shapes.popitem(last=False)
            self._shapes[shape] = self._compile(shape)
        self._shapes.move_to_end(shape)
        return self._shapes[shape]

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BackendError("this backend is closed")

    def _compile(self, shape: tuple[int, ...] | None) -> _Requests:
        model = self._core.read_model(self._graph)
        if shape:
            model.reshape(list(shape))
        compiled = _Requests(self._core.compile_model(model, "CPU", self._config))
        if "CACHE_DIR" in self._config:
            prune_cache(Path(self._config["CACHE_DIR"]))
        return compiled


@contextlib.contextmanager
def _told(shape: tuple[int, ...]) -> Iterator[None]:
    """Turn what OpenVINO raises into an error of ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        text = " ".join(str(exc).split())
        if isinstance(exc, MemoryError) or "bad_alloc" in text or "allocate" in text.lower():
            raise OutOfMemory(f"openvino: a batch of shape {shape}: out of memory") from exc
        raise BackendError(f"openvino: a batch of shape {shape} failed: {text}") from exc


class _Requests:
    """A compiled model with a pool of infer requests, so that threads never share one."""

    def __init__(self, compiled: Any):
        self._compiled = spared(compiled)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, batch: np.ndarray) -> np.ndarray:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = spared(self._compiled.create_infer_request())
        # share_inputs spares a copy; the output is copied, because the request's buffer is used again.
        request.infer([batch], share_inputs=True)
        output = np.array(request.get_output_tensor().data)
        self._idle.put(request)
        return output
