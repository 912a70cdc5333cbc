"""Read and write picture files: EXIF orientation, ICC profile, formats; written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import opening, pixels, png, tiff, vips
from .errors import OptionError, OutputError, SRError
from .opening import MAX_PIXELS, Metadata

LOG = logging.getLogger(__name__)
Item = TypeVar("Item")
# Suffix -> Pillow's format.
FORMATS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
}
PLAIN = ("BMP", "GIF")  # hold neither ICC profile nor EXIF
MAX_JPEG_EXIF = 65533  # bytes of a marker
MAX_PNG_PROFILE = 1 << 20  # bytes that Pillow inflates
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535, "AVIF": 65536}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
PNG_LEVEL = 4  # a third of level 6's time for half a percent more bytes (measured, on photographs)
ODD_GAMMA = "its PNG gamma is neither applied nor kept, colours may look different; convert it to sRGB first"
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
# What a file system without hard links answers.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV}

_unfinished: set[Path] = set()
_creating = threading.Lock()  # held while a temporary file comes into that list and onto the disk
CREATING_S = 0.2


def read(path: Path, *, max_pixels: int | None = MAX_PIXELS) -> tuple[np.ndarray, Metadata]:
    """Read a picture with its orientation applied, in the depth that the file has.

    max_pixels: largest picture that is decoded; 0 or None is no limit.
    Returns: an array that pixels.check_array accepts, and its metadata with the orientation reset.
    Raises: ImageError if the file is missing, not a picture, truncated, or larger than the limit; BackendUnavailable
    if it is one of those for which Pillow does not do and pyvips is not installed (colour of more than 8 bits).
    """
    return _read_source(path, path, max_pixels)


def read_bytes(
    data: bytes, *, name: object = "the picture", max_pixels: int | None = MAX_PIXELS
) -> tuple[np.ndarray, Metadata]:
    """Read a picture from the bytes of a file, like what a web form sent, as `read` does and raising as it does.

    name: of the picture, in messages.
    """
    return _read_source(bytes(data), name, max_pixels)


def _read_source(source: Path | bytes, name: object, max_pixels: int | None) -> tuple[np.ndarray, Metadata]:
    opening.check_max_pixels(max_pixels)
    with opening.told(name):
        try:
            with opening.opened(source, max_pixels=max_pixels) as image:
                return _read(source, image, name, max_pixels)
        except UnidentifiedImageError:
            if not opening.is_tiff(source):
                raise
        return _read_odd_tiff(source, name, max_pixels)


def _read(source: Path | bytes, image: Any, name: object, max_pixels: int | None) -> tuple[np.ndarray, Metadata]:
    depth = opening.depth(image)
    if image.format == "TIFF":
        if image.is_animated:  # to count pages takes the square of their number, and fails if one is damaged
            LOG.warning("%s: several pages, only the first is read", name)
    elif getattr(image, "n_frames", 1) > 1:
        LOG.warning("%s: %d frames, only the first is read", name, image.n_frames)
    if opening.has_odd_gamma(image):
        LOG.warning("%s: %s", name, ODD_GAMMA)
    if (depth > 8 and not image.mode.startswith("I")) or (image.mode == "I;16" and "transparency" in image.info):
        orientation = image.getexif().get(opening.ORIENTATION)
        array = vips.read(source, str(image.format), name=name, max_pixels=max_pixels)
        # libheif has turned the picture already.
        array = array if image.format == "AVIF" else opening.turn(array, orientation)
    elif depth > 8:
        array = opening.turn(_grey16(image, depth), image.getexif().get(opening.ORIENTATION))
    else:
        opening.load(image)
        array = pixels.from_pil(ImageOps.exif_transpose(image), name=name)
    metadata = opening.take_metadata(image)
    if image.mode in pixels.PROFILED:  # the profile has been used
        metadata = replace(metadata, icc_profile=None)
    return array, metadata


def _grey16(image: Any, depth: int) -> np.ndarray:
    """Decode grey of 9 to 16 bits to the whole range of uint16, which Pillow does for some formats only."""
    opening.load(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return np.asarray(image).astype(np.uint16)
    array = pixels.from_pil(image)
    if image.format == "TIFF":
        if depth == 12:
            array = array << 4 | array >> 8
        if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            array = 65535 - array
    return array


def _read_odd_tiff(source: Path | bytes, name: object, max_pixels: int | None) -> tuple[np.ndarray, Metadata]:
    """Read a TIFF whose layout Pillow does not know, like 16-bit grey with alpha or colour in floating point."""
    array = vips.read(source, "TIFF", name=name, max_pixels=max_pixels)
    with opening.open_source(source) as stream:
        exif = tiff.read_exif(stream)
        orientation, profile = exif.get(opening.ORIENTATION), exif.get(tiff.ICC_PROFILE)
        block = opening.pack_exif(exif)
    return opening.turn(array, orientation), Metadata(profile if isinstance(profile, bytes) else None, block)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: OutputError if the format is unknown, the folder is missing, or the file exists and may not be replaced.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path}: unknown format {path.suffix!r}: one of {', '.join(FORMATS)}")
    if kind == "AVIF" and not opening.has_avif():
        raise OutputError(f"{path}: this Pillow writes no AVIF: pip install 'pillow>=11.3', or write WebP")
    # os.path: unlike Path's methods, these do not raise for names that the system refuses.
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or allow overwriting")


def check_format(path: Path, image: np.ndarray, *, scale: int) -> None:
    """Refuse a destination whose format cannot hold the enlargement of a picture, before it is enlarged.

    image: as given to Upscaler.upscale. Raises: OutputError.
    """
    kind = FORMATS[path.suffix.lower()]
    channels = image.shape[2] if image.ndim == 3 else 1
    if kind in ("JPEG", "BMP") and channels in (2, 4):
        raise OutputError(f"{path}: {kind} has no alpha channel; write PNG, WebP, AVIF or TIFF")
    if image.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
        raise OutputError(f"{path}: {kind} is written in 8 bits and the picture has 16; write PNG or TIFF")
    if image.dtype == np.float32 and kind != "TIFF":
        raise OutputError(f"{path}: {kind} has no floating point; write TIFF")
    check_side(path, image.shape[:2], scale=scale)


def check_side(path: Path, size: tuple[int, ...], *, scale: int) -> None:
    """Refuse a destination whose format cannot be as large as (height, width) enlarged.

    Raises: OutputError.
    """
    kind, side = FORMATS[path.suffix.lower()], max(size) * scale
    if side > MAX_SIDE.get(kind, side):
        raise OutputError(f"{path}: {kind} holds at most {MAX_SIDE[kind]} pixels a side, not {side}; write PNG or TIFF")


def write(
    path: Path,
    image: np.ndarray,
    metadata: Metadata,
    *,
    quality: int,
    overwrite: bool,
    subsampling: str = "4:4:4",
    lossless: bool = False,
) -> None:
    """Write a picture under a temporary name, then give it its own.

    image: as returned by Upscaler.upscale. quality: of JPEG, WebP and AVIF, 1 to 100. subsampling: of the colour of
    JPEG and AVIF. lossless: of WebP, instead of a quality; others are so or are not.
    Raises: OptionError for another quality or subsampling; OutputError if it cannot be written (disk full, no
    permission, a format without alpha or 16 bits, or the file exists and may not be replaced).
    """
    quality = check_quality(quality)
    check_subsampling(subsampling)
    check_output(path, overwrite=overwrite)
    check_format(path, image, scale=1)
    kind = FORMATS[path.suffix.lower()]
    image = image[:, :, None] if image.ndim == 2 else image
    if kind in PLAIN:
        image = pixels.srgb_converter(metadata.icc_profile, name=path)(image)
    metadata = fit_metadata(path, metadata, channels=image.shape[2])
    with new_file(path, overwrite=overwrite) as stream, encoding(path):
        if kind == "TIFF":
            tiff.write(stream, image, metadata)
        elif image.dtype == np.uint16:
            png.write_deep(stream, image, metadata)
        else:
            picture, options = _prepare(kind, image)
            options |= encoder_options(kind, metadata, quality=quality, subsampling=subsampling, lossless=lossless)
            picture.save(stream, kind, **options)


def _prepare(kind: str, image: np.ndarray) -> tuple[Image.Image, dict[str, Any]]:
    """Give a uint8 picture in a mode that Pillow writes in a format, and options that belong to it."""
    if kind == "GIF":
        picture, transparent = pixels.to_palette(image)
        return picture, {} if transparent is None else {"transparency": transparent}
    if kind in ("WEBP", "AVIF") and image.shape[2] == 2:
        image = image[:, :, [0, 0, 0, 1]]
    return pixels.to_pil(image), {}


def fit_metadata(path: Path, metadata: Metadata, *, channels: int) -> Metadata:
    """Leave out, and say so, what a file's format cannot hold or does not belong to its number of channels."""
    kind = FORMATS[path.suffix.lower()]
    if kind in PLAIN:
        return Metadata()
    colour_space = "RGB" if kind in ("WEBP", "AVIF") or channels >= 3 else "L"
    if metadata.icc_profile and not pixels.fits_profile(metadata.icc_profile, colour_space):
        LOG.warning("%s: the ICC profile is not of the result's colour space and is dropped", path)
        metadata = replace(metadata, icc_profile=None)
    if kind == "PNG" and len(metadata.icc_profile or b"") > MAX_PNG_PROFILE:
        LOG.warning("%s: the ICC profile is longer than readers of PNG accept and is dropped", path)
        metadata = replace(metadata, icc_profile=None)
    if kind == "JPEG" and len(metadata.exif or b"") > MAX_JPEG_EXIF:
        LOG.warning("%s: the EXIF data are longer than JPEG can hold and are dropped", path)
        metadata = replace(metadata, exif=None)
    return metadata


