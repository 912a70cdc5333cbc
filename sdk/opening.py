"""Open picture files with Pillow: which formats, up to what size, how deep, and what went wrong."""

from __future__ import annotations

import importlib
import io
import logging
import operator
import os
import re
import stat
import struct
import zlib
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
# TIFF tags that describe the layout of one file and no other, with Photoshop's layers (37724) and notes (50255). They
# are EXIF to Pillow, and some programs leave them in that of a JPEG.
LAYOUT_TAGS = {273, 284, 297, 301, 317, 330, 700, 33723, 34377, 34675, 37724, 50255}.union(
    *(range(254, 267), range(277, 282), range(288, 294), range(320, 329), range(332, 348), range(512, 522)),
    range(529, 533),
)
BOMB_CURE = "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it, or convert it to PNG"
MAX_SCANS = 200  # of a JPEG; about ten are usual, and each takes its time, however few bytes it has
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of JPEG, but for those that restart a scan
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
# First column and row of each pass of an interlaced PNG, and the steps.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
INFLATED_BYTES = 1 << 18  # at once
SRGB_GAMMA = 1 / 2.2  # as PNG's gAMA chunk gives it for sRGB


@dataclass(frozen=True)
class Metadata:
    """What goes along with the pixels: ICC profile and EXIF as bytes, either may be missing."""

    icc_profile: bytes | None = None
    exif: bytes | None = None


@contextmanager
def told(path: object) -> Iterator[None]:
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
        raise ImageError(f"{path}: too large for Pillow ({exc}); {BOMB_CURE}") from exc
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
    if max_pixels is None:
        return
    number = whole_number(max_pixels)
    if number is None or number < 0:
        raise OptionError(f"max_pixels {max_pixels!r}: a number of pixels from 0 (no limit), or None")


