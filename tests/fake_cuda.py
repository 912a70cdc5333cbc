"""GPUs made of host memory: what sdk uses of cuda-python, PyCUDA and ONNX Runtime's CUDA provider, without a driver.

A copy is done only when somebody waits for its stream, which is as late as a GPU may do it. What a GPU would punish
with wrong pixels or a crash is written into `Machine.faults`: memory that is not there, a run while its buffers are
still being copied, two runs of one session at once, a call while a CUDA graph is being captured.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sdk.backends import cuda

# What a thread must not call while it captures, of both libraries.
UNSAFE = {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaDeviceSynchronize", "cudaStreamSynchronize", "mem_alloc",
          "pagelocked_empty", "synchronize"}  # fmt: skip
ERRORS = {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35, "cudaErrorOther": 999}


NAME = "Stand-in GPU"
CONTEXTS = 1 << 40  # the handle of GPU 0's


class Short(Exception):
    """Too little memory."""


@dataclass
class Copy:
    """One that waits in a stream."""

    do: Callable[[], None]
    ranges: tuple[tuple[int, int], ...]  # addresses that it reads or writes, as (start, stop)


@dataclass
class Machine:
    """The GPUs and what became of them. limit: bytes of memory of each."""

    gpus: int = 2
    limit: int = 1 << 30
    faults: list[str] = field(default_factory=list)
    blocks: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)  # address -> GPU, memory
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    streams: dict[int, tuple[int, list[Copy]]] = field(default_factory=dict)
    copied: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0, "within": 0})
    runs: list[tuple[int, tuple[int, ...], str]] = field(default_factory=list)  # GPU, shape, "plain|capture|replay"
    capturing: int | None = None  # the thread that captures in ONNX Runtime, globally
    captures: dict[int, tuple[int, list[Copy]]] = field(default_factory=dict)  # stream -> thread, what it put there
    graphs: dict[int, list[Copy]] = field(default_factory=dict)  # captured ones, and those made ready to launch
    fails: Callable[[tuple[int, ...]], bool] = lambda shape: False

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.handles = itertools.count(1000)
        self.local = threading.local()

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def call(self, name: str) -> None:
        if self.capturing not in (None, threading.get_ident()):
            self.fault(f"{name} while a graph is captured")
        if name in ("cudaDeviceSynchronize", "Context.synchronize") and self.captures:
            self.fault("a wait for the whole device while a stream of it is captured")
        if name in UNSAFE and any(thread == threading.get_ident() for thread, _ in self.captures.values()):
            self.fault(f"{name} while its own thread captures a graph")

    def used(self, gpu: int) -> int:
        return sum(memory.nbytes for owner, memory in self.blocks.values() if owner == gpu)

    def allocate(self, gpu: int, size: int) -> int:
        with self.lock:
            if self.used(gpu) + size > self.limit:
                raise Short
            memory = np.full(size, 0xA5, np.uint8)
            self.blocks[memory.ctypes.data] = gpu, memory
            return memory.ctypes.data

    def free(self, address: int) -> None:
        with self.lock:
            if self.blocks.pop(address, None) is None:
                self.fault("freed twice")

    def check(self, gpu: int, address: int, size: int) -> bool:
        """Tell whether bytes are in one block of a GPU."""
        with self.lock:
            for start, (owner, memory) in self.blocks.items():
                if owner == gpu and start <= address and address + size <= start + memory.nbytes:
                    return True
        self.fault(f"GPU {gpu} has no {size} bytes at {address}")
        return False

    def stream(self, gpu: int) -> int:
        handle = next(self.handles)
        self.streams[handle] = gpu, []
        return handle

    def copy(self, kind: str, gpu: int, stream: int, *, target: int, source: int, size: int) -> None:
        self.copy_rows(kind, gpu, stream, target, size, source, size, size, 1)

    def copy_rows(
        self, kind: str, gpu: int, stream: int, target: int, target_pitch: int, source: int, source_pitch: int,
        width: int, rows: int,
    ) -> None:  # fmt: skip
        if self.streams[stream][0] != gpu:
            self.fault("a stream of another GPU")
        sides = [(target, target_pitch)] * (kind != "down") + [(source, source_pitch)] * (kind != "up")
        if not all(self.check(gpu, start, pitch * (rows - 1) + width) for start, pitch in sides):
            return
        if min(target_pitch, source_pitch) < width:
            self.fault("a pitch below the width")
        self.copied[kind] += width * rows

        def do() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        ranges = ((target, target + target_pitch * rows), (source, source + source_pitch * rows))
        self.push(stream, Copy(do, ranges))

    def push(self, stream: int, work: Copy) -> None:
        """Put work into a stream, or into the graph that is captured from it."""
        if stream in self.captures:
            thread, captured = self.captures[stream]
            if thread != threading.get_ident():
                self.fault("work of another thread in a stream that is captured")
            captured.append(work)
        else:
            self.streams[stream][1].append(work)

    def current(self) -> int:
        """Give the current GPU of this thread, whichever library set it."""
        stack = self.stack()
        return stack[-1] if stack else 0

    def stack(self) -> list[int]:
        """Give this thread's stack of contexts."""
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        return self.local.stack

    def begin_capture(self, stream: int) -> None:
        self.captures[stream] = threading.get_ident(), []

    def end_capture(self, stream: int) -> int:
        handle = next(self.handles)
        self.graphs[handle] = self.captures.pop(stream)[1]
        return handle

    def instantiate(self, graph: int) -> int:
        handle = next(self.handles)
        self.graphs[handle] = self.graphs[graph]
        return handle

    def launch(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.push(stream, work)

    def wait(self, stream: int | None = None, gpu: int | None = None) -> None:
        for handle, (owner, queue) in list(self.streams.items()):
            if handle == stream or (stream is None and owner == gpu):
                while queue:
                    queue.pop(0).do()

    def pending(self, address: int, size: int) -> bool:
        copies = [copy for _, queue in list(self.streams.values()) for copy in list(queue)]
        return any(start < address + size and address < stop for copy in copies for start, stop in copy.ranges)


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine, library: str = "cuda-python") -> None:
    """Let sdk find a machine through one of the two libraries."""
    if library == "pycuda":
        kind, module = cuda.PyCudaDevice, pycuda_driver(machine)
    else:
        kind, module = cuda.CudaPythonDevice, runtime(machine)
    monkeypatch.setattr(cuda, "LIBRARIES", ((library, "stand_in", kind),))
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(cuda, "load_driver", lambda: driver_library(machine))


