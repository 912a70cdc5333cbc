"""Rows that come in bands, read as overlapping windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from sdk import ImageError
from sdk.bands import Window


def picture(height: int, channels: int | None = 3) -> np.ndarray:
    shape = (height, 5) if channels is None else (height, 5, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def refilled(image: np.ndarray, cuts: list[int]) -> Iterator[np.ndarray]:
    """Give bands in one buffer, as readers do that take no new memory."""
    buffer = np.empty_like(image)
    for top, bottom in itertools.pairwise(cuts):
        buffer[:] = 77
        buffer[: bottom - top] = image[top:bottom]
        yield buffer[: bottom - top]
    buffer[:] = 77


@pytest.mark.parametrize("channels", [None, 1, 4])
@pytest.mark.parametrize("cuts", [[0, 21], [0, 3, 10, 21], list(range(22)), [0, 0, 8, 8, 16, 21, 21]])
@pytest.mark.parametrize("side,step", [(24, 24), (8, 8), (16, 8)])
def test_windows_of_a_buffer_that_is_filled_again(channels: int | None, cuts: list[int], side: int, step: int) -> None:
    """Every window is kept until the end: an engine may still be at one when the next is read."""
    image = picture(21, channels)
    window = Window(refilled(image, cuts), (21, 5))
    starts = range(0, 24 - side + 1, step)
    found = [window.read(start, min(21, start + side)) for start in starts]
    window.check_end()
    for start, rows in zip(starts, found, strict=True):
        np.testing.assert_array_equal(rows, image[start : start + side])
    assert window.dtype == np.uint8 and window.channels == channels


def test_rows_may_be_skipped_or_read_again() -> None:
    image = picture(40)
    window = Window(refilled(image, [0, 4, 30, 40]), (40, 5))
    for start, stop in ((2, 6), (3, 6), (3, 5), (4, 31), (38, 40)):
        np.testing.assert_array_equal(window.read(start, stop), image[start:stop])


def test_the_source_is_asked_for_no_more_than_the_window_needs() -> None:
    taken: list[int] = []
    image = picture(20)

    def rows() -> Iterator[np.ndarray]:
        for top in range(0, 20, 5):
            taken.append(top)
            yield image[top : top + 5]

    window = Window(rows(), (20, 5))
    for stop, tops in ((4, [0]), (5, [0]), (6, [0, 5]), (20, [0, 5, 10, 15])):
        window.read(0, stop)
        assert taken == tops


@pytest.mark.parametrize("empty_at", [0, 1, 2])
def test_bands_without_rows_are_passed_over(empty_at: int) -> None:
    image = picture(8)
    rows = [image[:4], image[4:]]
    rows.insert(empty_at, image[:0])
    window = Window(rows, (8, 5))
    np.testing.assert_array_equal(window.read(0, 8), image)
    window.check_end()


@pytest.mark.parametrize(
    "bands,message",
    [
        ([], "ends after 0 of 8"), ([4, 3], "ends after 7 of 8"), ([4, 5], "more than the 8"), ([8, 1], "more than"),
    ],
)  # fmt: skip
def test_rows_that_do_not_make_up_the_picture(bands: list[int], message: str) -> None:
    window = Window(map(picture, bands), (8, 5))
    with pytest.raises(ImageError, match=message):
        window.read(0, 8)
        window.check_end()


@pytest.mark.parametrize("other", [picture(4, 4), picture(4, None), picture(4).astype(np.uint16)])
def test_bands_of_two_kinds_are_refused(other: np.ndarray) -> None:
    window = Window([picture(4), other], (8, 5))
    with pytest.raises(ImageError, match="differ"):
        window.read(0, 8)
