"""Tiled equals untiled, on every engine, for the tiny bundles and for what is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import BackendUnavailable, Bundle, Upscaler, bundle, tiling
from sdk import runner as module
from sdk.backends import HostBackend
from sdk.bundle import FORMAT, MANIFEST, VERSION, Graph, HaloRow, Manifest, Stage, hash_file

ENGINES = ["onnxruntime", "openvino"]
SHIPPED = bundle.shipped_models() or [
    pytest.param(None, marks=pytest.mark.skip(reason="no model is shipped in sdk/models"))
]
UNTILED = 1 << 20  # a tile beyond every picture here
SEAMS = {"exact": 1, "fast": 4}  # as promised
KINDS = ["photo", "noise", "checkerboard", "specks", "dither"]


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def difference(model: str | Path, engine: str, image: np.ndarray, tile: int, *, halo: int | None = None) -> int:
    """Give the largest difference between tiled and untiled, in code values, optionally with another halo."""
    pytest.importorskip(engine)
    with Upscaler(model, backend=engine, precision="fp32") as upscaler:
        if halo is not None:
            upscaler._runner.overlap = replace(upscaler._runner.overlap, halo=halo)
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
        upscaler._runner.stage = replace(upscaler._runner.stage, stride=4)
        upscaler._runner.overlap = tiling.Overlap(42, 4)  # more context than the 40 that are enough
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
        assert upscaler.info["halo"] == Bundle.load(bundles.shared("unet")).stage().context(error=2)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        assert abs(upscaler.upscale(image, tile=tile) - whole).max() <= SEAMS["fast"]


def test_fast_seams_take_a_smaller_halo() -> None:
    with Upscaler("fast-x4", seams="fast") as fast, Upscaler("fast-x4") as exact:
        assert fast.info["halo"] < exact.info["halo"]


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seams", SEAMS)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_tiled_equal_untiled(name: str, seams: str, kind: str, make_photo) -> None:
    with Upscaler(name, precision="fp32", seams=seams) as upscaler:
        image = hard_picture(kind, 221, 250, make_photo)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        assert upscaler.stats.tiles == 1
        tiled = upscaler.upscale(image, tile=48)
        assert upscaler.stats.tiles >= 1 + 2 * 2, "this picture was not cut both ways"
        assert abs(tiled - whole).max() <= SEAMS[seams]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHIPPED)
def test_tiles_in_bf16_differ_by_rounding_alone(name: str, kind: str, make_photo) -> None:
    """bf16 rounds differently at other window shapes: on photographs by 1, elsewhere by what bf16 costs anyway."""
    pytest.importorskip("openvino")
    image = hard_picture(kind, 221, 250, make_photo)
    try:
        upscaler = Upscaler(name, backend="openvino", precision="bf16")
    except BackendUnavailable as exc:
        pytest.skip(str(exc))
    with upscaler, Upscaler(name, backend="openvino", precision="fp32") as full:
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        tiled = upscaler.upscale(image, tile=48).astype(int)
        exact = full.upscale(image, tile=UNTILED).astype(int)
    if kind == "photo":
        assert abs(tiled - whole).max() <= 2
    # As near to fp32 as the picture in one piece, within the seams' limit and a fifth for other roundings.
    assert abs(tiled - exact).max() <= 1.2 * abs(whole - exact).max() + 1


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "size,tile",
    [((1, 1), 1), ((1, 200), 1), ((190, 3), 8), ((63, 65), 8), ((40, 217), 1), ((137, 145), 8), ((149, 163), 24)],
)
def test_shipped_models_at_odd_sizes(name: str, size: tuple[int, int], tile: int) -> None:
    """Down to one pixel, smaller than the halo on one or both sides, and just larger than a window."""
    pytest.importorskip("onnxruntime")
    with Upscaler(name, backend="onnxruntime") as upscaler:
        image = noise(*size)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        assert whole.shape == (upscaler.scale * size[0], upscaler.scale * size[1], 3)
        halo, stride = upscaler.info["halo"], upscaler.info["stride"]
        cut = tiling.round_up(max(size), stride) > tiling.round_up(tile, stride) + 2 * halo
        tiled = upscaler.upscale(image, tile=tile)
        assert (upscaler.stats.tiles > 2) == cut
        assert abs(tiled - whole).max() <= 1


def test_fast_seams_show_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that disagree by up to 48 code values: nowhere, corners included, is a step more than the fade's."""

    class Disagreeing(HostBackend):
        name, precision, engine = "fake", "fp32", "fake 1"
        runs = 0

        def run(self, batch: np.ndarray) -> np.ndarray:
            Disagreeing.runs += 1
            value = 100 + 48 * (Disagreeing.runs * 7 % 3) // 2
            return np.full((1, 2 * batch.shape[1], 2 * batch.shape[2], 3), value, np.uint8)

        def expect(self, shape: tuple[int, ...], *, runs: int) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "open_backend", lambda name, request: Disagreeing())
    with Upscaler(bundles.shared("unet"), seams="fast") as upscaler:
        image = noise(190, 210)
        fade = 2 * upscaler._runner.overlap.fade
        bands = upscaler.upscale_bands(iter([image[:77], image[77:]]), (190, 210), tile=16)
        for result in (upscaler.upscale(image, tile=16), np.concatenate(list(bands))):
            result = result.astype(int)
            assert np.ptp(result) == 48, "all windows agreed"
            for axis in (0, 1):
                # One more for rounding along each axis.
                assert abs(np.diff(result, axis=axis)).max() <= 48 / fade + 2


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
    assert difference(name, "onnxruntime", image, 3 * stage.stride, halo=quarter) > 1


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


