"""Colour and alpha as the network takes them: bleeding, and what streams must not change."""

from __future__ import annotations

import numpy as np
import pytest

from sdk import Upscaler, planes


def scene(height: int, width: int, dtype: type = np.uint8, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make colour and a visible part of discs and specks."""
    rng = np.random.default_rng(seed)
    most = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    colour = (rng.random((height, width, 3)) * most).astype(dtype)
    y, x = np.mgrid[:height, :width]
    visible = rng.random((height, width)) > 0.9995
    for _ in range(6):
        top, left, radius = rng.integers(0, (height, width, 60))
        visible |= np.hypot(y - top, x - left) < radius
    return colour, visible


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_filled_colour_is_the_mean_of_what_is_nearest(dtype: type) -> None:
    colour = np.zeros((40, 40, 3), dtype)
    visible = np.zeros((40, 40), bool)
    most = 1 if dtype == np.float32 else 200
    colour[31:33, 31:33] = most  # across the corner of four blocks
    visible[31:33, 31:33] = True
    filled = planes.bleed(colour, visible)
    assert filled.dtype == dtype and (filled == most).all()
    assert not colour[0, 0].any(), "the picture is not modified"


def test_visible_colour_stays_and_far_colour_too() -> None:
    colour, visible = scene(300, 700)
    visible[:, 300:] = False
    filled = planes.bleed(colour, visible)
    assert (filled[visible] == colour[visible]).all()
    assert (filled[:, 300 + 3 * planes.REACH :] == colour[:, 300 + 3 * planes.REACH :]).all()
    hidden = np.zeros_like(visible)
    assert planes.bleed(colour, hidden) is colour and planes.bleed(colour, ~hidden) is colour


def test_everything_within_reach_is_filled() -> None:
    """No dark rim may stay beside what is seen, wherever it lies on the grid."""
    for top in range(28, 40):
        colour, visible = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), bool)
        colour[top, 50], visible[top, 50] = 99, True
        near = np.s_[max(0, top - 32) : top + 33, 18:83]
        assert (planes.bleed(colour, visible)[near] == 99).all()


@pytest.mark.parametrize("first,last", [(0, 320), (64, 512), (416, 700)])
def test_filling_looks_no_further_than_its_reach(first: int, last: int) -> None:
    colour, visible = scene(700, 1200)
    whole = planes.bleed(colour, visible)
    from_row, to_row = max(0, first - planes.REACH), min(700, last + planes.REACH)
    part = planes.bleed(colour[from_row:to_row], visible[from_row:to_row])
    assert (part[first - from_row :][: last - first] == whole[first:last]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_streamed_cut_outs_are_what_they_are_in_memory(dtype: type, channels: int) -> None:
    colour, visible = scene(400, 310, dtype)
    most = 255 if dtype == np.uint8 else 65535
    alpha = np.where(visible, most, 0).astype(dtype)
    alpha[100:140] //= 3
    image = np.dstack([colour[:, :, : channels - 1], alpha])
    with Upscaler("fast-x2", backend="onnxruntime", device="cpu") as opened:
        for tile in (None, 64):
            rows = (image[top : top + 33] for top in range(0, 400, 33))
            streamed = np.concatenate(list(opened.upscale_bands(rows, (400, 310), tile=tile)))
            assert (streamed == opened.upscale(image, tile=tile)).all()


def test_grey_is_the_mean_in_the_same_dtype() -> None:
    colour = np.array([[[1, 2, 4]]], np.uint16)
    assert planes.join(planes.Planes(colour, None), channels=None).tolist() == [[2]]
    joined = planes.join(planes.Planes(colour, np.uint16(9)), channels=2)
    assert joined.dtype == np.uint16 and joined.tolist() == [[[2, 9]]]