def runtime(machine: Machine) -> Any:
    """Make a stand-in for the module cuda.bindings.runtime."""
    codes = types.SimpleNamespace(**ERRORS)
    kinds = types.SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down",
                                  cudaMemcpyDeviceToDevice="within")  # fmt: skip
    current = machine.current

    def answering(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def wrapped(*arguments: Any) -> tuple[Any, ...]:
            machine.call(function.__name__)
            try:
                result = function(*arguments)
            except Short:
                return codes.cudaErrorMemoryAllocation, None
            return (codes.cudaSuccess,) if result is None else (codes.cudaSuccess, *result)

        return wrapped

    class Functions:
        def cudaGetDeviceCount(self) -> tuple[int]:
            return (machine.gpus,)

        def cudaGetDeviceProperties(self, gpu: int) -> tuple[Any]:
            facts = types.SimpleNamespace(name=NAME.encode(), major=9, minor=0, totalGlobalMem=machine.limit)
            return (facts,)

        def cudaMemGetInfo(self) -> tuple[int, int]:
            return machine.limit - machine.used(current()), machine.limit

        def cudaMalloc(self, size: int) -> tuple[int]:
            return (machine.allocate(current(), size),)

        def cudaFree(self, address: int) -> None:
            machine.free(address)

        def cudaHostAlloc(self, size: int, flags: int) -> tuple[int]:
            memory = np.full(size, 0x5A, np.uint8)
            machine.pinned[memory.ctypes.data] = memory
            return (memory.ctypes.data,)

        def cudaFreeHost(self, address: int) -> None:
            del machine.pinned[address]

        def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int]:
            if flags != 1:
                machine.fault("a stream that waits for the default one")
            return (machine.stream(current()),)

        def cudaStreamDestroy(self, stream: int) -> None:
            if machine.streams[stream][0] != current():
                machine.fault("a stream of another context")
            del machine.streams[stream]

        def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> None:
            machine.copy(kind, current(), stream, target=target, source=source, size=size)

        def cudaMemcpy2DAsync(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int,
                              rows: int, kind: str, stream: int) -> None:  # fmt: skip
            machine.copy_rows(kind, current(), stream, target, target_pitch, source, source_pitch, width, rows)

        def cudaStreamSynchronize(self, stream: int) -> None:
            machine.wait(stream)

        def cudaDeviceSynchronize(self) -> None:
            machine.wait(gpu=current())

        def cudaStreamBeginCapture(self, stream: int, mode: str) -> None:
            if mode != "thread local":
                machine.fault(f"capture mode {mode}")
            machine.begin_capture(stream)

        def cudaStreamEndCapture(self, stream: int) -> tuple[int]:
            return (machine.end_capture(stream),)

        def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:
            return (machine.instantiate(graph),)

        def cudaGraphLaunch(self, graph: int, stream: int) -> None:
            machine.launch(graph, stream)

        def cudaGraphDestroy(self, graph: int) -> None:
            del machine.graphs[graph]

        def cudaGraphExecDestroy(self, graph: int) -> None:
            del machine.graphs[graph]

        def cudaGetLastError(self) -> None:
            pass

    functions = Functions()
    names = [name for name in dir(functions) if name.startswith("cuda")]
    return types.SimpleNamespace(
        cudaStreamCaptureMode=types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local"),
        cudaError_t=codes, cudaMemcpyKind=kinds, cudaHostAllocDefault=0, cudaStreamNonBlocking=1,
        cudaGetErrorString=lambda error: (0, f"error {error}".encode()),
        **{name: answering(getattr(functions, name)) for name in names},
    )  # fmt: skip


