"""A sheet of patches: what each method makes of the same places, beside the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdk import compare
from sdk.errors import OutputError

from .metrics import luma, psnr
from .pictures import find_pictures

PATCH = 144  # HR pixels a side; smaller where a picture is
ROWS = 2  # of each folder
STEP = 16  # of the places that are looked at
MAGNIFIED = 1.5


def draw_sheet(
    folders: Sequence[Path],
    *,
    scale: int,
    methods: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    prepare: Callable[[Path, int], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Put patches of a few pictures of each folder under one another, every method's beside the original.

    methods: (h, w, 3) -> (h*scale, w*scale, 3) uint8. prepare: gives LR and HR of a file at a scale.
    Returns: (H, W, 3) uint8. The patch is where the original has most detail; PSNR-Y, in dB, is the patch's own.
    """
    rows = []
    for folder in folders:
        found = find_pictures(folder)
        for path in [found[index * len(found) // ROWS] for index in range(min(ROWS, len(found)))]:
            lr, hr = prepare(path, scale)
            place = most_detailed(hr)
            shown = {"LR": lr.repeat(scale, axis=0).repeat(scale, axis=1)}
            shown |= {name: method(lr) for name, method in methods.items()}
            original = hr[place]
            cells = [
                (f"{name} {psnr(luma(picture[place]), luma(original)):.1f}", _magnified(picture[place]))
                for name, picture in shown.items()
            ]
            rows.append(compare.side_by_side([*cells, (f"original, {folder.name}", _magnified(original))]))
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def most_detailed(picture: np.ndarray) -> tuple[slice, slice]:
    """Give the rows and columns of the patch with the largest mean gradient."""
    y = luma(picture)
    detail = np.zeros(y.shape)
    detail[1:, 1:] = np.abs(np.diff(y, axis=0))[:, 1:] + np.abs(np.diff(y, axis=1))[1:]
    height, width = (min(PATCH, side) for side in y.shape)
    sums = np.pad(detail.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    tops, lefts = np.arange(0, y.shape[0] - height + 1, STEP), np.arange(0, y.shape[1] - width + 1, STEP)
    whole = sums[np.ix_(tops + height, lefts + width)] - sums[np.ix_(tops, lefts + width)]
    whole += sums[np.ix_(tops, lefts)] - sums[np.ix_(tops + height, lefts)]
    row, column = np.unravel_index(whole.argmax(), whole.shape)
    return slice(tops[row], tops[row] + height), slice(lefts[column], lefts[column] + width)


def write_sheet(sheet: np.ndarray, path: Path) -> None:
    """Write a PNG. Raises: OutputError."""
    try:
        Image.fromarray(sheet).save(path, "PNG")
    except OSError as exc:
        raise OutputError(f"{path}: cannot be written ({exc.strerror or exc})") from exc


def _magnified(patch: np.ndarray) -> Image.Image:
    """Enlarge a patch to one size, with every pixel seen."""
    side = round(PATCH * MAGNIFIED)
    return Image.fromarray(np.ascontiguousarray(patch)).resize((side, side), Image.Resampling.NEAREST)
