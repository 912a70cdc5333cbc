"""Photographs on disk: where they are, how they are read, and which of them show the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError

LOG = logging.getLogger(__name__)
# Others, such as PostScript behind a wrong suffix, would start programs or be no photographs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Photographs all the same, which somebody would miss.
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}
# Perceptual hashes that differ in so few of 64 bits are one picture's. Of 565 photographs the two pairs of copies
# differ in 0 and 4 bits, and no others in fewer than 14.
NEAR_BITS = 8


def find_pictures(folder: Path, *, tells_others: bool = False) -> list[Path]:
    """List the pictures below a folder, sorted by path.

    tells_others: warn of photographs in formats that are not read.
    Raises: DataError if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: {'a file, not a' if folder.exists() else 'no such'} folder; give a folder of photographs"
        )
    try:
        files = [
            path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES and path.is_file()
        ]
    except OSError as exc:
        raise DataError(f"{folder}: cannot be read ({exc})") from exc
    paths = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: no pictures found ({', '.join(sorted(SUFFIXES))})")
    if tells_others and (left := sorted({path.suffix.lower() for path in files} - SUFFIXES)):
        LOG.warning("%s: %d files are not taken (%s)", folder, len(files) - len(paths), ", ".join(left))
    return paths


def read_picture(path: Path) -> np.ndarray:
    """Decode a picture, turned as its EXIF orientation says: (H, W, 3) uint8 RGB.

    Raises: nearly anything on broken files; `describe_fault` words it.
    """
    with Image.open(path, formats=FORMATS) as image:
        return decode(image)


def picture_size(path: Path) -> tuple[int, int]:
    """Read (width, height) from a picture's head. Raises: as read_picture."""
    with Image.open(path, formats=FORMATS) as image:
        return image.size


def decode(image: Image.Image) -> np.ndarray:
    """Do what `read_picture` does with an opened picture."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"{image.mode} pixels, only 8-bit pictures are read")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:  # Pillow warns of what would be lost; the pixels are the same
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def describe_fault(exc: Exception) -> str:
    """Say in a few words why a picture could not be read."""
    return "not a picture" if isinstance(exc, UnidentifiedImageError) else str(exc) or type(exc).__name__


def pixel_digest(picture: np.ndarray) -> str:
    """Hash the pixels of (H, W, 3) uint8: SHA-256, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(picture).data).hexdigest()


def perceptual_hash(picture: np.ndarray) -> int:
    """Hash what (H, W, 3) uint8 looks like into 64 bits, nearly the same for a resized or recompressed copy.

    The signs of the 8x8 lowest frequencies of a 32x32 grey thumbnail against their median ("pHash", C. Zauner 2010).
    """
    grey = Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.BICUBIC)
    cosines = np.cos(np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32)
    # Flat pictures have nothing but rounding errors above the mean, which are not to decide.
    frequencies = np.round(cosines @ np.asarray(grey, np.float64) @ cosines.T, 6).ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the mean
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def copies_before(hashes: Sequence[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each picture that has near-duplicates before it: its index, theirs, and in how many bits they differ."""
    octets = np.array(hashes, np.uint64).view(np.uint8).reshape(-1, 8)
    signs = np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1  # (N, 64)
    for start in range(0, len(signs), 256):
        rows = signs[start : start + 256]
        differing = (64 - rows @ signs[: start + len(rows)].T) / 2
        for row in np.flatnonzero((differing <= NEAR_BITS).sum(axis=1) > 1):  # one is the picture itself
            near = np.flatnonzero(differing[row, : start + row] <= NEAR_BITS)
            if len(near):
                yield start + int(row), near, differing[row, near].astype(int)


def hold_out(digests: Sequence[str], hashes: Sequence[int], count: int) -> set[int]:
    """Choose up to `count` pictures to validate on, at most a fifth; by their pixels, not by names or order.

    digests, hashes: from `pixel_digest` and `perceptual_hash`. Copies and near-copies fall on the same side.
    Returns: their indices.
    """
    room = min(count, len(digests) // 5)
    if room < 1:
        return set()
    group = np.arange(len(digests))
    for index, near, _ in copies_before(hashes):
        joined = np.unique(group[near])
        group[np.isin(group, joined)] = joined[0]
        group[index] = joined[0]
    chosen: set[int] = set()
    seen: set[int] = set()
    for index in sorted(range(len(digests)), key=lambda each: digests[each]):
        if group[index] in seen:
            continue
        seen.add(int(group[index]))
        members = np.flatnonzero(group == group[index])
        if len(members) <= room:
            chosen.update(members.tolist())
            room -= len(members)
            if not room:
                break
    return chosen