def whole_number(value: object) -> int | None:
    """Give a whole number, NumPy's too, as an int; None for anything else, True and False among it."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    """Refuse a picture of (width, height) before memory is taken for it; a few bytes may ask for any amount.

    Raises: ImageError.
    """
    width, height = size
    if max_pixels and width * height > max_pixels:
        raise ImageError(
            f"too large ({width} x {height} px, the limit is {max_pixels} pixels); "
            "raise max_pixels (--max-pixels) if you trust it"
        )


def open_source(source: Path | bytes) -> BinaryIO:
    """Open a file, or the bytes of one.

    Raises: ImageError if it is no regular file, like a pipe, which could let us wait for ever; OSError.
    """
    if not isinstance(source, Path):
        return io.BytesIO(source)
    stream = open(source, "rb", opener=_open_at_once)  # noqa: SIM115 -- the caller closes it
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ImageError("not a file")
    return stream


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def opened(file: Path | bytes | BinaryIO, *, max_pixels: int | None) -> Iterator[Any]:
    """Open a picture without decoding it, and close it: a PIL picture of any plug-in.

    Unlike Image.open, this leaves alone Image.MAX_IMAGE_PIXELS, which is one for all threads; a few plug-ins ask it
    themselves (WebP and GIF, and TIFF for its tiles), so that above it those need it raised as well.
    Raises: ImageError if the picture is larger than the limit; UnidentifiedImageError; or what a plug-in raises.
    """
    with open_source(file) if isinstance(file, (Path, bytes)) else file as stream:
        image = _open(stream, max_pixels)
        check_size(image.size, max_pixels)
        yield image


def _open(stream: BinaryIO, max_pixels: int | None) -> Image.Image:
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
        try:
            if name == "ICO":
                _check_icon(stream, max_pixels)
            if name == "JPEG":
                _check_scans(stream)
            stream.seek(0)
            return factory(stream, "")  # without the name, which would have raw pixels mapped into memory
        except (SyntaxError, IndexError, TypeError, struct.error) as exc:  # what a plug-in says "not mine" with
            LOG.debug("not read as %s (%s)", name, exc)
    if prefix[4:8] == b"ftyp" and prefix[8:12] in AVIF_BRANDS and not has_avif():
        raise ImageError("this Pillow reads no AVIF: pip install 'pillow>=11.3'")
    raise UnidentifiedImageError


def _check_icon(stream: BinaryIO, max_pixels: int | None) -> None:
    """Check the size of each picture in an ICO, which its table need not tell; Pillow decodes one as it opens it."""
    stream.seek(4)
    table = stream.read(16 * int.from_bytes(stream.read(2), "little"))
    for (offset,) in struct.iter_unpack("<12xI", table[: len(table) // 16 * 16]):
        stream.seek(offset)
        head = stream.read(24).ljust(24, b"\0")
        if head.startswith(b"\x89PNG"):
            check_size(struct.unpack_from(">II", head, 16), max_pixels)
        else:  # a bitmap, above one of the same size that tells what is visible
            width, height = struct.unpack_from("<HH" if head[0] == 12 else "<ii", head, 4)
            check_size((abs(width), abs(height) // 2), max_pixels)


def _check_scans(stream: BinaryIO) -> None:
    """Refuse a JPEG that asks for very many passes over its pixels; Pillow and libjpeg set no limit."""
    stream.seek(0)
    found, last = 0, b""
    while block := stream.read(1 << 20):
        found += block.count(b"\xff\xda") + (last + block[:1] == b"\xff\xda")
        last = block[-1:]
    if found <= MAX_SCANS:
        return
    # Profiles, previews and further pictures may hold these bytes too: follow the markers, as libjpeg does.
    stream.seek(0)
    data = stream.read()
    scans, position = 0, 2
    while (marker := MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        bare = marker[0] in (b"\xff\xd8", b"\xff\x01")
        position = marker.end() + (0 if bare else int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    if scans > MAX_SCANS:
        raise ImageError(f"a JPEG of {scans} scans, the limit is {MAX_SCANS}; store it anew if you trust it")


def load(image: Any) -> None:
    """Decode a picture that is not decoded yet.

    Raises: ImageError if rows are missing from a PNG, which Pillow would leave black; or what a plug-in raises.
    """
    if image.format == "PNG":
        position = image.fp.tell()
        _check_rows(image.fp)
        image.fp.seek(position)
    image.load()


def _check_rows(stream: BinaryIO) -> None:
    """Inflate the first IDAT chunks of a PNG that follow one another, which are all that is shown of it."""
    stream.seek(8)
    expected = found = 0
    began, decoder = False, zlib.decompressobj()
    while len(head := stream.read(8)) == 8:
        length, following = int.from_bytes(head[:4], "big"), stream.tell() + int.from_bytes(head[:4], "big") + 4
        if head[4:] == b"IHDR":
            expected = _inflated_bytes(stream.read(13))
        elif head[4:] == b"IDAT":
            began = True
            while length and (data := stream.read(min(length, INFLATED_BYTES))):
                length -= len(data)
                found += _inflate(decoder, data, expected - found)
            if decoder.eof or found > expected:  # viewers ignore what is too much
                break
        elif began:
            break
        stream.seek(following)
    if found < expected:
        raise ImageError(f"{expected - found} of {expected} bytes of its pixels are missing; the file is damaged")
    if found == expected and not decoder.eof:
        raise ImageError("its pixels end without their checksum; the file is damaged")


def _inflate(decoder: Any, data: bytes, limit: int) -> int:
    """Give how many bytes a part of a zlib stream holds; no longer counted once they are more than a limit."""
    found = 0
    while found <= limit and not decoder.eof:
        piece = len(decoder.decompress(data, INFLATED_BYTES))
        found += piece
        data = decoder.unconsumed_tail
        if not data and piece < INFLATED_BYTES:
            break
    return found


def _inflated_bytes(header: bytes) -> int:
    """Give the bytes of all rows of a PNG by its IHDR, each with its filter."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    total = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = max(0, -((left - width) // across)), max(0, -((top - height) // down))
        if columns:
            total += rows * (1 + (columns * PNG_SAMPLES[colour_type] * depth + 7) // 8)
    return total


def has_avif() -> bool:
    """Tell whether Pillow was built with AVIF."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return bool(AvifImagePlugin.SUPPORTED)


def is_tiff(source: Path | bytes) -> bool:
    """Tell a TIFF by its first bytes, whether Pillow reads it or not."""
    with open_source(source) as stream:
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
    return Metadata(image.info.get("icc_profile") or None, pack_exif(image.getexif()))


def has_odd_gamma(image: Image.Image) -> bool:
    """Tell whether a PNG says by its gAMA chunk, and by nothing better, that it is not meant as sRGB."""
    known = "icc_profile" in image.info or "srgb" in image.info
    return not known and abs(image.info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) > 0.01


def pack_exif(exif: Image.Exif) -> bytes | None:
    """Encode EXIF without orientation and without what belongs to the layout of a TIFF; changes `exif`."""
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
