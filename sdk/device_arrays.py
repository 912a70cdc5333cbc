"""Pictures that stay on a GPU: any array with `__cuda_array_interface__` (torch, CuPy, Numba, JAX) in, one out.

Windows are cut and placed by copies within the device; nothing passes through the host.
Source: the CUDA Array Interface, version 3, of Numba's documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from . import tiling
from .backends import DeviceBackend
from .backends.cuda import Buffer, Device
from .errors import ImageError

CUDA = 2  # DLPack's number for CUDA devices
Window = tuple[tiling.Span, tiling.Span]


def is_on_device(image: Any) -> bool:
    """Tell whether a picture is in the memory of a GPU."""
    return hasattr(image, "__cuda_array_interface__")


@dataclass(frozen=True)
class View:
    """A picture of (H, W, 3) in a GPU's memory, whose rows begin `pitch` bytes apart; it keeps `owner` alive.

    index: of its GPU, None if the array does not tell.
    """

    address: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    pitch: int
    index: int | None
    owner: Any


class DeviceArray:
    """A result in a GPU's memory: (H, W, 3) uint8 or float32, C-contiguous; freed with the object.

    `torch.as_tensor(result, device="cuda")` and `cupy.asarray(result)` use the same memory and keep it alive.
    """

    def __init__(self, device: Device, shape: tuple[int, int, int], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype
        self._device = device
        self._buffer = Buffer(device, math.prod(shape) * dtype.itemsize)

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._buffer.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # No stream: what wrote it has been waited for.
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "strides": None,
            "stream": None, "version": 3,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device.index

    def copy_to_host(self) -> np.ndarray:
        """Give a NumPy array of the same shape and dtype."""
        result = np.empty(self.shape, self.dtype)
        stream = self._device.new_stream()
        try:
            self._device.download(result, self.address, stream)
            self._device.synchronize(stream)
        finally:
            self._device.release_stream(stream)
        return result


def view(image: Any) -> View:
    """Take an array on a GPU as a picture.

    Raises: ImageError unless it is (H, W, 3) uint8 or float32 with pixels side by side.
    """
    interface = image.__cuda_array_interface__
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype not in (np.uint8, np.float32) or not dtype.isnative:
        raise ImageError(f"an array on a GPU has to be (H, W, 3) uint8 or float32, not {shape} {dtype}")
    pixel = 3 * dtype.itemsize
    pitch, column, channel = interface.get("strides") or (shape[1] * pixel, pixel, dtype.itemsize)
    if (column, channel) != (pixel, dtype.itemsize) or pitch < shape[1] * pixel:
        raise ImageError("an array on a GPU has to lie in memory as (H, W, 3): make it contiguous first")
    index = None
    if hasattr(image, "__dlpack_device__"):
        index = int(image.__dlpack_device__()[1])
    return View(int(interface["data"][0]), shape, dtype, pitch, index, image)


def enlarge(
    picture: View, result: DeviceArray, backend: DeviceBackend, plan: tiling.Plan, *, scale: int, batch: int
) -> None:
    """Run the windows of a plan without cross-fades, from one array into the other.

    Raises: OutOfMemory or another BackendError; what is in the result then is undefined.
    """
    pixel = 3 * picture.dtype.itemsize
    # Of the padded picture, where each row and column comes from.
    row_sources, column_sources = (
        np.pad(np.arange(length), (0, padded - length), mode="reflect")
        for length, padded in zip(plan.size, plan.padded, strict=True)
    )
    height, width = plan.window
    windows = [(rows, columns) for rows in plan.rows for columns in plan.columns]
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]

        def fill(device: Device, address: int, stream: int, group: list[Window] = group) -> None:
            for number, (rows, columns) in enumerate(group):
                start = address + number * height * width * pixel
                for top, y, count in _runs(row_sources[rows.start : rows.stop]):
                    for left, x, length in _runs(column_sources[columns.start : columns.stop]):
                        device.copy_rows(
                            start + (top * width + left) * pixel,
                            width * pixel,
                            picture.address + y * picture.pitch + x * pixel,
                            picture.pitch,
                            width=length * pixel,
                            rows=count,
                            stream=stream,
                        )

        def take(device: Device, address: int, stream: int, group: list[Window] = group) -> None:
            pitch, window_pitch = plan.size[1] * scale * pixel, width * scale * pixel
            for number, (rows, columns) in enumerate(group):
                start = address + number * height * scale * window_pitch
                top, left = (rows.keep_start - rows.start) * scale, (columns.keep_start - columns.start) * scale
                device.copy_rows(
                    result.address + rows.keep_start * scale * pitch + columns.keep_start * scale * pixel,
                    pitch,
                    start + top * window_pitch + left * pixel,
                    window_pitch,
                    width=(min(columns.keep_stop, plan.size[1]) - columns.keep_start) * scale * pixel,
                    rows=(min(rows.keep_stop, plan.size[0]) - rows.keep_start) * scale,
                    stream=stream,
                )

        backend.run_on_device((len(group), height, width, 3), picture.dtype, fill, take)


def _runs(sources: np.ndarray) -> list[tuple[int, int, int]]:
    """Split numbers into runs of consecutive ones: (position, first number, length) each."""
    breaks = [0, *(np.flatnonzero(np.diff(sources) != 1) + 1).tolist(), len(sources)]
    return [(start, int(sources[start]), stop - start) for start, stop in pairwise(breaks)]
