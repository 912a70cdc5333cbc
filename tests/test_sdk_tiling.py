"""Geometry: plans cover every pixel, windows respect their limit, tiles come back together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sdk import tiling


def random_cases(count: int, seed: int, *, blend: bool = False):
    """Give (size, window, overlap) tuples that `plan` accepts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        stride = int(rng.choice([1, 2, 3, 8, 16]))
        overlap = tiling.Overlap(
            stride * int(rng.integers(0, 5)), stride, fade=tiling.fade_width(stride) if blend else 0
        )
        window = tuple(overlap.width + stride * int(n) for n in rng.integers(1, 6, 2))
        size = tuple(int(n) for n in rng.integers(1, 14 * stride + 3 * overlap.width + 2, 2))
        yield size, window, overlap


@pytest.mark.parametrize("seed", range(4))
def test_plan_covers_every_pixel_exactly_once(seed: int) -> None:
    for size, window, overlap in random_cases(100, seed):
        plan = tiling.plan(size, window=window, overlap=overlap)
        covered = np.zeros(plan.padded, int)
        for rows in plan.rows:
            for columns in plan.columns:
                covered[rows.keep_start : rows.keep_stop, columns.keep_start : columns.keep_stop] += 1
        assert (covered == 1).all(), (size, window, overlap)


@pytest.mark.parametrize("blend", [False, True])
def test_windows_are_equal_on_the_grid_inside_and_keep_their_context(blend: bool) -> None:
    for size, window, overlap in random_cases(300, 11, blend=blend):
        plan = tiling.plan(size, window=window, overlap=overlap)
        assert all(0 <= padded - side < overlap.stride for side, padded in zip(size, plan.padded))
        assert all(side <= limit for side, limit in zip(plan.window, window))
        for axis, side, length in zip((plan.rows, plan.columns), plan.window, plan.padded):
            for before, span in zip((None, *axis), axis):
                assert span.stop - span.start == side
                assert span.start % overlap.stride == span.stop % overlap.stride == 0
                assert 0 <= span.start <= span.keep_start < span.keep_stop <= span.stop <= length
                assert span.start == 0 or span.keep_start - span.start >= overlap.halo
                assert span.stop == length or span.stop - span.keep_stop >= overlap.halo
                assert span.fade == (overlap.fade if before else 0)
                assert before is None or before.keep_stop == span.keep_start + span.fade


def test_one_piece_where_it_fits() -> None:
    overlap = tiling.Overlap(8, 8)
    plan = tiling.plan((17, 30), window=(24, 32), overlap=overlap)
    assert plan.count == 1 and plan.window == plan.padded == (24, 32)
    assert tiling.plan((17, 33), window=(24, 32), overlap=overlap).count == 2


def test_choose_window_keeps_its_limit() -> None:
    for size, _, overlap in random_cases(300, 5):
        for limit in (1, 500, 4000, 60_000):
            height, width = tiling.choose_window(size, limit=limit, overlap=overlap)
            assert height % overlap.stride == width % overlap.stride == 0
            assert height * width <= max(limit, overlap.smallest_window**2)
            assert tiling.plan(size, window=(height, width), overlap=overlap).window == (height, width)


