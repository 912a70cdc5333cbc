"""Device memory, page-locked host memory and copies on a GPU, through PyCUDA or NVIDIA's cuda-python.

Addresses are plain numbers and streams are CUDA's handles, so that both libraries look alike and fit every engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import BackendError, BackendUnavailable, OutOfMemory
from .locks import SharedLock

# A CUDA graph is captured alone: what others allocate, free or wait for meanwhile may spoil it, or be refused.
calls = SharedLock()


@dataclass(frozen=True)
class Facts:
    """What a GPU is. capability: compute capability, like "9.0"."""

    name: str
    capability: str
    total_bytes: int


class Device(Protocol):
    """One GPU. Every method may be called from any thread, and leaves the thread's current device as it was.

    library: what it goes through. Raises: OutOfMemory, or BackendError for any other failure.
    """

    index: int
    library: str

    def facts(self) -> Facts:
        """Tell what the device is."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make this device the thread's current one, for libraries that compute on that."""
        ...

    def free_bytes(self) -> int:
        """Read the free memory of the device."""
        ...

    def allocate(self, size: int) -> int:
        """Give the address of `size` new bytes."""
        ...

    def release(self, address: int) -> None:
        """Free what `allocate` gave."""
        ...

    def page_locked(self, size: int) -> np.ndarray:
        """Give (size,) uint8 in host memory that the device reads and writes by itself; freed with the array."""
        ...

    def new_stream(self) -> int:
        """Give the handle of a stream, which ends with this object at the latest."""
        ...

    def release_stream(self, stream: int) -> None:
        """End what `new_stream` gave."""
        ...

    def upload(self, target: int, source: np.ndarray, stream: int) -> None:
        """Enqueue a copy of a contiguous array to the device."""
        ...

    def download(self, target: np.ndarray, source: int, stream: int) -> None:
        """Enqueue a copy from the device that fills a contiguous array."""
        ...

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, *, width: int, rows: int, stream: int
    ) -> None:
        """Enqueue a copy within the device: `rows` rows of `width` bytes, which begin a pitch apart."""
        ...

    def synchronize(self, stream: int | None = None) -> None:
        """Wait for what was enqueued in a stream; None is everything on the device, other libraries' work too."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Give the handle of a CUDA graph of what `enqueue` puts into a stream, none of which is done yet."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a CUDA graph."""
        ...

    def release_graph(self, graph: int) -> None:
        """Free what `capture` gave."""
        ...


