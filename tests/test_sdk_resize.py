"""Other sizes: what may be asked for, and the resize that gives them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sdk import OptionError, resize

RTOL = 1e-3  # where the result is hardly visible, colour is the quotient of two small sums of larger terms
HIGHEST = {np.uint8: 255, np.uint16: 65535, np.float32: 1}


@pytest.mark.parametrize(
    "factor,size,expected",
    [
        (None, None, (20, 40)), (1.5, None, (15, 30)), (np.float32(0.5), None, (5, 10)), (0.001, None, (1, 1)),
        (None, (7, 9), (7, 9)), (None, (None, 10), (5, 10)), (None, (np.int32(5), None), (5, 10)),
        (None, [640, 1280], (640, 1280)), (None, (None, 1), (1, 1)),
    ],
)  # fmt: skip
def test_target_size(factor: float | None, size: object, expected: tuple[int, int]) -> None:
    assert resize.target_size((10, 20), scale=2, factor=factor, size_wanted=size) == expected


@pytest.mark.parametrize(
    "size",
    [
        np.array([20, 20]), (None, 10**400), (10**400, None), (10**400, 10**400), (641, 1280), (641, None), (0, 5),
        (None, None), (5,), (5, 5, 5), (5.0, 5), "55", 5, {5: 5},
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(size: object) -> None:
    with pytest.raises(OptionError, match="size"):
        resize.target_size((10, 20), scale=2, factor=None, size_wanted=size)


@pytest.mark.parametrize("factor", [0, -1, 64.1, 10**400, float("nan"), float("inf"), "2", 2j])
def test_factors_that_cannot_be(factor: object) -> None:
    with pytest.raises(OptionError, match="factor"):
        resize.target_size((10, 20), scale=2, factor=factor, size_wanted=None)


@pytest.mark.parametrize("dtype", HIGHEST)
@pytest.mark.parametrize("size", [(12, 24), (5, 7), (37, 9)])
def test_invisible_pixels_do_not_show_and_keep_their_colour(dtype: type, size: tuple[int, int]) -> None:
    """The visible half is white; the invisible one is grey, and neither darkens the other."""
    highest = HIGHEST[dtype]
    image = np.full((8, 16, 4), highest, dtype)
    image[:, 8:, :3] = grey = dtype(highest * 0.75)
    image[:, 8:, 3] = 0
    result = resize.resize(image, size)
    invisible = result[..., 3] == 0
    assert result.dtype == dtype and invisible.any() and not invisible.all()
    far = result[:, -(size[1] // 5) :]
    np.testing.assert_allclose(far[..., :3].astype(float), float(grey), atol=highest * 1e-6)
    seen = result[result[..., 3] >= (1 / 65535 if dtype == np.float32 else 1)]
    np.testing.assert_allclose(seen[:, :3].astype(float), highest, rtol=RTOL)


@pytest.mark.parametrize("dtype", HIGHEST)
@pytest.mark.parametrize("alpha", [0, 5e-4, 0.5, 1])
def test_any_alpha_leaves_an_even_colour_as_it_is(dtype: type, alpha: float) -> None:
    image = np.full((8, 8, 2), HIGHEST[dtype] * 0.5, dtype)
    image[:, :, 1] = HIGHEST[dtype] * alpha
    image[0, 0, 1] += HIGHEST[dtype] * 1e-4  # not all the same
    result = resize.resize(image, (13, 6))
    np.testing.assert_allclose(result[..., 0].astype(float), float(image[0, 0, 0]), rtol=1e-5)


def test_colour_is_weighted_where_the_result_is_visible_and_only_there() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    image[:, :10, 3] = 0
    result, plain = resize.resize(image, (19, 50)), resize.resize(image[:, :, :3], (19, 50))
    near = slice(20, 24)  # where the filter reaches what is visible
    invisible = result[:, near, 3] == 0
    assert invisible.any()
    np.testing.assert_array_equal(result[:, near, :3][invisible], plain[:, near][invisible])
    assert (result[:, 26:, :3] != plain[:, 26:]).mean() > 0.5


def test_colour_without_alpha_is_what_pillow_makes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    expected = Image.fromarray(image.astype(np.float32)).resize((20, 5), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resize.resize(image, (5, 20)), np.rint(np.clip(expected, 0, 255)))


@pytest.mark.parametrize("dtype", HIGHEST)
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 2), (9, 7, 3), (9, 7, 4)])
@pytest.mark.parametrize("size", [(20, 5), (9, 7)])
def test_results_are_contiguous(dtype: type, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    image = (np.random.default_rng(0).random(shape) * HIGHEST[dtype]).astype(dtype)
    for view in (image, np.asfortranarray(image), image[:, ::-1]):
        result = resize.resize(view, size)
        assert result.flags.c_contiguous and result.shape == (*size, *shape[2:]) and result.dtype == dtype


def test_channels_are_resized_one_after_the_other() -> None:
    """What NumPy takes at once: the result, and a few planes of float32 besides."""
    image = np.random.default_rng(0).integers(0, 65536, (256, 256, 4), dtype=np.uint16)
    size = 1024, 1024
    plane_bytes = 4 * size[0] * size[1]
    tracemalloc.start()
    result = resize.resize(image, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - result.nbytes < 5 * plane_bytes  # 4.2 was measured; all channels at once took 12
