"""The comparison panel, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdk import compare


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cells_are_nearest_bilinear_and_ours(channels: int) -> None:
    rng = np.random.default_rng(0)
    image, ours = (rng.integers(0, 256, (*size, channels), dtype=np.uint8) for size in ((7, 9), (21, 18)))
    panel = compare.panel(image, ours)
    assert panel.shape == (21 + compare.TITLE_HEIGHT, 3 * 18, 3) and panel.dtype == np.uint8
    small = Image.fromarray(image[:, :, 0] if channels == 1 else image).convert("RGB")
    cells = [
        small.resize((18, 21), Image.Resampling.NEAREST), small.resize((18, 21), Image.Resampling.BILINEAR),
        np.broadcast_to(ours[:, :, :3], (21, 18, 3)),
    ]  # fmt: skip
    np.testing.assert_array_equal(panel[compare.TITLE_HEIGHT :], np.concatenate(cells, axis=1))
    titles = panel[: compare.TITLE_HEIGHT].reshape(compare.TITLE_HEIGHT, 3, 18, 3)
    assert (titles < 128).any(axis=(0, 2, 3)).all(), "a cell has no title"


def test_more_than_8_bits_are_shown_in_8() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = compare.panel(image, image)
    np.testing.assert_array_equal(compare.panel(image.astype(np.uint16) * 257, image), expected)
    np.testing.assert_array_equal(compare.panel(image / np.float32(255), image), expected)
