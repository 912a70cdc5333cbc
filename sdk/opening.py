"""Open picture files with Pillow: which formats, up to what size, how deep, and what went wrong."""

from __future__ import annotations

import importlib
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import ImageError, OptionError, SRError

LOG = logging.getLogger(__name__)
ORIENTATION = 0x0112
SWAPPED = (5, 6, 7, 8)  # orientations that make width of height
MAX_PIXELS = 178_956_970  # of one picture or frame; where Pillow's own limit stands, 2 * MAX_IMAGE_PIXELS
# What may be read, with the plug-in; Pillow knows more, of which some start other programs (EPS).
READABLE = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "WEBP": "WebPImagePlugin",
    "TIFF": "TiffImagePlugin",
    "AVIF": "AvifImagePlugin",
    "BMP": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "TGA": "TgaImagePlugin",
    "ICO": "IcoImagePlugin",
}
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
# TIFF tags that describe the layout of one file, and no other: Pillow gives them as EXIF.
LAYOUT_TAGS = {254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
LAYOUT_TAGS |= {330, 338, 339, 347, 700, 33723, 34377, 34675}


@dataclass(frozen=True)
class Metadata:
    """What goes along with the pixels: ICC profile and EXIF as bytes, either may be missing."""

    icc_profile: bytes | None = None
    exif: bytes | None = None


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises for a file into an ImageError of one line that names the file."""
    try:
        yield
    except ImageError as exc:
        raise ImageError(f"{path}: {exc}") from exc
    except SRError:
        raise
    except UnidentifiedImageError as exc:
        raise ImageError(f"{path}: not a picture in a known format") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{path}: too large ({exc}); raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from exc
    except MemoryError as exc:
        raise ImageError(f"{path}: does not fit into memory") from exc
    except OSError as exc:
        raise ImageError(f"{path}: cannot be read ({one_line(exc.strerror or exc)})") from exc
    except Exception as exc:  # Pillow's parsers raise nearly anything for a damaged file
        raise ImageError(f"{path}: damaged picture ({type(exc).__name__}: {one_line(exc)})") from exc


def one_line(text: object) -> str:
    """Put a message of a library into one line of bounded length."""
    return " ".join(str(text).split())[:300]


def check_max_pixels(max_pixels: int | None) -> None:
    """Raise OptionError unless max_pixels is a whole number from 0, or None; both 0 and None are no limit."""
    if max_pixels is not None and (not isinstance(max_pixels, int) or max_pixels < 0):
        raise OptionError(f"max_pixels {max_pixels!r}: a number of pixels from 0 (no limit), or None")


def check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuse a picture of (width, height) before memory is taken for it; a few bytes may ask for any amount.

    Raises: ImageError.
    """
    width, height = size
    if max_pixels and width * height > max_pixels:
        raise ImageError(
            f"too large ({width} x {height} px, the limit is {max_pixels} pixels); raise max_pixels if you trust it"
        )


@contextmanager
def opened(file: Path | BinaryIO, *, max_pixels: int | None) -> Iterator[Any]:
    """Open a picture without decoding it, and close it: a PIL picture of any plug-in.

    Unlike Image.open, this leaves alone Image.MAX_IMAGE_PIXELS, which is one for all threads; a few plug-ins ask it
    themselves (WebP and GIF, and TIFF for its tiles), so that above it those need it raised as well.
    Raises: ImageError if the picture is larger than the limit; UnidentifiedImageError; or what a plug-in raises.
    """
    with open(file, "rb") if isinstance(file, Path) else file as stream:
        image = _open(stream)
        check_size(image.size, max_pixels)
        yield image


def _open(stream: BinaryIO) -> Image.Image:
    prefix = stream.read(16)
    for name, plugin in READABLE.items():
        if name not in Image.OPEN:
            try:
                importlib.import_module(f"PIL.{plugin}")
            except ImportError:  # AVIF came with Pillow 11.3
                continue
        factory, accepts = Image.OPEN[name]
        if accepts and accepts(prefix) is not True:  # False, or a text that says what Pillow was built without
            continue
        stream.seek(0)
        try:
            return factory(stream, "")  # without the name, which would have raw pixels mapped into memory
        except (SyntaxError, IndexError, TypeError, struct.error) as exc:  # what a plug-in says "not mine" with
            LOG.debug("not read as %s (%s)", name, exc)
    if prefix[4:8] == b"ftyp" and prefix[8:12] in AVIF_BRANDS and not has_avif():
        raise ImageError("this Pillow reads no AVIF: pip install 'pillow>=11.3'")
    raise UnidentifiedImageError


def has_avif() -> bool:
    """Tell whether Pillow was built with AVIF."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return bool(AvifImagePlugin.SUPPORTED)


def is_tiff(path: Path) -> bool:
    """Tell a TIFF by its first bytes, whether Pillow reads it or not."""
    with open(path, "rb") as stream:
        return stream.read(4) in TIFF_MAGIC


def depth(image: Image.Image) -> int:
    """Give the bits a channel, at least 8, that the file of a picture holds which is not loaded yet.

    Pillow's mode does not tell: it reads colour of more than 8 bits as 8.
    """
    if image.format == "AVIF":
        return _avif_depth(image)
    if image.format == "JPEG2000":
        return _jpeg2000_depth(image)
    deepest = 8
    for _, _, _, arguments in getattr(image, "tile", None) or ():
        # The arguments of a decoder begin with the layout, like "RGB;16B".
        layout, *others = arguments if isinstance(arguments, tuple) else (arguments,)
        if image.format == "PPM" and others and isinstance(others[-1], int) and others[-1] > 255:
            return 16
        bits = str(layout).partition(";")[2].rstrip("BLNRSI")
        deepest = max(deepest, int(bits) if bits.isdecimal() else 8)
    return deepest


def _head(image: Image.Image, size: int = 1 << 16) -> bytes:
    stream = getattr(image, "fp", None)
    if stream is None:
        return b""
    position = stream.tell()
    stream.seek(0)
    head: bytes = stream.read(size)
    stream.seek(position)
    return head


def _avif_depth(image: Image.Image) -> int:
    """Read high_bitdepth and twelve_bit of the first AV1 codec configuration box ("av1C")."""
    head = _head(image)
    box = head.find(b"av1C")
    flags = head[box + 6] if 0 <= box < len(head) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _jpeg2000_depth(image: Image.Image) -> int:
    """Read the deepest component of the SIZ segment that begins a JPEG 2000 codestream."""
    head = _head(image)
    start = head.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(head) < start + 42:
        return 8
    count = int.from_bytes(head[start + 40 : start + 42], "big")
    return max((8, *((depth & 0x7F) + 1 for depth in head[start + 42 : start + 42 + 3 * count : 3])))


def take_metadata(image: Image.Image) -> Metadata:
    """Take ICC profile and EXIF without orientation; an EXIF block that cannot be written again is left out."""
    return Metadata(image.info.get("icc_profile") or None, pack_exif(image.getexif(), tiff=image.format == "TIFF"))


def pack_exif(exif: Image.Exif, *, tiff: bool) -> bytes | None:
    """Encode EXIF without orientation and, of a TIFF, without what belongs to its layout; changes `exif`."""
    if tiff:
        for tag in LAYOUT_TAGS & set(exif):
            del exif[tag]
    exif.pop(ORIENTATION, None)
    exif.bigtiff = False  # what is packed is not, whatever it comes from
    try:
        return exif.tobytes() if exif else None
    except Exception as exc:  # of damaged tags, nearly any
        LOG.warning("EXIF is damaged and not kept (%s: %s)", type(exc).__name__, one_line(exc))
        return None


def turn(image: np.ndarray, orientation: object) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8; anything else leaves the picture as it is."""
    if orientation in SWAPPED:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