class Buffer:
    """Device memory that grows on demand and is freed with the object."""

    def __init__(self, device: Device, size: int = 0):
        self._device = device
        self.address, self.size = 0, 0
        self._free: Any = None
        self.reserve(size)

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes; if that takes more memory, the address and the content change."""
        if size <= self.size:
            return
        self.free()
        self.address, self.size = self._device.allocate(size), size
        self._free = weakref.finalize(self, self._device.release, self.address)
        self._free.atexit = False  # the driver frees all at its own end

    def free(self) -> None:
        """Give the memory back."""
        if self._free:
            self._free()
        self.address, self.size, self._free = 0, 0, None


def open_device(index: int) -> Device:
    """Open a GPU by number with PyCUDA where that is installed, else with cuda-python.

    Raises: BackendUnavailable if neither is installed, there is no driver, or no such GPU.
    """
    for name, module, kind in LIBRARIES:
        try:
            library = importlib.import_module(module)
        except ImportError as exc:
            if isinstance(exc, ModuleNotFoundError) and (exc.name or "").split(".")[0] == module.split(".")[0]:
                continue
            raise BackendUnavailable(f"{name} cannot be loaded: {exc}") from exc
        return kind(library, index)
    raise BackendUnavailable("CUDA needs cuda-python or pycuda: pip install 'sr-sdk[gpu]'")


def _check_index(index: int, count: int) -> None:
    if index >= count:
        raise BackendUnavailable(f"there is no GPU cuda:{index}: this machine has {count}")


class _Driver:
    """CUDA's driver library by ctypes: what PyCUDA and CUDA's runtime have no function for."""

    def __init__(self, index: int):
        self._index = index
        self._library: Any = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises: OutOfMemory, BackendError."""
        if self._library is None:
            self._library = load_driver()
        error = getattr(self._library, name)(*arguments)
        if error == CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemory(f"cuda:{self._index}: {name}: out of memory")
        if error:
            raise BackendError(f"cuda:{self._index}: {name}: error {error}")

    @contextmanager
    def current(self, context: ctypes.c_void_p) -> Iterator[None]:
        """Make a context the thread's current one."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class CudaPythonDevice:
    """A GPU through `cuda.bindings.runtime`, whose functions return (error, result...).

    Its primary context is pushed and popped: `cudaSetDevice` back to the device of before would make a context there.
    """

    library = "cuda-python"

    def __init__(self, runtime: Any, index: int):
        self._runtime = runtime
        self.index = index
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess:
            raise BackendUnavailable(f"CUDA cannot be used: {self._describe(error)}; check the NVIDIA driver")
        _check_index(index, count)
        self._driver = _Driver(index)
        self._streams: set[int] = set()
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._driver.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        weakref.finalize(self, _destroy_streams, runtime, self._driver, self._context, self._streams).atexit = False

    def facts(self) -> Facts:
        """See Device."""
        found = self._call("cudaGetDeviceProperties", self.index)[0]
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return Facts(name, f"{found.major}.{found.minor}", int(found.totalGlobalMem))

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Device."""
        with self._driver.current(self._context):
            yield

    def free_bytes(self) -> int:
        """See Device."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """See Device."""
        return int(self._call("cudaMalloc", size)[0])

    def release(self, address: int) -> None:
        """See Device."""
        self._call("cudaFree", address)

    def page_locked(self, size: int) -> np.ndarray:
        """See Device."""
        address = int(self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault)[0])
        memory: Any = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, self._call, "cudaFreeHost", address).atexit = False
        return np.frombuffer(memory, np.uint8)

    def new_stream(self) -> int:
        """See Device."""
        stream = int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)[0])
        self._streams.add(stream)
        return stream

    def release_stream(self, stream: int) -> None:
        """See Device."""
        self._streams.discard(stream)
        self._call("cudaStreamDestroy", stream)

    def upload(self, target: int, source: np.ndarray, stream: int) -> None:
        """See Device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def download(self, target: np.ndarray, source: int, stream: int) -> None:
        """See Device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, *, width: int, rows: int, stream: int
    ) -> None:
        """See Device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, stream)

    def synchronize(self, stream: int | None = None) -> None:
        """See Device."""
        if stream is None:
            self._call("cudaDeviceSynchronize")
        else:
            self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """See Device."""
        # Only this thread must keep from calls that cannot be captured.
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with calls.alone():
            self._call("cudaStreamBeginCapture", stream, mode)
            try:
                enqueue()
            except BaseException:
                with contextlib.suppress(BackendError):  # of a capture that has failed
                    self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", stream)[0])
                raise
            graph = self._call("cudaStreamEndCapture", stream)[0]
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0)[0])
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """See Device."""
        self._call("cudaGraphLaunch", graph, stream)

    def release_graph(self, graph: int) -> None:
        """See Device."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function with this device as the thread's current one."""
        runtime = self._runtime
        with calls.shared(), self.current():
            error, *results = getattr(runtime, name)(*arguments)
            if error != runtime.cudaError_t.cudaSuccess:
                runtime.cudaGetLastError()  # else the next one to ask for an error would find it
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemory(f"cuda:{self.index}: {name}: out of memory")
        if error != runtime.cudaError_t.cudaSuccess:
            raise BackendError(f"cuda:{self.index}: {name}: {self._describe(error)}")
        return tuple(results)

    def _describe(self, error: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)


def _destroy_streams(runtime: Any, driver: _Driver, context: ctypes.c_void_p, streams: set[int]) -> None:
    with calls.shared(), driver.current(context):
        for stream in streams:
            runtime.cudaStreamDestroy(stream)


