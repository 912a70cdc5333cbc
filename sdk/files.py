"""Read and write picture files: EXIF orientation, ICC profile, formats; written whole or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import pixels
from .errors import ImageError, OutputError

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
MAX_PIXELS = 512 << 20  # refused beyond: a few bytes of a file can ask for any amount of memory


@dataclass(frozen=True)
class Metadata:
    """What goes along with the pixels: ICC profile and EXIF as bytes, either may be missing."""

    icc_profile: bytes | None = None
    exif: bytes | None = None


def read(path: Path) -> tuple[np.ndarray, Metadata]:
    """Read a picture with its orientation applied.

    Returns: an array that pixels.check_array accepts, and its metadata with the orientation reset.
    Raises: ImageError if the file is missing, not a picture, truncated, or larger than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns up to twice its size; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(f"{path}: {image.width}x{image.height} is over the limit of {MAX_PIXELS} pixels")
                image.load()
                if getattr(image, "n_frames", 1) > 1:
                    LOG.warning("%s: %d frames, only the first is read", path, image.n_frames)
                return _decode(image)
    except ImageError:
        raise
    except UnidentifiedImageError as exc:
        raise ImageError(f"{path}: not a picture in a known format") from exc
    except OSError as exc:
        raise ImageError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    # Pillow's parsers raise these for damaged files.
    except (ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError) as exc:
        raise ImageError(f"{path}: damaged picture ({exc})") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{path}: too large ({exc})") from exc


def _decode(image: Image.Image) -> tuple[np.ndarray, Metadata]:
    icc = image.info.get("icc_profile")
    if image.mode == "CMYK":
        LOG.info("converted from CMYK to RGB; its ICC profile does not describe the result and is dropped")
        icc = None
    exif = image.getexif()
    has_exif = bool(exif)
    upright = ImageOps.exif_transpose(image)
    exif.pop(ORIENTATION, None)
    return pixels.from_pil(upright), Metadata(icc or None, exif.tobytes() if has_exif else None)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done for it.

    Raises: OutputError if the format is unknown, the folder is missing, or the file exists and may not be replaced.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: unknown format {path.suffix!r}: one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or allow overwriting")


def write(path: Path, image: np.ndarray, metadata: Metadata, *, quality: int, overwrite: bool) -> None:
    """Write a picture under a temporary name, then rename it.

    image: as returned by Upscaler.upscale. quality: of JPEG and WebP, 1 to 100.
    Raises: OutputError if it cannot be written (disk full, no permission, a format without alpha or 16 bits).
    """
    check_output(path, overwrite=overwrite)
    kind = FORMATS[path.suffix.lower()]
    picture = _encodable(image, kind, path)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = quality
    if kind == "JPEG":
        options["subsampling"] = 0
    if kind == "TIFF":
        options["compression"] = "tiff_adobe_deflate"
    if kind != "BMP":
        options |= {key: value for key, value in vars(metadata).items() if value}
    temporary = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as stream:
            picture.save(stream, kind, **options)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise OutputError(f"{path}: cannot be written ({reason})") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _encodable(image: np.ndarray, kind: str, path: Path) -> Image.Image:
    channels = image.shape[2] if image.ndim == 3 else 1
    if kind in ("JPEG", "BMP") and channels in (2, 4):
        raise OutputError(f"{path}: {kind} has no alpha channel; write PNG, WebP or TIFF")
    if image.dtype != np.uint8 and not (kind in ("PNG", "TIFF") and channels == 1):
        raise OutputError(f"{path}: {kind} with {channels} channels of {image.dtype} is not supported here; use uint8")
    if kind == "PNG" and image.dtype == np.float32:
        raise OutputError(f"{path}: PNG has no floating point; write TIFF")
    if kind == "WEBP" and channels == 2:
        image = image[:, :, [0, 0, 0, 1]]
    return pixels.to_pil(image)