# The 41.2 million parameter network: random weights, x1, so that its stride is 32. A strip 32 pixels high is cut along
# its width only, which shows its reach in that direction for the price of a 192 x 192 picture; the small U-Net above
# is cut both ways.

STRIP_WIDTH = 1139  # off the grid too


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the perceptual U-Net as a bundle, its halo measured on strips."""
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from export.precision import round_weights
    from export.to_onnx import WeightsFile, trace
    from train.models import build_model
    from train.recipe import recipe_from_dict

    folder = tmp_path_factory.mktemp("bundle") / "perceptual"
    folder.mkdir()
    recipe = recipe_from_dict({"model": {"name": "perceptual-unet", "scales": [1]}})
    torch.manual_seed(0)
    network = build_model(recipe.model, weights="random").eval()
    assert sum(parameter.numel() for parameter in network.parameters()) > 41e6
    with torch.no_grad():
        network.fold()
    round_weights(network)
    weights = WeightsFile.write(folder / "main.weights", network)
    onnx.save(trace(network, scale=1, ends="uint8", weights=weights), folder / "main.onnx")
    stage = Stage(
        name="main", training_size=256, opset=17, stride=network.stride(1), activation_bytes=4000,
        weights=hash_file(folder / "main.weights"), graphs=(Graph(hash_file(folder / "main.onnx"), "fp32", "uint8"),),
        halo=(HaloRow(0, 0.0),), parity=(),
    )  # fmt: skip
    assert stage.stride == 32
    write_perceptual(folder, stage)
    with Upscaler(folder, backend="onnxruntime") as upscaler:
        write_perceptual(folder, replace(stage, halo=measure_strip(upscaler, stage.stride)))
    return folder


def write_perceptual(folder: Path, stage: Stage) -> None:
    manifest = Manifest(
        format=FORMAT, version=VERSION, name="perceptual", scale=1, channels=3, input_layout="NHWC",
        output_layout="NHWC", stages=(stage,), training={}, licence="Apache-2.0", notice="For tests.",
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def measure_strip(upscaler: Upscaler, stride: int) -> tuple[HaloRow, ...]:
    """Cut the left end of a strip away, and see how far the difference reaches."""
    strip = noise(32, 1088)
    cut = 320
    whole = upscaler.upscale(strip, tile=UNTILED).astype(int)
    part = upscaler.upscale(np.ascontiguousarray(strip[:, cut:]), tile=UNTILED)
    errors = abs(part - whole[:, cut:]).max(axis=(0, 2))
    worst = [int(errors[start:].max()) for start in range(0, len(errors), stride)]
    enough = next(index for index, error in enumerate(worst) if error <= 1)
    # A window is cut at both ends, and other pictures reach a little further: one stride more.
    rows = [HaloRow(index * stride, float(max(error, 2))) for index, error in enumerate(worst[: enough + 1])]
    return (*rows, HaloRow((enough + 1) * stride, 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_the_perceptual_unet_tiled_equals_untiled(perceptual: Path, kind: str, make_photo) -> None:
    with Upscaler(perceptual, backend="onnxruntime") as upscaler:
        halo = upscaler.info["halo"]
        assert halo > 200, "random weights that carry far were expected"
        image = hard_picture(kind, 29, STRIP_WIDTH, make_photo)
        whole = upscaler.upscale(image, tile=UNTILED).astype(int)
        assert upscaler.stats.tiles == 1
        tiled = upscaler.upscale(image, tile=160)
        assert upscaler.stats.tiles > 2, "this strip was not cut"
        assert abs(tiled - whole).max() <= 1
        upscaler._runner.overlap = replace(upscaler._runner.overlap, halo=halo // 4 // 32 * 32)
        assert abs(upscaler.upscale(image, tile=96) - whole).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (33, 31), (5, 97)])
def test_the_perceptual_unet_takes_what_is_smaller_than_its_halo(perceptual: Path, size: tuple[int, int]) -> None:
    with Upscaler(perceptual, backend="onnxruntime") as upscaler:
        image = noise(*size)
        whole = upscaler.upscale(image)
        assert whole.shape == image.shape
        np.testing.assert_array_equal(upscaler.upscale(image, tile=1), whole)