def pycuda_driver(machine: Machine) -> Any:
    """Make a stand-in for the module pycuda.driver."""
    stack = machine.stack

    def current() -> int:
        if not stack():
            machine.fault("no current context")
        return machine.current()

    class Error(Exception):
        pass

    class MemoryShort(Error):
        pass

    class Context:
        def __init__(self, gpu: int):
            self.gpu = gpu

        def push(self) -> None:
            stack().append(self.gpu)

        @staticmethod
        def pop() -> None:
            stack().pop()

        @staticmethod
        def synchronize() -> None:
            machine.call("Context.synchronize")
            machine.wait(gpu=current())

    class Device:
        def __init__(self, gpu: int):
            self.gpu = gpu

        @staticmethod
        def count() -> int:
            return machine.gpus

        def retain_primary_context(self) -> Context:
            return Context(self.gpu)

        def name(self) -> str:
            return NAME

        def compute_capability(self) -> tuple[int, int]:
            return 9, 0

        def total_memory(self) -> int:
            return machine.limit

    class Allocation:
        def __init__(self, address: int):
            self.address = address

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            current()
            machine.free(self.address)

    class PageLocked:
        """The base of an array. It does not free itself in a thread that has another current context."""

        def __init__(self, gpu: int, memory: np.ndarray):
            self.gpu, self.memory = gpu, memory
            self.__array_interface__ = memory.__array_interface__
            machine.pinned[memory.ctypes.data] = memory

        def free(self) -> None:
            if current() != self.gpu:
                machine.fault("page-locked memory of another context")
            del machine.pinned[self.memory.ctypes.data]

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            if flags != 1:
                machine.fault("a stream that waits for the default one")
            self.handle = machine.stream(current())

        def synchronize(self) -> None:
            machine.call("synchronize")
            machine.wait(self.handle)

        def __del__(self) -> None:
            if machine.streams[self.handle][0] != current():
                machine.fault("a stream of another context")
            del machine.streams[self.handle]

    class Memcpy2D:
        def set_src_device(self, address: int) -> None:
            self.source = address

        def set_dst_device(self, address: int) -> None:
            self.target = address

        def __call__(self, stream: Stream) -> None:
            machine.call("Memcpy2D")
            machine.copy_rows("within", current(), stream.handle, self.target, self.dst_pitch, self.source,
                              self.src_pitch, self.width_in_bytes, self.height)  # fmt: skip

    def mem_alloc(size: int) -> Allocation:
        machine.call("mem_alloc")
        try:
            return Allocation(machine.allocate(current(), size))
        except Short:
            raise MemoryShort("cuMemAlloc failed: out of memory") from None

    def pagelocked_empty(size: int, dtype: type) -> np.ndarray:
        machine.call("pagelocked_empty")
        return np.asarray(PageLocked(current(), np.full(size, 0x5A, dtype)))

    def memcpy_htod_async(target: int, source: np.ndarray, stream: Stream) -> None:
        machine.call("memcpy_htod_async")
        machine.copy("up", current(), stream.handle, target=target, source=source.ctypes.data, size=source.nbytes)

    def memcpy_dtoh_async(target: np.ndarray, source: int, stream: Stream) -> None:
        machine.call("memcpy_dtoh_async")
        machine.copy("down", current(), stream.handle, target=target.ctypes.data, source=source, size=target.nbytes)

    def mem_get_info() -> tuple[int, int]:
        return machine.limit - machine.used(current()), machine.limit

    return types.SimpleNamespace(
        Error=Error, MemoryError=MemoryShort, Context=Context, Device=Device, Stream=Stream, Memcpy2D=Memcpy2D,
        init=lambda: None, mem_alloc=mem_alloc, pagelocked_empty=pagelocked_empty, mem_get_info=mem_get_info,
        memcpy_htod_async=memcpy_htod_async, memcpy_dtoh_async=memcpy_dtoh_async,
    )  # fmt: skip