def test_choose_window_is_no_worse_than_any_other() -> None:
    def cost(size: tuple[int, int], window: tuple[int, int], overlap: tiling.Overlap) -> int:
        plan = tiling.plan(size, window=window, overlap=overlap)
        return plan.count * (plan.window[0] * plan.window[1] + tiling.CALL_PIXELS)

    for size, _, overlap in random_cases(150, 6):
        limit = 3000
        chosen = cost(size, tiling.choose_window(size, limit=limit, overlap=overlap), overlap)
        smallest, stride = overlap.smallest_window, overlap.stride
        heights = range(smallest, max(smallest, limit // smallest) + 1, stride)
        others = [(height, width) for height in heights for width in range(smallest, limit // height + 1, stride)]
        assert chosen <= min(cost(size, window, overlap) for window in [(smallest, smallest), *others])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 8), (8, 8), (31, 5)])
def test_pad_to_mirrors_down_to_one_pixel(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    target = (tiling.round_up(size[0], 32), tiling.round_up(size[1], 32))
    padded = tiling.pad_to(image, target)
    assert padded.shape == (*target, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[: size[0], : size[1]], image)
    if 1 < size[0] < 32:
        np.testing.assert_array_equal(padded[size[0], : size[1]], image[-2])
    assert set(map(tuple, padded.reshape(-1, 3))) == set(map(tuple, image.reshape(-1, 3)))


def run_plan(images: np.ndarray, plan: tiling.Plan, *, scale: int, tile=lambda number, batch: batch) -> np.ndarray:
    """Cut (N, H, W, C) pictures, enlarge every window by repetition, and put all together."""
    padded = tiling.pad_to(images, plan.padded)
    number = itertools.count()

    def strips():
        for rows in plan.rows:
            windows = [(index, columns) for index in range(len(images)) for columns in plan.columns]
            batch = tiling.gather(padded[:, rows.start : rows.stop], windows)
            assert batch.shape == (len(windows), *plan.window, images.shape[3]) and batch.flags.c_contiguous
            batch = tile(next(number), batch).repeat(scale, axis=1).repeat(scale, axis=2)
            height = min(rows.keep_stop, plan.size[0]) - rows.keep_start
            # A fresh strip may hold anything.
            rubbish = np.nan if images.dtype == np.float32 else 77
            shape = (len(images), height * scale, plan.size[1] * scale, images.shape[3])
            strip = np.full(shape, rubbish, images.dtype)
            tiling.place(strip, batch, windows, rows=rows, scale=scale)
            yield strip

    return np.concatenate([part.copy() for part in tiling.finished_rows(strips(), plan, scale=scale)], axis=1)


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gather_then_place_gives_the_pictures_back(dtype: type, blend: bool) -> None:
    rng = np.random.default_rng(1)
    for size, window, overlap in random_cases(60, 9, blend=blend):
        images = rng.integers(0, 256, (2, *size, 3)).astype(dtype)
        result = run_plan(images, tiling.plan(size, window=window, overlap=overlap), scale=2)
        assert result.dtype == dtype
        np.testing.assert_allclose(result, images.repeat(2, axis=1).repeat(2, axis=2), rtol=1e-6)


def test_blending_is_smooth_along_both_axes_and_in_corners() -> None:
    """Windows that disagree by 90: between neighbouring pixels no step is larger than a cross-fade makes it."""
    overlap = tiling.Overlap(8, 8, fade=8)
    plan = tiling.plan((56, 56), window=(40, 40), overlap=overlap)
    values = np.array([[20, 110], [110, 200]], np.uint8)
    assert (len(plan.rows), len(plan.columns)) == (2, 2)

    def tile(number: int, batch: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values[number][:, None, None, None], batch.shape)

    result = run_plan(np.zeros((1, 56, 56, 3), np.uint8), plan, scale=1, tile=tile)[0, :, :, 0].astype(int)
    assert result.min() == 20 and result.max() == 200
    for axis in (0, 1):
        steps = np.diff(result, axis=axis)
        assert (steps >= 0).all() and steps.max() <= 90 // 8 + 2
    assert abs(result - result.T).max() <= 1  # the corner knows which axis came first by its rounding only


def test_a_window_may_be_as_high_as_the_picture() -> None:
    # Four of 576 columns hold 1.2 times the pixels of the picture; of squares it took six, which hold 1.28 times.
    overlap = tiling.Overlap(64, 8)
    assert tiling.choose_window((1080, 1920), limit=640_000, overlap=overlap) == (1080, 576)


@pytest.mark.parametrize("max_height", [48, 50, 80, 4000])
def test_choose_window_stays_as_low_as_it_must(max_height: int) -> None:
    overlap = tiling.Overlap(16, 8)
    for size in ((3000, 20000), (60, 9000), (3000, 30)):
        height, width = tiling.choose_window(size, limit=200 * 200, overlap=overlap, max_height=max_height)
        assert height <= max_height and height * width <= 200 * 200
        tiling.plan(size, window=(height, width), overlap=overlap)
    assert tiling.choose_window((100, 100), limit=200 * 200, overlap=overlap, max_height=48) == (104, 104)
