"""Where the pictures of a benchmark come from, and plain interpolation, the baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdk import ImageError, files, planes

BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC
LANCZOS = Image.Resampling.LANCZOS


def find_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder, not of those inside it, sorted by name.

    Raises: ImageError if there is no such folder or no picture in it.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; give one that holds high-resolution pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in files.FORMATS)
    if not found:
        raise ImageError(f"{folder}: no pictures in it (looked for {', '.join(files.FORMATS)})")
    return found


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 RGB, alpha dropped.

    Raises: ImageError if it is missing, damaged, not a picture, or deeper than 8 bits.
    """
    image, _ = files.read(path)
    if image.dtype != np.uint8:
        raise ImageError(f"{path}: {image.dtype}; benchmarks take 8-bit pictures, convert it first")
    return planes.split(image).colour


def enlarge(lr: np.ndarray, scale: int, *, resample: Image.Resampling) -> np.ndarray:
    """Interpolate (h, w, 3) uint8 to (h*scale, w*scale, 3) uint8 on the CPU."""
    size = (lr.shape[1] * scale, lr.shape[0] * scale)
    return np.asarray(Image.fromarray(lr).resize(size, resample))


def fit_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop the middle of a picture to the proportions of `size` and resize it to (height, width, 3) uint8."""
    return np.array(ImageOps.fit(Image.fromarray(picture), size[::-1], BICUBIC))


def draw_picture(size: tuple[int, int], *, seed: int = 1) -> np.ndarray:
    """Draw (height, width, 3) uint8, the same for a seed: gradients, discs with soft edges, fine texture."""
    height, width = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = 90 + 70 * np.stack([np.sin(x / a + y / b) for a, b in rng.uniform(40, 160, (3, 2))], axis=2)
    for _ in range(12):
        centre_y, centre_x, radius = rng.uniform(0, 1, 3) * (height, width, min(size) / 3)
        inside = np.clip(radius - np.hypot(y - centre_y, x - centre_x), 0, 1)
        picture += inside[:, :, None] * rng.uniform(-80, 80, 3)
    texture = 12 * np.sin(x * 0.9 + y * 0.4) + rng.normal(0, 4, size)
    return np.clip(np.rint(picture + texture[:, :, None]), 0, 255).astype(np.uint8)