class PyCudaDevice:
    """A GPU through `pycuda.driver`, in the device's primary context, which CUDA's runtime uses too."""

    library = "pycuda"

    def __init__(self, driver: Any, index: int):
        self._driver = driver
        self.index = index
        try:
            driver.init()
            count = driver.Device.count()
        except driver.Error as exc:
            raise BackendUnavailable(f"CUDA cannot be used: {exc}; check the NVIDIA driver") from exc
        _check_index(index, count)
        self._device = driver.Device(index)
        self._context = self._device.retain_primary_context()
        self._cuda = _Driver(index)
        self._allocations: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        weakref.finalize(self, _drop_streams, driver, self._context, self._streams).atexit = False

    def facts(self) -> Facts:
        """See Device."""
        major, minor = self._device.compute_capability()
        return Facts(self._device.name(), f"{major}.{minor}", self._device.total_memory())

    def current(self) -> AbstractContextManager[None]:
        """See Device."""
        return self._current("current")

    def free_bytes(self) -> int:
        """See Device."""
        with self._call("mem_get_info"):
            return int(self._driver.mem_get_info()[0])

    def allocate(self, size: int) -> int:
        """See Device."""
        with self._call("mem_alloc"):
            allocation = self._driver.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def release(self, address: int) -> None:
        """See Device."""
        with self._call("free"):
            self._allocations.pop(address).free()

    def page_locked(self, size: int) -> np.ndarray:
        """See Device."""
        with self._call("pagelocked_empty"):
            memory: np.ndarray = self._driver.pagelocked_empty(size, np.uint8)
        weakref.finalize(memory, self._free_page_locked, memory.base).atexit = False
        return memory

    def _free_page_locked(self, allocation: Any) -> None:
        """Free page-locked memory while its context is current, without which PyCUDA only warns."""
        with self._call("free"):
            allocation.free()

    def new_stream(self) -> int:
        """See Device."""
        with self._call("Stream"):
            stream = self._driver.Stream(STREAM_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def release_stream(self, stream: int) -> None:
        """See Device."""
        with self._call("Stream"):
            del self._streams[stream]

    def upload(self, target: int, source: np.ndarray, stream: int) -> None:
        """See Device."""
        with self._call("memcpy_htod_async"):
            self._driver.memcpy_htod_async(target, source, self._streams[stream])

    def download(self, target: np.ndarray, source: int, stream: int) -> None:
        """See Device."""
        with self._call("memcpy_dtoh_async"):
            self._driver.memcpy_dtoh_async(target, source, self._streams[stream])

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, *, width: int, rows: int, stream: int
    ) -> None:
        """See Device."""
        copy = self._driver.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(target)
        copy.src_pitch, copy.dst_pitch = source_pitch, target_pitch
        copy.width_in_bytes, copy.height = width, rows
        with self._call("Memcpy2D"):
            copy(self._streams[stream])

    def synchronize(self, stream: int | None = None) -> None:
        """See Device."""
        with self._call("synchronize"):
            if stream is None:
                self._driver.Context.synchronize()
            else:
                self._streams[stream].synchronize()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """See Device."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        with calls.alone(), self._current("capture"):
            self._cuda.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), CAPTURE_THREAD_LOCAL)
            try:
                enqueue()
            except BaseException:
                with contextlib.suppress(BackendError):  # of a capture that has failed
                    self._cuda.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
                    self._cuda.call("cuGraphDestroy", graph)
                raise
            self._cuda.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
            try:
                flags = ctypes.c_ulonglong(0)
                self._cuda.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, flags)
            finally:
                self._cuda.call("cuGraphDestroy", graph)
        assert executable.value is not None
        return executable.value

    def launch(self, graph: int, stream: int) -> None:
        """See Device."""
        with self._call("launch"):
            self._cuda.call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def release_graph(self, graph: int) -> None:
        """See Device."""
        with self._call("release_graph"):
            self._cuda.call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        """Make calls that must not fall into the capture of a CUDA graph."""
        with calls.shared(), self._current(name):
            yield

    @contextmanager
    def _current(self, name: str) -> Iterator[None]:
        """Make this device the thread's current one, and PyCUDA's errors ours."""
        self._context.push()
        try:
            yield
        except self._driver.MemoryError as exc:
            raise OutOfMemory(f"cuda:{self.index}: {name}: out of memory") from exc
        except self._driver.Error as exc:
            raise BackendError(f"cuda:{self.index}: {name}: {exc}") from exc
        finally:
            self._driver.Context.pop()


def _drop_streams(driver: Any, context: Any, streams: dict[int, Any]) -> None:
    """Let go of streams while their context is current, without which PyCUDA only warns."""
    with calls.shared():
        context.push()
        try:
            streams.clear()
        finally:
            driver.Context.pop()


CAPTURE_THREAD_LOCAL = ctypes.c_int(1)  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
CUDA_ERROR_OUT_OF_MEMORY = 2
STREAM_NON_BLOCKING = 1  # with the default stream, in which others work


def load_driver() -> Any:
    """Load CUDA's driver library, which PyCUDA and cuda-python have loaded already."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


# name, module, class; the first that is installed is taken.
LIBRARIES: tuple[tuple[str, str, Any], ...] = (
    ("pycuda", "pycuda.driver", PyCudaDevice),
    ("cuda-python", "cuda.bindings.runtime", CudaPythonDevice),
)