def encoder_options(kind: str, metadata: Metadata, *, quality: int, subsampling: str, lossless: bool) -> dict[str, Any]:
    """Give Pillow's options for a format, without those that it does not have."""
    options = {key: value for key, value in vars(metadata).items() if value}
    if kind == "WEBP" and lossless:
        return options | {"lossless": True, "quality": 100, "exact": True}  # exact: hidden colour too
    if kind in ("JPEG", "WEBP", "AVIF"):
        options["quality"] = quality
    if kind in ("JPEG", "AVIF"):
        options["subsampling"] = subsampling
    if kind == "PNG":
        options["compress_level"] = PNG_LEVEL
    return options


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when the block ends, complete and on the disk, or not at all.

    Without `overwrite` it is not replaced even if another program makes one of that name in the meantime.
    Raises: OutputError if the system does not let it be written; other errors from inside the block pass.
    """
    temporary = path.with_name(f".sr-{secrets.token_hex(8)}.part")
    try:
        with _create(temporary) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with encoding(path):  # ValueError: a name that the system refuses
            if overwrite:
                os.replace(temporary, path)
            else:
                claim(temporary, path)
        _sync_folder(path.parent)
    except (OSError, MemoryError) as exc:
        raise _cannot_be_written(path, exc) from exc
    finally:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a folder with a name that the system refuses
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


@contextlib.contextmanager
def encoding(path: Path, items: Iterable[Item] = ()) -> Iterator[Iterator[Item]]:
    """Turn whatever an encoder raises in the block into an OutputError, but not what the items that it draws raise.

    Gives: the items.
    """
    failure: Exception | None = None

    def drawn() -> Iterator[Item]:
        nonlocal failure
        try:
            yield from items
        except Exception as exc:
            failure = exc
            raise

    try:
        yield drawn()
    except SRError:
        raise
    except Exception as exc:  # Pillow's encoders raise nearly anything
        if exc is failure:
            raise
        raise _cannot_be_written(path, exc) from exc


def _cannot_be_written(path: Path, exc: Exception) -> OutputError:
    reason = getattr(exc, "strerror", None) or opening.one_line(exc) or type(exc).__name__
    return OutputError(f"{path}: cannot be written ({reason})")


def _create(temporary: Path) -> BinaryIO:
    with _creating:
        _unfinished.add(temporary)
        return open(temporary, "xb")


def remove_unfinished() -> None:
    """Remove the temporary files of everything that is being written, for a program that ends without unwinding.

    No thread can make another one afterwards.
    """
    _creating.acquire(timeout=CREATING_S)  # longer waits nobody but this very thread, which a signal has stopped there
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError, ValueError):
            os.unlink(temporary)


def claim(temporary: Path, path: Path) -> None:
    """Give a finished file its name unless that is taken, in one step where the file system has hard links.

    Raises: OutputError if it is taken; OSError.
    """
    try:
        try:
            os.link(temporary, path)
        except OSError as exc:
            if exc.errno not in NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # an empty file holds the name
            try:
                os.replace(temporary, path)
            except BaseException:
                os.unlink(path)
                raise
    except FileExistsError as exc:
        raise OutputError(f"{path}: exists already; choose another name or allow overwriting") from exc


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_quality(quality: int) -> int:
    """Give the quality as an int. Raises: OptionError unless it is a whole number from 1 to 100."""
    number = opening.whole_number(quality)
    if number is None or not 1 <= number <= 100:
        raise OptionError(f"quality {quality!r}: a number from 1 to 100")
    return number


def check_subsampling(subsampling: str) -> None:
    """Raise OptionError unless subsampling is one that JPEG and AVIF have."""
    if subsampling not in SUBSAMPLINGS:
        raise OptionError(f"subsampling {subsampling!r}: one of {', '.join(SUBSAMPLINGS)}")
