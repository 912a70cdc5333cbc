"""Put the parts of an animation together, as browsers show it.

Pillow does not: 13.0 is wrong for frames of GIF that are cleared, and of APNG that are blended over what is restored.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import opening

KEEP, CLEAR, RESTORE = 1, 2, 3  # after a part was shown: leave it, make its place transparent, or undo it
Box = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Part:
    """What one frame draws.

    data: a still picture, as a file of its own. size: its (width, height), before it is decoded. over: blended with
    what is there, not put in its place. milliseconds: how long it stays.
    """

    data: bytes
    size: tuple[int, int]
    left: int
    top: int
    over: bool
    disposal: int
    milliseconds: float


def compose(
    parts: Iterable[Part], size: tuple[int, int], *, max_pixels: int | None
) -> Iterator[tuple[np.ndarray, float]]:
    """Draw each part on what was left by those before it; what lies outside of (width, height) is cut off.

    Yields: ((H, W, 4) uint8 RGBA, milliseconds). Raises: ImageError if a part is larger than max_pixels, or what
    Pillow raises for a damaged one.
    """
    opening.check_size(size, max_pixels)
    canvas = Image.new("RGBA", size)
    for part in parts:
        opening.check_size(part.size, max_pixels)
        before = canvas.copy() if part.disposal == RESTORE else None
        box = (part.left, part.top, min(part.left + part.size[0], size[0]), min(part.top + part.size[1], size[1]))
        inside = box[0] < box[2] and box[1] < box[3]
        if inside:
            with opening.opened(io.BytesIO(part.data), max_pixels=max_pixels) as image:
                opening.load(image)
                picture = image.convert("RGBA").crop((0, 0, box[2] - box[0], box[3] - box[1]))
            if part.over:
                canvas.alpha_composite(picture, box[:2])
            else:
                canvas.paste(picture, box[:2])
        yield np.asarray(canvas), part.milliseconds
        if before:
            canvas = before
        elif part.disposal == CLEAR and inside:
            canvas.paste((0, 0, 0, 0), box)


def changed(before: np.ndarray | None, after: np.ndarray) -> Box:
    """Give the smallest box that holds every pixel that differs, of one pixel if none does."""
    if before is None:
        return 0, after.shape[0], 0, after.shape[1]
    differs = (before != after).any(axis=2)
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if not rows.size:
        return 0, 1, 0, 1
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
