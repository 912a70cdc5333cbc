"""Geometry: plans cover every pixel, windows respect their limit, tiles come back together."""

from __future__ import annotations

import numpy as np
import pytest

from sdk import tiling


def random_cases(count: int, seed: int):
    """Give (size, window, halo, stride) tuples that `plan` accepts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        stride = int(rng.choice([1, 2, 3, 8, 16]))
        halo = stride * int(rng.integers(0, 5))
        window = tuple(2 * halo + stride * int(n) for n in rng.integers(1, 6, 2))
        size = tuple(int(n) for n in rng.integers(1, 14 * stride + 6 * halo + 2, 2))
        yield size, window, halo, stride


@pytest.mark.parametrize("seed", range(4))
def test_plan_covers_every_pixel_exactly_once(seed: int) -> None:
    for size, window, halo, stride in random_cases(100, seed):
        plan = tiling.plan(size, window=window, halo=halo, stride=stride)
        covered = np.zeros(plan.padded, int)
        for rows, columns in plan.windows:
            covered[rows.keep_start : rows.keep_stop, columns.keep_start : columns.keep_stop] += 1
        assert (covered == 1).all(), (size, window, halo, stride)


@pytest.mark.parametrize("blend", [False, True])
def test_windows_are_equal_on_the_grid_inside_and_keep_their_context(blend: bool) -> None:
    for size, window, halo, stride in random_cases(300, 11):
        plan = tiling.plan(size, window=window, halo=halo, stride=stride, blend=blend)
        assert all(0 <= padded - side < stride for side, padded in zip(size, plan.padded))
        assert all(side <= limit for side, limit in zip(plan.window, window))
        context = halo - halo // 2 if blend else halo
        for window_spans in plan.windows:
            for span, side, length in zip(window_spans, plan.window, plan.padded):
                assert span.stop - span.start == side
                assert span.start % stride == span.stop % stride == 0
                assert 0 <= span.start <= span.keep_start < span.keep_stop <= span.stop <= length
                assert span.start == 0 or span.keep_start - span.start >= context
                assert span.stop == length or span.stop - span.keep_stop >= context


def test_one_piece_where_it_fits() -> None:
    plan = tiling.plan((17, 30), window=(24, 32), halo=8, stride=8)
    assert plan.one_piece and plan.window == plan.padded == (24, 32)
    assert not tiling.plan((17, 33), window=(24, 32), halo=8, stride=8).one_piece


def test_choose_window_keeps_its_limit() -> None:
    for size, _, halo, stride in random_cases(300, 5):
        for limit in (1, 500, 4000, 60_000):
            height, width = tiling.choose_window(size, limit=limit, halo=halo, stride=stride)
            smallest = 2 * halo + stride
            assert height % stride == width % stride == 0
            assert height * width <= max(limit, smallest**2)
            plan = tiling.plan(size, window=(height, width), halo=halo, stride=stride)
            assert plan.window == (height, width)


def test_choose_window_is_no_worse_than_any_square() -> None:
    def cost(size: tuple[int, int], window: tuple[int, int], halo: int, stride: int) -> int:
        plan = tiling.plan(size, window=window, halo=halo, stride=stride)
        return len(plan.windows) * plan.window[0] * plan.window[1]

    for size, _, halo, stride in random_cases(150, 6):
        limit = 3000
        chosen = cost(size, tiling.choose_window(size, limit=limit, halo=halo, stride=stride), halo, stride)
        sides = range(2 * halo + stride, max(int(limit**0.5), 2 * halo + stride) + 1, stride)
        assert chosen <= min(cost(size, (side, side), halo, stride) for side in sides)


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


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_gather_then_place_gives_the_picture_back(dtype: type, blend: bool) -> None:
    rng = np.random.default_rng(1)
    for size, window, halo, stride in random_cases(60, 9):
        image = rng.integers(0, 256, (*size, 3)).astype(dtype)
        plan = tiling.plan(size, window=window, halo=halo, stride=stride, blend=blend)
        batch = tiling.gather(tiling.pad_to(image, plan.padded), plan.windows)
        assert batch.shape == (len(plan.windows), *plan.window, 3) and batch.flags.c_contiguous
        # A fresh canvas may hold anything.
        canvas = np.full((size[0] * 2, size[1] * 2, 3), 77 if dtype == np.uint8 else np.nan, dtype)
        tiling.place(canvas, batch.repeat(2, axis=1).repeat(2, axis=2), plan.windows, scale=2)
        expected = image.repeat(2, axis=0).repeat(2, axis=1)
        if dtype == np.uint8:
            np.testing.assert_array_equal(canvas, expected)
        else:
            np.testing.assert_allclose(canvas, expected, rtol=1e-5)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 3e38])
def test_blending_ignores_what_the_canvas_held(rubbish: float) -> None:
    plan = tiling.plan((40, 40), window=(24, 24), halo=8, stride=8, blend=True)
    ones = np.ones((len(plan.windows), 24, 24, 3), np.float32)
    canvas = np.full((40, 40, 3), rubbish, np.float32)
    tiling.place(canvas, ones, plan.windows, scale=1)
    np.testing.assert_allclose(canvas, 1, rtol=1e-6)


def test_blending_stays_between_what_the_tiles_say() -> None:
    plan = tiling.plan((64, 64), window=(32, 32), halo=8, stride=8, blend=True)
    values = np.linspace(10, 200, len(plan.windows)).astype(np.uint8)
    tiles = np.broadcast_to(values[:, None, None, None], (len(values), 32, 32, 3))
    canvas = np.zeros((64, 64, 3), np.uint8)
    tiling.place(canvas, tiles, plan.windows, scale=1)
    assert canvas.min() == 10 and canvas.max() == 200
    # Along the first row, from the first tile to the second, it rises without a jump.
    step = np.diff(canvas[0, :32, 0].astype(int))
    assert (step >= 0).all() and step.max() <= -(-(int(values[1]) - int(values[0])) // 8) + 1
