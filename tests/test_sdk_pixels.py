"""Colour, alpha, depth: what goes in comes back in the same form."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import ImageError, Upscaler, pixels

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def identity():
    """An Upscaler that repeats pixels, so that every value can be followed."""
    with Upscaler(bundles.shared("identity"), backend="onnxruntime") as upscaler:
        yield upscaler


@pytest.fixture(scope="module")
def blur():
    with Upscaler(bundles.shared("blur"), backend="onnxruntime") as upscaler:
        yield upscaler


def doubled(image: np.ndarray) -> np.ndarray:
    return image.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_form_comes_back_as_it_was(identity: Upscaler, shape: tuple[int, ...], dtype: type) -> None:
    rng = np.random.default_rng(0)
    image = rng.random(shape, np.float32) if dtype == np.float32 else rng.integers(1, np.iinfo(dtype).max, shape, dtype)
    result = identity.upscale(image)
    assert result.dtype == image.dtype and result.shape == doubled(image).shape
    # float32 carries 24 bits: 16-bit values come back exactly, floats up to the mean of three equal channels.
    np.testing.assert_allclose(result, doubled(image), rtol=3e-7, atol=0)


def test_16_bit_ramp_keeps_its_levels(identity: Upscaler) -> None:
    ramp = np.linspace(0, 65535, 64 * 128).astype(np.uint16).reshape(64, 128)
    result = identity.upscale(ramp)
    assert len(np.unique(result)) >= 4096
    np.testing.assert_array_equal(result, doubled(ramp))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_opaque_alpha_stays_opaque_and_costs_nothing(blur: Upscaler, dtype: type) -> None:
    opaque = 1 if dtype == np.float32 else np.iinfo(dtype).max
    image = np.full((9, 9, 4), opaque, dtype)
    image[:, :, :3] = opaque // 2
    before = blur.stats.tiles
    result = blur.upscale(image)
    assert blur.stats.tiles - before == 1
    assert (result[:, :, 3] == opaque).all()  # the blur's zero padding would darken the border
    np.testing.assert_array_equal(result[:, :, :3], blur.upscale(np.ascontiguousarray(image[:, :, :3])))


def test_varying_alpha_goes_through_the_network(blur: Upscaler) -> None:
    image = np.full((9, 9, 4), 200, np.uint8)
    image[:, :, 3] = 0
    image[3:6, 3:6, 3] = 255
    before = blur.stats.tiles
    alpha = blur.upscale(image)[:, :, 3]
    assert blur.stats.tiles - before == 2
    assert alpha[0, 0] == 0 and alpha[8, 8] == 255 and 0 < alpha[5, 8] < 255


@pytest.mark.parametrize("channels", [2, 4])
def test_fully_transparent_pictures_stay_so(blur: Upscaler, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 6, channels), dtype=np.uint8)
    image[:, :, -1] = 0
    result = blur.upscale(image)
    assert result.shape == (12, 12, channels) and (result[:, :, -1] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_hidden_colour_makes_no_fringe(blur: Upscaler, dtype: type) -> None:
    """Black under transparent pixels must not darken the visible ones beside it."""
    opaque = 255 if dtype == np.uint8 else 1
    image = np.zeros((40, 41, 4), dtype)
    image[12:28, 11:30] = opaque
    result = blur.upscale(image)
    visible = result[:, :, 3] > 0
    inside = np.zeros_like(visible)
    inside[4:-4, 4:-4] = True
    assert (result[visible & inside][:, :3] >= opaque * 0.999).all()


@pytest.mark.parametrize("kind", ["identity", "blur"])
def test_a_constant_colour_is_kept(kind: str) -> None:
    with Upscaler(bundles.shared(kind), backend="onnxruntime") as upscaler:
        for colour in ((0, 0, 0), (255, 255, 255), (1, 128, 254), (17, 90, 201)):
            result = upscaler.upscale(np.full((24, 24, 3), colour, np.uint8))
            np.testing.assert_array_equal(np.unique(result[4:-4, 4:-4].reshape(-1, 3), axis=0), [colour])


def test_inputs_are_not_modified_and_results_are_new(identity: Upscaler) -> None:
    rng = np.random.default_rng(3)
    for dtype in (np.uint8, np.float32):
        for channels in (1, 2, 3, 4):
            image = (rng.random((6, 8, channels)) * (1 if dtype == np.float32 else 255)).astype(dtype)
            before = image.copy()
            image.flags.writeable = False
            result = identity.upscale(image)
            np.testing.assert_array_equal(image, before)
            assert not np.shares_memory(result, image) and result.flags.writeable


def test_strided_reversed_and_column_major_arrays(identity: Upscaler) -> None:
    base = np.random.default_rng(4).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    for view in (base[::2, ::3, :3], base[::-1, ::-1, 2::-1], np.asfortranarray(base[:, :, :3]), base[:, :, 1]):
        np.testing.assert_array_equal(identity.upscale(view), doubled(view))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float64),
        np.zeros((4, 4, 3), np.int32),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4, 3), ">f4"),
        np.zeros((4, 4, 3), object),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 0), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((), np.uint8),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), -np.inf, np.float32),
        np.full((4, 4, 3), 255, np.float32),
        np.full((4, 4, 3), -1, np.float32),
        np.zeros((4, 4), np.uint8).view(np.matrix),
        np.ma.masked_equal(np.zeros((4, 4), np.uint8), 0),
        [[1, 2], [3, 4]],
        None,
        "photo.png",
        b"bytes",
    ],
    ids=lambda image: f"{getattr(image, 'dtype', type(image).__name__)}-{getattr(image, 'shape', '')}",
)
def test_what_is_no_picture_is_refused(identity: Upscaler, image: object) -> None:
    with pytest.raises(ImageError) as caught:
        identity.upscale(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "info"),
    [("P", {"transparency": "abc"}), ("P", {"transparency": 999}), ("CMYK", {"icc_profile": 5})],
    ids=["transparency", "no-entry", "profile"],
)
def test_metadata_that_a_program_set_wrongly(identity: Upscaler, mode: str, info: dict[str, object]) -> None:
    image = Image.new(mode, (4, 4))
    image.info.update(info)
    with pytest.raises(ImageError, match="metadata"):
        identity.upscale(image)


def test_a_little_overshoot_is_clipped(identity: Upscaler) -> None:
    image = np.array([[-0.02, 1.02]], np.float32)
    np.testing.assert_allclose(identity.upscale(image), doubled(np.array([[0, 1]], np.float32)))


def pil_picture(mode: str) -> Image.Image:
    rng = np.random.default_rng(5)
    if mode in ("I;16", "F"):
        values = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
        return Image.fromarray(values if mode == "I;16" else (values / 65535).astype(np.float32))
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize(
    "mode,expected",
    [
        ("L", "L"), ("LA", "LA"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("I;16", "I;16"), ("F", "F"), ("P", "RGB"),
        ("1", "L"), ("CMYK", "RGB"), ("YCbCr", "RGB"), ("HSV", "RGB"), ("LAB", "RGB"), ("PA", "RGBA"), ("RGBX", "RGB"),
    ],
)  # fmt: skip
def test_pil_pictures_come_back_as_pil(identity: Upscaler, mode: str, expected: str) -> None:
    picture = pil_picture("L").convert("PA") if mode == "PA" else pil_picture(mode)
    before = picture.tobytes()
    result = identity.upscale(picture)
    assert isinstance(result, Image.Image) and result.mode == expected and result.size == (14, 10)
    assert picture.tobytes() == before and picture.mode == mode
    if mode == expected:
        np.testing.assert_allclose(np.asarray(result), doubled(np.asarray(picture)), rtol=3e-7)


def test_pil_palette_with_transparency_becomes_rgba(identity: Upscaler) -> None:
    picture = pil_picture("P")
    picture.info["transparency"] = 0
    assert identity.upscale(picture).mode == "RGBA"
    grey = pil_picture("L")
    grey.info["transparency"] = 3
    assert identity.upscale(grey).mode == "RGBA"


@pytest.mark.parametrize("mode", ["I", "RGBa", "La"])
def test_other_pil_modes_are_refused(identity: Upscaler, mode: str) -> None:
    with pytest.raises(ImageError, match="mode"):
        identity.upscale(Image.new(mode, (4, 4)))


def test_empty_pil_pictures_are_refused(identity: Upscaler) -> None:
    with pytest.raises(ImageError):
        identity.upscale(Image.new("RGB", (0, 5)))


def test_a_truncated_pil_file_is_refused(identity: Upscaler, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as picture, pytest.raises(ImageError):
        identity.upscale(picture)


@pytest.mark.parametrize("error", [OSError("cut"), SyntaxError("a"), RuntimeError(), ValueError("b\nc"), MemoryError()])
def test_whatever_a_damaged_pil_file_raises_is_told(
    identity: Upscaler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    picture = Image.new("RGB", (4, 4))
    monkeypatch.setattr(picture, "load", fail)
    with pytest.raises(ImageError, match=r"^the picture: ") as caught:
        identity.upscale(picture)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_a_transparent_value_is_never_lost(identity: Upscaler) -> None:
    picture = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for value, alpha in ((0, (0, 255)), (1, (255, 0)), (255, (255, 0))):  # before Pillow 10.4, white is 1
        picture.info["transparency"] = value
        assert pixels.from_pil(picture)[0, :, 3].tolist() == list(alpha)
    deep = Image.fromarray(np.full((4, 4), 7, np.uint16))
    deep.info["transparency"] = 7
    with pytest.raises(ImageError, match="no 16 bits of grey with alpha"):
        identity.upscale(deep)


def test_pil_pictures_keep_profile_and_exif(identity: Upscaler) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = pil_picture("RGB")
    picture.info |= {"icc_profile": profile, "exif": b"Exif\0\0", "transparency": (1, 2, 3)}
    result = identity.upscale(picture)
    assert result.info == {"icc_profile": profile, "exif": b"Exif\0\0"}
    grey = pil_picture("L")
    grey.info["icc_profile"] = profile  # of another colour space than the picture
    assert "icc_profile" not in identity.upscale(grey).info


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_palette_holds_few_colours_exactly(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "BAND_PIXELS", 100)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (255, channels), dtype=np.uint8)
    image = colours[rng.integers(0, 255, (40, 30))]
    if channels in (2, 4):
        image[:, :, -1] = 255
        image[3:5, 3:9, -1] = 0
    picture, transparent = pixels.to_palette(image)
    shown = np.asarray(picture.convert("RGB"))
    hidden = np.zeros((40, 30), bool)
    if channels in (2, 4):
        hidden[3:5, 3:9] = True
        np.testing.assert_array_equal(np.asarray(picture) == transparent, hidden)
    else:
        assert transparent is None
    expected = np.broadcast_to(image[:, :, : 1 if channels < 3 else 3], (40, 30, 3))
    np.testing.assert_array_equal(shown[~hidden], expected[~hidden])


def test_a_palette_of_two_colours_takes_little_memory() -> None:
    image = np.zeros((2000, 2000, 3), np.uint8)
    image[::2] = 255
    tracemalloc.start()
    pixels.to_palette(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * image.nbytes, peak / image.nbytes
