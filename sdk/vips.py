"""libvips through pyvips: the files that Pillow would read in 8 bits or not at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import opening, pixels
from .errors import BackendUnavailable, ImageError

# Pillow's format -> libvips' loader. Never chosen by content: libvips knows formats that run other programs.
LOADERS = {
    "PNG": "pngload_source",
    "JPEG": "jpegload_source",
    "MPO": "jpegload_source",
    "TIFF": "tiffload_source",
    "AVIF": "heifload_source",
}


def import_vips(what: str) -> Any:
    """Import pyvips.

    what: begins the message, like "photo.png: 16-bit colour". Raises: BackendUnavailable if it is not installed.
    """
    try:
        import pyvips
    except (ImportError, OSError) as exc:  # OSError: pyvips without a libvips that it can load
        raise BackendUnavailable(f"{what} needs libvips: pip install 'sr-sdk[large]'") from exc
    return pyvips


def is_installed() -> bool:
    """Tell whether pyvips is there, without loading it."""
    return importlib.util.find_spec("pyvips") is not None


@contextmanager
def opened(pyvips: Any, source: Path | bytes, kind: str) -> Iterator[Any]:
    """Open a file, or the bytes of one, as a pyvips picture that is decoded once, from top to bottom.

    Only inside the block can it be decoded. What reading the file raises surfaces as it is.
    """
    failed: list[BaseException] = []

    def guarded(call: Any, instead: Any) -> Any:
        def run(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except BaseException as exc:  # libvips cannot pass it on
                failed.append(exc)
                return instead

        return run

    # Not by name: libvips takes options out of names like "a.png[page=2]". Nor as a file, which it maps into memory:
    # one that becomes shorter meanwhile would end the process (SIGBUS).
    with opening.open_source(source) as file:
        stream = pyvips.SourceCustom()  # held here: pictures do not hold what they are read from
        stream.on_read(guarded(file.read, None))
        stream.on_seek(guarded(file.seek, -1))
        try:
            yield getattr(pyvips.Image, LOADERS[kind])(stream, fail_on="error", access="sequential")
        except pyvips.Error as exc:
            if not failed:
                raise
            raise failed[0] from exc
        if failed:
            raise failed[0]


def read(source: Path | bytes, kind: str, *, name: object, max_pixels: int | None) -> np.ndarray:
    """Read a file in the depth that it has.

    kind: Pillow's name of the format. name: of the picture, in messages.
    Returns: an array that pixels.check_array accepts, orientation not applied.
    Raises: ImageError if it is too large, or holds what is not supported; pyvips.Error if it is damaged;
    BackendUnavailable.
    """
    if kind not in LOADERS:
        raise ImageError(f"{kind} of more than 8 bits a channel is not supported; convert it to PNG or TIFF")
    with opened(import_vips(f"{name}: {kind} of this depth or layout"), source, kind) as image:
        opening.check_size((image.width, image.height), max_pixels)
        if image.interpretation == "cmyk":
            image = image.icc_transform("srgb", embedded=True, depth=16 if image.format == "ushort" else 8)
        elif image.interpretation in ("lab", "labs", "labq", "xyz"):
            image = image.colourspace("rgb16")
        bits = image.get("bits-per-sample") if kind == "AVIF" and image.get_typeof("bits-per-sample") else 16
        array: np.ndarray = image.numpy()
    if array.dtype not in pixels.DTYPES or (array.ndim == 3 and array.shape[2] > 4):
        channels = array.shape[2] if array.ndim == 3 else 1
        raise ImageError(f"{channels} channels of {array.dtype} are not supported; convert to uint8, uint16 or float32")
    if bits < 16 and array.dtype == np.uint16:  # they lie in the upper bits: fill up, so that white is 65535
        array = array | array >> bits
    return array