def driver_library(machine: Machine) -> Any:
    """Make a stand-in for CUDA's driver as ctypes loads it: of graphs, which PyCUDA lacks, and of contexts."""

    class Library:
        def cuDeviceGet(self, device: Any, gpu: Any) -> int:
            device._obj.value = gpu.value
            return 0

        def cuDevicePrimaryCtxRetain(self, context: Any, gpu: Any) -> int:
            context._obj.value = CONTEXTS + gpu.value
            return 0

        def cuCtxPushCurrent_v2(self, context: Any) -> int:
            machine.stack().append(context.value - CONTEXTS)
            return 0

        def cuCtxPopCurrent_v2(self, context: Any) -> int:
            context._obj.value = CONTEXTS + machine.stack().pop()
            return 0

        def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
            if mode.value != 1:
                machine.fault(f"capture mode {mode.value}")
            machine.begin_capture(stream.value)
            return 0

        def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
            graph._obj.value = machine.end_capture(stream.value)
            return 0

        def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
            executable._obj.value = machine.instantiate(graph.value)
            return 0

        def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
            machine.launch(graph.value, stream.value)
            return 0

        def cuGraphDestroy(self, graph: Any) -> int:
            del machine.graphs[graph.value]
            return 0

        def cuGraphExecDestroy(self, graph: Any) -> int:
            del machine.graphs[graph.value]
            return 0

    return Library()


