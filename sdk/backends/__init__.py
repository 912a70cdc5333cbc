"""Inference engines behind one small interface; each engine is imported only in its own file."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..bundle import Stage
from ..errors import BackendError, BackendUnavailable, OptionError
from .several import Several

if TYPE_CHECKING:
    from .cuda import Device

LOG = logging.getLogger(__name__)
MAX_THREADS = 1024
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")

CHECK_STRIDES = 8  # side of the picture that a new engine is checked with
MIN_PSNR_DB = {"fp16": 35.0, "int8": 20.0}  # on that picture; the gates at export are 50 and 38, on photographs

# Name -> module. Each module has `open_backend(request) -> Backend`.
MODULES = {"tensorrt": ".tensorrt", "onnxruntime": ".onnxruntime", "openvino": ".openvino"}
# What "auto" tries, fastest first.
AUTO_ORDER = (("tensorrt", "cuda:0"), ("onnxruntime", "cuda:0"), ("openvino", "cpu"), ("onnxruntime", "cpu"))


# (device, address, stream) -> None: enqueues copies to or from an address in a device's memory.
Transfer = Callable[["Device", int, int], None]


@dataclass(frozen=True)
class Request:
    """What an engine is asked to open.

    folder: the bundle's. scale: of the model. ends: "uint8" or "float32". device: "auto", "cpu", "cuda:N" or
    "cuda:N,M" for several. precision: one of PRECISIONS.
    """

    folder: Path
    stage: Stage
    scale: int
    ends: str
    device: str
    precision: str


class Backend(Protocol):
    """An opened engine for one graph.

    name, device, precision, engine (its version) say what really runs; batch is how many windows pay off at once,
    lanes in how many threads calls of run pay off. max_batch and max_side: most windows at once and the longest side of
    one; None for any. is_checked: fp16 has been held against fp32.
    """

    name: str
    device: str
    precision: str
    engine: str
    batch: int
    lanes: int
    max_batch: int | None
    max_side: int | None
    is_checked: bool

    def run(self, batch: np.ndarray) -> np.ndarray:
        """(N, h, w, C) -> (N, h*scale, w*scale, C), same dtype; h and w on the stride grid; thread-safe.

        Raises: OutOfMemory, or BackendError for any other failure.
        """
        ...

    def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
        """Make ready for batches of one shape that come `runs` times. Raises: as run."""
        ...

    def free_bytes(self) -> int | None:
        """Read the free memory of the engine's device; None if that is the host's."""
        ...

    def on_device(self, index: int | None) -> DeviceBackend:
        """Give what runs pictures in the memory of the GPU of that number, None if it is not known.

        Raises: BackendUnavailable if the engine does not run there.
        """
        ...

    def close(self) -> None:
        """Free the engine; later calls of run fail."""
        ...


class DeviceBackend(Backend, Protocol):
    """A backend whose windows and results can stay in the memory of its GPU."""

    gpu: Device

    def run_on_device(self, shape: tuple[int, ...], dtype: np.dtype, fill: Transfer, take: Transfer) -> None:
        """Run a batch of a shape (N, h, w, C): `fill` brings the input, `take` takes the output away.

        Both are given the GPU, an address in its memory and a stream in which they enqueue their copies.
        Raises: as run.
        """
        ...


class HostBackend:
    """What engines on the CPU have in common."""

    device = "cpu"
    batch = 1
    lanes = 1
    max_batch: int | None = None
    max_side: int | None = None
    is_checked = False

    def free_bytes(self) -> int | None:
        """See Backend.free_bytes."""
        return None

    def on_device(self, index: int | None) -> DeviceBackend:
        """See Backend.on_device."""
        raise BackendUnavailable(
            "the picture is on a GPU, the engine on the CPU: use device='cuda:N', or copy it first"
        )


def open_backend(name: str, request: Request) -> Backend:
    """Open an engine by name, or the fastest that works here for "auto".

    Raises: OptionError for an unknown name, precision or device; BackendUnavailable if it, or for "auto" every one,
    cannot be used.
    """
    check_request(name, request)
    if name != "auto":
        return _open(name, request)
    reasons = []
    for candidate, device in AUTO_ORDER:
        if request.device not in ("auto", device) and request.device.split(":")[0] != device.split(":")[0]:
            continue
        wanted = request if request.device != "auto" else replace(request, device=device)
        try:
            backend = _open(candidate, wanted)
        except BackendError as exc:
            reasons.append(f"{candidate} on {wanted.device}: {exc}")
            # Not installed is normal; installed and broken is worth a line.
            level = logging.DEBUG if isinstance(exc, BackendUnavailable) else logging.WARNING
            LOG.log(level, "not used: %s", reasons[-1])
            continue
        LOG.info("backend: %s %s on %s, %s", backend.name, backend.engine, backend.device, backend.precision)
        return backend
    raise BackendUnavailable("no engine can run this here: " + "; ".join(reasons))


def thread_count() -> int | None:
    """Read how many threads an engine may use on the CPU from SR_THREADS; None: the engine decides.

    Raises: OptionError if it is not a number from 1 to 1024.
    """
    text = os.environ.get("SR_THREADS", "")
    if not text:
        return None
    if not (text.isdecimal() and text.isascii() and len(text) <= 4 and 1 <= int(text) <= MAX_THREADS):
        raise OptionError(f"SR_THREADS={text[:20]!r}: a number of threads from 1 to {MAX_THREADS}")
    return int(text)


def check_request(name: str, request: Request) -> None:
    """Refuse options that no engine knows, before anything heavy is loaded."""
    if name != "auto" and str(name) not in MODULES:
        raise OptionError(f"backend {name!r}: one of auto, {', '.join(MODULES)}")
    if request.precision not in PRECISIONS:
        raise OptionError(f"precision {request.precision!r}: one of {', '.join(PRECISIONS)}")
    if not re.fullmatch("auto|cpu|cuda:[0-9]{1,3}(,[0-9]{1,3})*", str(request.device)):
        raise OptionError(f"device {request.device!r}: one of auto, cpu, cuda:N, cuda:N,M")
    numbers = request.device.removeprefix("cuda:").split(",")
    if len(set(numbers)) < len(numbers):
        raise OptionError(f"device {request.device!r}: a GPU is named twice")


def _open(name: str, request: Request) -> Backend:
    module = importlib.import_module(MODULES[name], __package__)
    numbers = request.device.removeprefix("cuda:").split(",")
    devices = [request.device] if len(numbers) == 1 else [f"cuda:{number}" for number in numbers]
    opened: list[Backend] = []
    for device in devices:
        backend = module.open_backend(replace(request, device=device))
        if backend.precision == "fp16" and not backend.is_checked:
            reference = module.open_backend(replace(request, device=device, precision="fp32"))
            with closing(reference):
                check_precision(backend, reference, request.stage)
        opened.append(backend)
    return opened[0] if len(opened) == 1 else Several(opened)


def check_precision(backend: Backend, reference: Backend, stage: Stage) -> float:
    """Hold a new engine in few bits against fp32: NaN would come out as black pixels. Give their PSNR in dB.

    Raises: BackendError, and closes it, if they differ by more than rounding.
    """
    side = CHECK_STRIDES * stage.stride
    ramp = np.linspace(0, 255, side)[None, :, None] * [1.0, 0.5, 0.0]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    picture = np.where(np.arange(side)[:, None, None] < side // 2, ramp, noise).astype(np.uint8)[None]
    error = backend.run(picture).astype(np.float32) - reference.run(picture)
    psnr = float(10 * np.log10(255**2 / max(float(np.square(error).mean()), 1e-6)))
    if psnr < MIN_PSNR_DB[backend.precision]:
        backend.close()
        raise BackendError(
            f"stage {stage.name!r} on {backend.name}, {backend.device} is wrong in {backend.precision} "
            f"({psnr:.1f} dB to fp32): use precision='fp32' or another stage"
        )
    return psnr
