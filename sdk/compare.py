"""A comparison panel: titled pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from . import pixels

TITLE_HEIGHT = 18


def panel(image: np.ndarray, enlarged: np.ndarray) -> np.ndarray:
    """Put nearest, bilinear and our enlargement side by side: uint8 RGB (H*scale + title, 3*W*scale, 3)."""
    size = (enlarged.shape[1], enlarged.shape[0])
    source = _to_rgb(image)
    return side_by_side(
        [
            ("nearest", source.resize(size, Image.Resampling.NEAREST)),
            ("bilinear", source.resize(size, Image.Resampling.BILINEAR)),
            ("ours", _to_rgb(enlarged)),
        ]
    )


def side_by_side(cells: Sequence[tuple[str, Image.Image]]) -> np.ndarray:
    """Put titled pictures of one size into a row: uint8 RGB."""
    width, height = cells[0][1].size
    sheet = Image.new("RGB", (width * len(cells), height + TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, picture) in enumerate(cells):
        draw.text((index * width + 4, 3), title, fill="black")
        sheet.paste(picture, (index * width, TITLE_HEIGHT))
    return np.asarray(sheet)


def _to_rgb(image: np.ndarray) -> Image.Image:
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    elif image.dtype == np.float32:
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels.to_pil(image).convert("RGB")