def onnxruntime(machine: Machine, real: Any) -> Any:
    """Make a stand-in for the module onnxruntime, whose CUDA provider computes on the CPU."""

    class Binding:
        def bind_input(self, name: str, device: str, gpu: int, dtype: Any, shape: Any, address: int) -> None:
            self.input = (device, gpu, np.dtype(dtype), tuple(shape), address)

        def bind_output(self, name: str, device: str, gpu: int, dtype: Any, shape: Any, address: int) -> None:
            self.output = (device, gpu, np.dtype(dtype), tuple(shape), address)

    class Session:
        def __init__(self, graph: str, options: Any, providers: list[Any]):
            ((provider, self.options),) = providers
            assert provider == "CUDAExecutionProvider"
            assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            self.gpu = int(self.options["device_id"])
            self.session = real.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self.running = threading.Lock()
            self.captured: dict[str, Any] = {}

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_inputs(self) -> Any:
            return self.session.get_inputs()

        def get_outputs(self) -> Any:
            return self.session.get_outputs()

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            if not self.running.acquire(blocking=False):
                machine.fault("two runs of one session")
                return
            try:
                graph = options.get_run_config_entry("gpu_graph_id")
                buffers, how = (binding.input, binding.output), "plain"
                if graph != "-1" and self.options.get("enable_cuda_graph") == "1":
                    how = "replay" if graph in self.captured else "capture"
                    buffers = self.captured.setdefault(graph, buffers)
                if how == "capture":
                    machine.capturing = threading.get_ident()
                    time.sleep(0.01)  # so that others run into it
                self._compute(*buffers, how)
            finally:
                machine.capturing = None
                self.running.release()

        def _compute(self, source: Any, target: Any, how: str) -> None:
            machine.runs.append((self.gpu, source[3], how))
            if machine.fails(source[3]):
                raise RuntimeError("Failed to allocate memory for requested buffer of size 12")
            for device, gpu, dtype, shape, address in (source, target):
                size = int(np.prod(shape)) * dtype.itemsize
                if (device, gpu) != ("cuda", self.gpu):
                    machine.fault(f"bound to {device}:{gpu}")
                if not machine.check(self.gpu, address, size):
                    return
                if machine.pending(address, size):
                    machine.fault("a run while its buffer is copied")
            batch = array_at(*source[2:])
            (output,) = self.session.run(None, {self.session.get_inputs()[0].name: batch.copy()})
            if output.shape != target[3] or output.dtype != target[2]:
                machine.fault("the output is bound with another shape")
                return
            array_at(*target[2:])[...] = output

    return types.SimpleNamespace(
        __version__=real.__version__, SessionOptions=real.SessionOptions, RunOptions=real.RunOptions,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"], InferenceSession=Session,
        preload_dlls=lambda: print("not for the user"),
    )  # fmt: skip


def array_at(dtype: np.dtype, shape: tuple[int, ...], address: int) -> np.ndarray:
    """View memory as an array."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class Array:
    """A picture in a GPU's memory, as torch or CuPy have it; `pad` bytes stand between its rows."""

    def __init__(self, machine: Machine, image: np.ndarray, *, gpu: int = 0, pad: int = 0, **changes: Any):
        self.gpu, self.machine = gpu, machine
        rows = np.ascontiguousarray(image).reshape(len(image), -1).view(np.uint8)
        pitch = rows.shape[1] + pad
        self.address = machine.allocate(gpu, pitch * len(rows))
        block = array_at(np.dtype(np.uint8), (len(rows), pitch), self.address)
        block[:, : rows.shape[1]] = rows
        self.__cuda_array_interface__ = {
            "shape": image.shape, "typestr": image.dtype.str, "data": (self.address, True), "version": 2,
            "strides": (pitch, *image.strides[1:]) if pad else None,
        } | changes  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.gpu

    def free(self) -> None:
        self.machine.free(self.address)
