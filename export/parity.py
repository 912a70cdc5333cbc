"""Compare pictures, and hold engines against what their network should give. Without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sdk import tiling

from .errors import ExportError

PICTURES = Path(__file__).parent / "pictures"
MAX_FLOAT_ERROR = 0.25 / 255  # of float pictures, a quarter of a code value
MAX_FP32_ERROR = 1  # code values against the reference
MIN_PSNR_DB = {"fp16": 50.0, "bf16": 45.0, "int8": 38.0}


@dataclass(frozen=True)
class Difference:
    """Of two 8-bit pictures: PSNR in dB (inf when equal), largest error in code values, and where (row, column)."""

    psnr_db: float
    max_error: int
    place: tuple[int, int]


def compare(result: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare (H, W, 3) uint8 pictures of one shape."""
    error = np.abs(result.astype(np.int16) - reference)
    mse = float(np.mean(error.astype(np.float64) ** 2))
    row, column, _ = np.unravel_index(int(error.argmax()), error.shape)
    return Difference(
        float(10 * np.log10(255**2 / mse)) if mse else float("inf"), int(error.max()), (int(row), int(column))
    )


def find_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder by name, without hidden files."""
    from sdk import files

    paths = folder.glob("[!.]*") if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix.lower() in files.FORMATS and path.is_file())


def read_rgb(path: Path) -> np.ndarray:
    """Read a picture of any kind as (H, W, 3) uint8. Raises: ImageError if it cannot be read."""
    from sdk import files

    picture = files.read(path)[0]
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    return np.asarray(Image.fromarray(picture).convert("RGB"))


def read_pictures(folder: Path | None, *, largest: int) -> list[tuple[str, np.ndarray]]:
    """Read real pictures (name, (H, W, 3) uint8), cropped in the middle to at most `largest` pixels a side.

    Raises: ExportError if the folder holds none.
    """
    paths = find_pictures(folder or PICTURES)
    if not paths:
        raise ExportError(f"{folder}: no pictures to check the export on; give a folder with --pictures")
    result = []
    for path in paths:
        array = read_rgb(path)
        top, left = (max(0, (side - largest) // 2) for side in array.shape[:2])
        result.append((path.name, array[top : top + largest, left : left + largest].copy()))
    return result


def check_parity(
    run: Callable[[np.ndarray], np.ndarray],
    references: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    precision: str,
    where: str,
    of: str = "PyTorch",
) -> Difference:
    """Hold an engine against fp32 on (name, picture, reference) triples.

    run: (1, h, w, 3) uint8 -> (1, h*scale, w*scale, 3) uint8. fp32 may differ by 1 code value anywhere; the others
    must reach MIN_PSNR_DB on every picture. where: names stage and engine in the message, of: who made the references.
    Returns: the lowest PSNR and the largest error of all. Raises: ExportError that names precision, picture and place.
    """
    differences = []
    for name, picture, reference in references:
        difference = compare(run(picture[None])[0], reference)
        if precision == "fp32":
            bad = difference.max_error > MAX_FP32_ERROR
            limit = f"at most {MAX_FP32_ERROR} code value"
        else:
            bad = not difference.psnr_db >= MIN_PSNR_DB[precision]
            limit = f"at least {MIN_PSNR_DB[precision]} dB"
        if bad:
            raise ExportError(
                f"{where}, {precision}: {name} differs from {of} by {difference.max_error} code values at "
                f"{difference.place}, {difference.psnr_db:.1f} dB ({limit} is allowed)"
            )
        differences.append(difference)
    by_error = max(differences, key=lambda difference: difference.max_error)
    return replace(by_error, psnr_db=min(difference.psnr_db for difference in differences))


def on_grid(picture: np.ndarray, stride: int) -> np.ndarray:
    """Mirror-pad a picture to the stride grid."""
    height, width = (tiling.round_up(side, stride) for side in picture.shape[:2])
    return tiling.pad_to(picture, (height, width))
