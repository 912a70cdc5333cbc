"""Read and write picture files: EXIF orientation, ICC profile, formats; written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import pixels
from .errors import ImageError, OptionError, OutputError

LOG = logging.getLogger(__name__)
ORIENTATION = 0x0112
# Suffix -> Pillow's format.
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
# What may be read, in Pillow's names; it knows more, of which some start other programs (EPS).
READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "TGA", "ICO")
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
# TIFF tags that describe the layout of one file, and no other: Pillow gives them as EXIF.
LAYOUT_TAGS = {254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
LAYOUT_TAGS |= {330, 338, 339, 347, 700, 33723, 34377, 34675}


@dataclass(frozen=True)
class Metadata:
    """What goes along with the pixels: ICC profile and EXIF as bytes, either may be missing."""

    icc_profile: bytes | None = None
    exif: bytes | None = None


def read(path: Path) -> tuple[np.ndarray, Metadata]:
    """Read a picture with its orientation applied.

    Returns: an array that pixels.check_array accepts, and its metadata with the orientation reset.
    Raises: ImageError if the file is missing, not a picture, truncated, or larger than Pillow's limit
    (PIL.Image.MAX_IMAGE_PIXELS: beyond twice that a few bytes of a file could ask for any amount of memory).
    """
    try:
        with Image.open(path, formats=READABLE) as image:
            deep = _has_16_bits(image)
            image.load()
            if deep and image.mode in ("RGB", "RGBA"):
                LOG.warning("%s: its 16-bit colour is read in 8 bits; Pillow cannot do more", path)
            if getattr(image, "n_frames", 1) > 1:
                LOG.warning("%s: %d frames, only the first is read", path, image.n_frames)
                image.seek(0)
            return pixels.from_pil(ImageOps.exif_transpose(image)), _metadata(image)
    except ImageError as exc:
        raise ImageError(f"{path}: {exc}") from exc
    except UnidentifiedImageError as exc:
        raise ImageError(f"{path}: not a picture in a known format") from exc
    except OSError as exc:
        raise ImageError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{path}: too large ({exc}); raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from exc
    except Exception as exc:  # Pillow's parsers raise nearly anything for a damaged file
        raise ImageError(f"{path}: damaged picture ({type(exc).__name__}: {exc})") from exc


def _metadata(image: Image.Image) -> Metadata:
    """Take ICC profile and EXIF without orientation; an EXIF block that cannot be written again is left out."""
    exif = image.getexif()
    if image.format == "TIFF":
        for tag in LAYOUT_TAGS & set(exif):
            del exif[tag]
    exif.pop(ORIENTATION, None)
    try:
        block = exif.tobytes() if exif else None
    except Exception as exc:  # of damaged tags, nearly any
        LOG.warning("EXIF is damaged and not kept (%s: %s)", type(exc).__name__, exc)
        block = None
    return Metadata(image.info.get("icc_profile") or None, block)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: OutputError if the format is unknown, the folder is missing, or the file exists and may not be replaced.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: unknown format {path.suffix!r}: one of {', '.join(FORMATS)}")
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
        raise OutputError(f"{path}: {kind} has no alpha channel; write PNG, WebP or TIFF")
    if image.dtype != np.uint8 and not (kind in ("PNG", "TIFF") and channels == 1):
        raise OutputError(f"{path}: {kind} with {channels} channels of {image.dtype} is not supported here; use uint8")
    if kind == "PNG" and image.dtype == np.float32:
        raise OutputError(f"{path}: PNG has no floating point; write TIFF")
    side = max(image.shape[:2]) * scale
    if side > MAX_SIDE.get(kind, side):
        raise OutputError(f"{path}: {kind} holds at most {MAX_SIDE[kind]} pixels a side, not {side}; write PNG or TIFF")


def write(path: Path, image: np.ndarray, metadata: Metadata, *, quality: int, overwrite: bool) -> None:
    """Write a picture under a temporary name, then rename it.

    image: as returned by Upscaler.upscale. quality: of JPEG and WebP, 1 to 100.
    Raises: OptionError for another quality; OutputError if it cannot be written (disk full, no permission, a format
    without alpha or 16 bits).
    """
    check_quality(quality)
    check_output(path, overwrite=overwrite)
    check_format(path, image, scale=1)
    kind = FORMATS[path.suffix.lower()]
    if kind == "WEBP" and image.ndim == 3 and image.shape[2] == 2:
        image = image[:, :, [0, 0, 0, 1]]
    picture = pixels.to_pil(image)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = quality
    if kind == "JPEG":
        options["subsampling"] = 0
    if kind == "TIFF" and not metadata.exif:  # with compression Pillow cannot write EXIF's tables (GPS, exposure)
        options["compression"] = "tiff_adobe_deflate"
    if kind != "BMP" and metadata.exif:
        options["exif"] = metadata.exif
    if kind != "BMP" and metadata.icc_profile:
        if pixels.fits_profile(metadata.icc_profile, "RGB" if kind == "WEBP" else picture.mode):
            options["icc_profile"] = metadata.icc_profile
        else:
            LOG.warning("%s: the ICC profile is not of the result's colour space and is dropped", path)
    temporary = path.with_name(f".sr-{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as stream:
            picture.save(stream, kind, **options)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except Exception as exc:  # OSError of the system; Pillow's encoders raise nearly anything
        reason = getattr(exc, "strerror", None) or exc
        raise OutputError(f"{path}: cannot be written ({reason})") from exc
    finally:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a folder with a name that the system refuses
            temporary.unlink(missing_ok=True)


def check_quality(quality: int) -> None:
    """Raise OptionError unless quality is a whole number from 1 to 100."""
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise OptionError(f"quality {quality!r}: a number from 1 to 100")


def _has_16_bits(image: Image.Image) -> bool:
    """Tell whether the file of a picture that is not loaded yet holds 16 bits a channel, whatever its mode says."""
    # (decoder, extents, offset, arguments): the arguments name the layout, like "RGB;16B".
    return any(re.search(";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", []))
