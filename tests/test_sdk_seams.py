"""Tiled equals untiled, on every engine, for the tiny bundles and for what is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import Bundle, Upscaler, bundle, tiling
from sdk.upscaler import SEAMS

ENGINES = ["onnxruntime", "openvino"]
SHIPPED = bundle.shipped_models() or [
    pytest.param(None, marks=pytest.mark.skip(reason="no model is shipped in sdk/models"))
]
UNTILED = 1 << 20  # a tile beyond every picture here


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def difference(model: str | Path, engine: str, image: np.ndarray, tile: int, *, halo: int | None = None) -> int:
    """Give the largest difference between tiled and untiled, in code values, optionally with another halo."""
    pytest.importorskip(engine)
    with Upscaler(model, backend=engine, precision="fp32") as upscaler:
        if halo is not None:
            upscaler._overlap = replace(upscaler._overlap, halo=halo)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        tiles = upscaler.stats.tiles
        tiled = upscaler.upscale(image, tile=tile)
        assert upscaler.stats.tiles - tiles > 1, "this picture was not cut"
    return int(abs(tiled - whole).max())


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size,tile", [((47, 61), 8), ((33, 9), 5), ((5, 100), 16), ((1, 30), 4)])
def test_tiled_equals_untiled_with_the_blur(engine: str, size: tuple[int, int], tile: int) -> None:
    assert difference(bundles.shared("blur"), engine, noise(*size), tile) <= 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size,tile", [((201, 223), 64), ((135, 250), 13), ((7, 210), 40)])
def test_tiled_equals_untiled_with_the_strided_network(engine: str, size: tuple[int, int], tile: int) -> None:
    assert difference(bundles.shared("unet"), engine, noise(*size), tile) <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_quarter_of_the_halo_shows(engine: str) -> None:
    halo = Bundle.load(bundles.shared("unet")).stage().context(error=1.0)
    quarter = halo // 4 // 8 * 8
    assert difference(bundles.shared("unet"), engine, noise(150, 150), 48, halo=quarter) > 1
    assert difference(bundles.shared("blur"), engine, noise(40, 40), 8, halo=0) > 1


def test_tiles_off_the_grid_show() -> None:
    """Windows of the right size at the wrong places: no halo saves them."""
    pytest.importorskip("onnxruntime")
    with Upscaler(bundles.shared("unet"), backend="onnxruntime") as upscaler:
        image = noise(160, 160)
        whole = upscaler.upscale(image).astype(int)
        upscaler._stage = replace(upscaler._stage, stride=4)
        upscaler._overlap = tiling.Overlap(44, 4)
        assert abs(upscaler.upscale(image, tile=20) - whole).max() > 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (8, 8), (9, 7), (39, 41)])
@pytest.mark.parametrize("kind", ["blur", "unet"])
def test_pictures_smaller_than_the_halo(kind: str, size: tuple[int, int]) -> None:
    pytest.importorskip("onnxruntime")
    with Upscaler(bundles.shared(kind), backend="onnxruntime") as upscaler:
        image = noise(*size)
        result = upscaler.upscale(image)
        assert result.shape == (2 * size[0], 2 * size[1], 3)
        assert abs(result.astype(int) - upscaler.upscale(image, tile=1)).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_tiled_equals_untiled_beyond_8_bits(dtype: type) -> None:
    pytest.importorskip("onnxruntime")
    image = noise(130, 170)
    image = image.astype(np.uint16) * 257 if dtype == np.uint16 else image.astype(np.float32) / np.float32(255)
    with Upscaler(bundles.shared("unet"), backend="onnxruntime") as upscaler:
        whole, tiled = (upscaler.upscale(image, tile=tile).astype(np.float64) for tile in (UNTILED, 32))
    one = 257 if dtype == np.uint16 else 1 / 255
    assert abs(whole - tiled).max() <= one


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tile", [8, 40, 72])
def test_fast_seams_keep_their_limit(engine: str, tile: int) -> None:
    pytest.importorskip(engine)
    image = noise(190, 210)
    with Upscaler(bundles.shared("unet"), backend=engine, precision="fp32", seams="fast") as upscaler:
        assert upscaler.info["halo"] < Bundle.load(bundles.shared("unet")).stage().context(error=SEAMS["exact"])
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        assert abs(upscaler.upscale(image, tile=tile) - whole).max() <= SEAMS["fast"]


def hard_picture(kind: str, height: int, width: int, make_photo) -> np.ndarray:
    """Draw what photographs hardly hold and networks react to from far away."""
    if kind == "noise":
        return noise(height, width)
    if kind == "checkerboard":
        plane = np.indices((height, width)).sum(axis=0) % 2 * 255
    elif kind == "specks":
        plane = np.random.default_rng(3).choice([0, 255], (height, width))
    else:
        photo = Image.fromarray(make_photo(height, width))
        return np.asarray(photo.convert("1").convert("RGB") if kind == "dither" else photo)
    return plane.astype(np.uint8)[:, :, None].repeat(3, axis=2)


@pytest.mark.parametrize("kind", ["photo", "noise", "checkerboard", "specks", "dither"])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("seams", SEAMS)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_tiled_equal_untiled(name: str, seams: str, precision: str, kind: str, make_photo) -> None:
    with Upscaler(name, precision=precision, seams=seams) as upscaler:
        image = hard_picture(kind, 301, 238, make_photo)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        tiled = upscaler.upscale(image, tile=40)
        assert upscaler.stats.tiles > 2, "this picture was not cut"
        # bf16 rounds differently at other window shapes, most where every pixel is black or white.
        rounding = 0 if upscaler.info["precision"] == "fp32" else 1 if kind == "photo" else 4
        # The cross-fade mixes in pixels with half the context, which shows on such pictures: 12 were seen.
        fading = 12 if seams == "fast" and kind != "photo" else 0
        assert abs(tiled - whole).max() <= SEAMS[seams] + rounding + fading


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_several_halos_wide(name: str, engine: str, make_photo) -> None:
    stage = Bundle.load(name).stage()
    side = 6 * stage.context(error=1.0) + 3 * stage.stride + 1
    assert difference(name, engine, make_photo(side, side + 9), 2 * stage.context(error=1.0)) <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_show_a_quarter_of_the_halo(name: str, make_photo) -> None:
    stage = Bundle.load(name).stage()
    halo = stage.context(error=1.0)
    image = np.concatenate([make_photo(6 * halo, 3 * halo), noise(6 * halo, 3 * halo)], axis=1)
    quarter = halo // 4 // stage.stride * stage.stride
    assert difference(name, "onnxruntime", image, stage.stride, halo=quarter) > 1


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (17, 3)])
def test_shipped_models_take_tiny_pictures(name: str, size: tuple[int, int]) -> None:
    pytest.importorskip("onnxruntime")
    with Upscaler(name, backend="onnxruntime") as upscaler:
        scale = upscaler.scale
        assert upscaler.upscale(noise(*size)).shape == (size[0] * scale, size[1] * scale, 3)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_keep_the_mean_colour(name: str) -> None:
    pytest.importorskip("onnxruntime")
    with Upscaler(name, backend="onnxruntime") as upscaler:
        for colour in ((0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 60, 30), (20, 90, 180)):
            result = upscaler.upscale(np.full((96, 96, 3), colour, np.uint8))
            # 2 code values: what a network that learned on photographs may be off on a flat field.
            assert abs(result.mean(axis=(0, 1)) - colour).max() <= 2, colour
