"""Pictures larger than memory: the same pixels as in memory, memory that stays flat, nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import Image, ImageCms

from sdk import (
    BackendError,
    BackendUnavailable,
    ImageError,
    OptionError,
    OutOfMemory,
    OutputError,
    SRError,
    Upscaler,
    files,
    large,
    opening,
)
from sdk.jobs import Options

pytest.importorskip("onnxruntime")
pyvips = pytest.importorskip("pyvips")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ARTIST, ORIENTATION, GPS, GPS_LATITUDE_REF, EXPOSURE, TAKEN = 0x013B, 0x0112, 0x8825, 1, 0x8769, 0x9003
MAKER_NOTE, INTEROPERABILITY = 0x927C, 0xA005
HEIGHT, WIDTH = 230, 171
INTERPRETATION = {1: "grey16", 2: "grey16", 3: "rgb16", 4: "rgb16"}


@pytest.fixture(autouse=True)
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give bands of a few rows, so that small pictures have many."""
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("SR_THREADS", "1")
    monkeypatch.setattr(large, "BAND_BYTES", 8 << 10)


@pytest.fixture(params=["identity", "unet"])
def either(request: pytest.FixtureRequest) -> Iterator[Upscaler]:
    with open_upscaler(request.param) as opened:
        yield opened


@pytest.fixture
def identity() -> Iterator[Upscaler]:
    with open_upscaler("identity") as opened:
        yield opened


def open_upscaler(kind: str) -> Upscaler:
    return Upscaler(bundles.shared(kind), backend="onnxruntime", device="cpu")


def photo(channels: int, dtype: type = np.uint8) -> np.ndarray:
    """Draw noise over soft light, without invisible pixels; (HEIGHT, WIDTH, channels)."""
    rng = np.random.default_rng(channels)
    soft = Image.fromarray(rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    image = np.asarray(soft)[:, :, [0, 3] if channels == 2 else slice(0, channels)] * 0.8
    image = image + rng.integers(20, 45, (HEIGHT, WIDTH, channels))
    return (
        image.astype(np.uint8) if dtype == np.uint8 else (image * 257 + rng.integers(0, 256, image.shape)).astype(dtype)
    )


def save(path: Path, image: np.ndarray, **options: object) -> Path:
    """Write any depth with libvips."""
    picture = pyvips.Image.new_from_array(image)
    if image.dtype == np.uint16:
        picture = picture.copy(interpretation=INTERPRETATION[image.shape[2]])
    picture.write_to_file(str(path), **options)
    return path


def exif(**tags: int) -> Image.Exif:
    block = Image.Exif()
    block[ARTIST] = "A. Painter"
    block.get_ifd(GPS)[GPS_LATITUDE_REF] = "N"
    block.get_ifd(EXPOSURE)[TAKEN] = "2024:01:02 03:04:05"
    for name, value in tags.items():
        block[globals()[name]] = value
    return block


def enlarge(opened: Upscaler, source: Path, target: Path, **options: object) -> None:
    large.enlarge(opened, source, target, Options(**({"tile": 40} | options)))


def check_same(opened: Upscaler, source: Path, target: Path) -> None:
    """Enlarge in bands and in memory; hold that both files have the same pixels."""
    enlarge(opened, source, target)
    image = files.read(source)[0]
    in_memory = target.with_name(f"memory{target.suffix}")
    files.write(in_memory, opened.upscale(image, tile=40), opening.Metadata(), quality=95, overwrite=True)
    expected, result = files.read(in_memory)[0], files.read(target)[0]
    assert result.dtype == expected.dtype == image.dtype
    np.testing.assert_array_equal(result, expected)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_same_pixels_as_in_memory(either: Upscaler, tmp_path: Path, channels: int, suffix: str) -> None:
    image = photo(channels)
    source = tmp_path / f"in{suffix}"
    Image.fromarray(image[:, :, 0] if channels == 1 else image).save(source)
    check_same(either, source, tmp_path / f"out{'.tif' if suffix == '.png' else '.png'}")
    if channels in (1, 3):
        check_same(either, source, tmp_path / "out.jpg")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_same_pixels_in_16_bits(either: Upscaler, tmp_path: Path, channels: int, suffix: str) -> None:
    if channels == 2 and suffix == ".tif":
        pytest.skip("Pillow does not open 16-bit grey with alpha, so that such a TIFF is not streamed")
    source = save(tmp_path / f"in{suffix}", photo(channels, np.uint16))
    for target in (".png", ".tif"):
        check_same(either, source, tmp_path / f"out{target}")


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_pixels_of_jpeg(
    identity: Upscaler, tmp_path: Path, channels: int, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    image = photo(channels)
    Image.fromarray(image[:, :, 0] if channels == 1 else image).save(tmp_path / "in.jpg", quality=90, **options)
    check_same(identity, tmp_path / "in.jpg", tmp_path / "out.png")
    assert ("decoded whole" in caplog.text) == ("progressive" in options)


@pytest.mark.parametrize(
    "name,options",
    [
        ("in.png", {"interlace": True}), ("in.tif", {"tile": True, "tile_width": 64, "tile_height": 64}),
        ("in.tif", {"compression": "deflate", "predictor": "horizontal", "bigtiff": True}),
        ("in.png", {"palette": True}), ("in.tif", {"compression": "jpeg"}), ("grey.png", {"bitdepth": 4}),
        ("grey.tif", {"miniswhite": True}), ("grey.tif", {"bitdepth": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_pixels_of_other_layouts(
    identity: Upscaler, tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    source = save(tmp_path / name, photo(1 if name.startswith("grey") else 3), **options)
    check_same(identity, source, tmp_path / "out.png")


def test_a_tiff_beyond_4_gib_is_a_bigtiff_with_exif(
    identity: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png", exif=exif(), icc_profile=SRGB)
    monkeypatch.setattr(large, "BIG_TIFF_BYTES", 0)
    enlarge(identity, tmp_path / "in.png", tmp_path / "big.tif")
    data = (tmp_path / "big.tif").read_bytes()
    assert data[:4] == b"II+\0"
    for tag in (GPS, EXPOSURE):  # the place of a table is a number of 64 bits, or those beyond 4 GiB are not found
        assert data.count(struct.pack("<HHQ", tag, 16, 1)) == 1
    enlarge(identity, tmp_path / "big.tif", tmp_path / "out.tif")  # and from one to the next
    for name, factor in (("big.tif", 2), ("out.tif", 4)):
        with Image.open(tmp_path / name) as result:
            tags = result.getexif()
            assert tags[ARTIST] == "A. Painter" and tags.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"
            assert tags.get_ifd(EXPOSURE)[TAKEN] == "2024:01:02 03:04:05"
            assert result.info["icc_profile"] == SRGB
            expected = photo(3).repeat(factor, axis=0).repeat(factor, axis=1)
            np.testing.assert_array_equal(np.asarray(result), expected)
        np.testing.assert_array_equal(pyvips.Image.new_from_file(str(tmp_path / name)).numpy(), expected)


@pytest.mark.parametrize("source_suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("target_suffix", [".png", ".jpg", ".tif"])
def test_metadata_is_kept(identity: Upscaler, tmp_path: Path, source_suffix: str, target_suffix: str) -> None:
    source, target = tmp_path / f"in{source_suffix}", tmp_path / f"out{target_suffix}"
    Image.fromarray(photo(3)).save(source, exif=exif(ORIENTATION=6).tobytes(), icc_profile=SRGB)
    enlarge(identity, source, target)
    with Image.open(target) as result:
        tags = result.getexif()
        assert result.size == (2 * HEIGHT, 2 * WIDTH) and result.info["icc_profile"] == SRGB
        assert tags.get(ORIENTATION, 1) == 1 and tags[ARTIST] == "A. Painter"
        assert tags.get_ifd(GPS)[GPS_LATITUDE_REF] == "N"
        assert tags.get_ifd(EXPOSURE)[TAKEN] == "2024:01:02 03:04:05"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("with_exif", [True, False])
def test_metadata_are_those_of_the_way_in_memory(
    identity: Upscaler, tmp_path: Path, suffix: str, with_exif: bool
) -> None:
    """Nothing is lost, of tables within tables too, and nothing added, like a resolution; no layout is passed on."""
    block = exif(ORIENTATION=3)
    block.get_ifd(EXPOSURE)[INTEROPERABILITY] = {1: "R98"}
    for tag, value in {273: 8, 278: 20, 279: 1200, 266: 2, 338: 2, 339: (3, 3, 3)}.items():
        block[tag] = value
    profile = SRGB + bytes(70_000)  # longer than a marker of JPEG
    source = tmp_path / "in.jpg"
    Image.fromarray(photo(3)).save(source, icc_profile=profile, **({"exif": block} if with_exif else {}))
    streamed, in_memory = tmp_path / f"out{suffix}", tmp_path / f"memory{suffix}"
    enlarge(identity, source, streamed)
    image, metadata = files.read(source)
    files.write(in_memory, identity.upscale(image, tile=40), metadata, quality=95, overwrite=True)
    found = []
    for path in (streamed, in_memory):
        with Image.open(path) as result:
            tags = result.getexif()
            plain = {tag: value for tag, value in tags.items() if tag not in opening.LAYOUT_TAGS | {GPS, EXPOSURE}}
            tables = [dict(tags.get_ifd(tag)) for tag in (GPS, EXPOSURE, INTEROPERABILITY)] if with_exif else []
            for table in tables:
                table.pop(INTEROPERABILITY, None)  # a place in the file
            kept = {key: result.info.get(key) for key in ("icc_profile", "dpi", "jfif_unit", "jfif_density", "gamma")}
            found.append((plain, tables, kept))
            assert np.asarray(result).shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert found[0] == found[1] and found[0][2]["icc_profile"] == profile
    if with_exif:
        assert found[0][1][2] == {1: "R98"} and found[0][0][ARTIST] == "A. Painter"
    else:
        assert found[0][0] == {}


def test_exif_too_long_for_jpeg_is_dropped_and_said(
    identity: Upscaler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = exif()
    block.get_ifd(EXPOSURE)[MAKER_NOTE] = bytes(70_000)
    Image.fromarray(photo(3)).save(tmp_path / "in.png", exif=block)
    enlarge(identity, tmp_path / "in.png", tmp_path / "out.jpg")
    assert files.read(tmp_path / "out.jpg")[1].exif is None and "out.jpg: the EXIF data are longer" in caplog.text


def test_a_gamma_of_png_that_is_lost_is_told(
    identity: Upscaler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    data, chunk = (tmp_path / "in.png").read_bytes(), b"gAMA" + struct.pack(">I", 100_000)
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "in.png").write_bytes(data[:33] + chunk + data[33:])
    check_same(identity, tmp_path / "in.png", tmp_path / "out.png")
    assert "in.png: its PNG gamma" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_the_application_is_told_when_the_file_is_there(
    identity: Upscaler, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its callback raises is not taken for an error of writing, and destroys nothing."""
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    told, target = [], tmp_path / f"out{suffix}"

    def on_picture(stats: object) -> None:
        told.append(files.read(target)[0].shape)
        raise KeyError("mine")

    monkeypatch.setattr(identity, "_on_picture", on_picture)
    with pytest.raises(KeyError, match="mine"):
        enlarge(identity, tmp_path / "in.png", target)
    assert told == [(2 * HEIGHT, 2 * WIDTH, 3)] and left(tmp_path) == ["in.png", target.name]


def test_libvips_keeps_no_rows(identity: Upscaler, tmp_path: Path) -> None:
    """Each operation that it remembers holds some MiB of a large picture."""
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    kept = pyvips.cache_get_max()
    enlarge(identity, tmp_path / "in.png", tmp_path / "out.png")
    assert pyvips.cache_get_size() == 0 and pyvips.cache_get_max() == kept > 0


@pytest.mark.parametrize(
    "suffix,orientation", [(suffix, n) for suffix in (".png", ".jpg", ".tif") for n in range(1, 9)] + [(".png", 9)]
)
def test_orientation_is_applied(identity: Upscaler, tmp_path: Path, orientation: int, suffix: str) -> None:
    source = tmp_path / f"in{suffix}"
    Image.fromarray(photo(3)).save(source, exif=exif(ORIENTATION=orientation).tobytes())
    check_same(identity, source, tmp_path / "out.png")


@pytest.mark.parametrize(
    "kind,value,orientation",
    [(3, struct.pack("<HH", 0, 0), 1), (3, struct.pack("<HH", 9, 0), 1), (11, struct.pack("<f", 6), 6)],
)
def test_odd_orientations_are_applied_as_in_memory(
    identity: Upscaler, tmp_path: Path, kind: int, value: bytes, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.tif", tmp_path / "out.png"
    Image.fromarray(photo(3)).save(source, tiffinfo={ORIENTATION: 2})
    data, entry = source.read_bytes(), struct.pack("<HHIHH", ORIENTATION, 3, 1, 2, 0)
    assert data.count(entry) == 1
    source.write_bytes(data.replace(entry, struct.pack("<HHI", ORIENTATION, kind, 1) + value))
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    identity.upscale_file(source, target)
    expected = opening.turn(photo(3).repeat(2, axis=0).repeat(2, axis=1), orientation)
    np.testing.assert_array_equal(files.read(target)[0], expected)


def test_exif_behind_the_pixels_of_a_png(identity: Upscaler, tmp_path: Path) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    block = exif(ORIENTATION=8).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "in.png").write_bytes(data[:-12] + chunk + data[-12:])
    check_same(identity, tmp_path / "in.png", tmp_path / "out.png")
    assert files.read(tmp_path / "out.png")[0].shape == (2 * WIDTH, 2 * HEIGHT, 3)


def test_a_profile_of_another_colour_space_is_dropped(
    identity: Upscaler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(photo(1)[:, :, 0]).save(tmp_path / "in.jpg", icc_profile=SRGB)
    enlarge(identity, tmp_path / "in.jpg", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as result:
        assert "icc_profile" not in result.info
    assert "dropped" in caplog.text


def test_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.png"
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    assert not large.is_large(tmp_path / "in.png", target, scale=2)
    monkeypatch.setattr(large, "LARGE_BYTES", HEIGHT * WIDTH * 3 * 4 - 1)
    assert large.is_large(tmp_path / "in.png", target, scale=2)
    assert not large.is_large(tmp_path / "in.png", target, scale=1)
    assert not large.is_large(tmp_path / "in.png", tmp_path / "out.webp", scale=2)
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(photo(3)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(photo(3)).save(tmp_path / "in.bmp")
    frames = [Image.fromarray(photo(3)), Image.fromarray(photo(3)[::-1])]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for name in ("text.png", "cmyk.jpg", "in.bmp", "moving.png", "missing.png"):
        assert not large.is_large(tmp_path / name, target, scale=2), name
        with pytest.raises(ImageError, match=name):
            large.enlarge(None, tmp_path / name, target, Options())  # type: ignore[arg-type]
    assert not target.exists()


def test_options_that_large_pictures_lack(identity: Upscaler, tmp_path: Path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.jpg"
    Image.fromarray(photo(3)).save(source)
    for options in ({"factor": 3}, {"size": (100, None)}, {"subsampling": "4:2:2"}, {"quality": 0}, {"factor": -1}):
        with pytest.raises(OptionError):
            enlarge(identity, source, target, **options)
    with pytest.raises(ImageError, match="too large"):
        enlarge(identity, source, target, max_pixels=1000)
    with pytest.raises(OutputError, match="WEBP cannot be written in bands"):
        enlarge(identity, source, tmp_path / "out.webp")
    assert left(tmp_path) == ["in.png"]
    enlarge(identity, source, target, factor=2.0)
    enlarge(identity, source, target, size=(2 * HEIGHT, None), subsampling="4:2:0", overwrite=True)
    with Image.open(target) as result:
        assert result.layer[0][1:3] == (2, 2)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_damaged_source_leaves_nothing(
    identity: Upscaler, tmp_path: Path, suffix: str, orientation: int, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / f"in{suffix}"
    Image.fromarray(photo(3)).save(source, exif=exif(ORIENTATION=orientation).tobytes())
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ImageError, match=f"in{suffix}: damaged picture"):
        enlarge(identity, source, tmp_path / "out.png")
    assert left(tmp_path) == [f"in{suffix}"]
    assert capfd.readouterr() == ("", "")


SHRINK = """
import os, sys
from pathlib import Path
from sdk import ImageError, Upscaler, large
from sdk.jobs import Options

source, model = map(Path, sys.argv[1:])
turn = large._turn

def shrinking(bands, *arguments):
    def shortened():
        yield next(bands)
        os.truncate(source, 100)
        yield from bands
    return turn(shortened(), *arguments)

large._turn = shrinking
with Upscaler(model, backend="onnxruntime") as upscaler:
    try:
        large.enlarge(upscaler, source, source.with_name("out.png"), Options())
    except ImageError as error:
        print(error)
"""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_source_that_shrinks_while_it_is_read_is_told(tmp_path: Path, suffix: str) -> None:
    """In a process of its own: a file that is mapped into memory would end it."""
    source = tmp_path / f"in{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source)
    code = [sys.executable, "-c", SHRINK, str(source), str(bundles.shared("identity"))]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0 and f"in{suffix}: damaged picture" in done.stdout, done
    assert left(tmp_path) == [source.name]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_what_reading_raises_is_told(
    identity: Upscaler, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(io.BytesIO):
        def read(self, count: int | None = None) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    source = tmp_path / f"in{suffix}"
    Image.fromarray(photo(3)).save(source)
    header = large.read_header(source, max_pixels=None)
    monkeypatch.setattr(large, "read_header", lambda *_, **__: header)
    monkeypatch.setattr(opening, "open_source", lambda _: Broken(source.read_bytes()))
    with pytest.raises(ImageError, match=f"in{suffix}: cannot be read .Input/output error"):
        enlarge(identity, source, tmp_path / "out.png")
    assert left(tmp_path) == [source.name] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_full_disk_leaves_nothing(
    identity: Upscaler, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    save_in_thread = large._save

    class FullDisk:
        def __init__(self, stream: object):
            self.stream = stream
            self.room = 50_000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.stream, name)

    def full(pyvips: object, encoded: int, stream: object, *arguments: object) -> None:
        save_in_thread(pyvips, encoded, FullDisk(stream), *arguments)

    monkeypatch.setattr(large, "_save", full)
    with pytest.raises(OutputError, match="No space left"):
        enlarge(identity, tmp_path / "in.png", tmp_path / f"out{suffix}")
    assert left(tmp_path) == ["in.png"]


def failing(error: BaseException) -> Callable[..., np.ndarray]:
    """Give a backend's `run` that fails from the third window on."""
    calls = []

    def run(batch: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) >= 3:
            raise error
        return batch.repeat(2, axis=1).repeat(2, axis=2)

    return run


@pytest.mark.parametrize(
    "error", [BackendError("broken"), OutOfMemory("no memory"), KeyboardInterrupt(), ZeroDivisionError()], ids=repr
)
def test_a_failure_while_computing_is_told_as_it_is(
    identity: Upscaler, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    before = threading.active_count()
    for target in ("out.png", "out.tif", "out.jpg"):
        monkeypatch.setattr(identity._runner.backends["uint8"], "run", failing(error))
        with pytest.raises(type(error)) as caught:
            enlarge(identity, tmp_path / "in.png", tmp_path / target)
        assert caught.value is error
    assert left(tmp_path) == ["in.png"]
    assert threading.active_count() == before


def test_destinations_that_are_refused(identity: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.png"
    Image.fromarray(photo(4)).save(source)
    (tmp_path / "old.png").write_bytes(b"old")
    monkeypatch.setattr(identity, "upscale_bands_metered", lambda *_, **__: pytest.fail("worked before it was refused"))
    for target, message in (("old.png", "exists"), ("no/out.png", "folder"), ("out.jpg", "alpha"), ("a.xyz", "format")):
        with pytest.raises(OutputError, match=message):
            enlarge(identity, source, tmp_path / target)
    monkeypatch.setitem(files.MAX_SIDE, "PNG", 2 * HEIGHT - 1)
    with pytest.raises(OutputError, match="at most"):
        enlarge(identity, source, tmp_path / "out.png")
    assert left(tmp_path) == ["in.png", "old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


def test_a_file_that_appears_meanwhile_stays(
    identity: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    save_in_thread = large._save

    def slow(*arguments: object) -> None:
        save_in_thread(*arguments)
        (tmp_path / "out.png").write_bytes(b"theirs")

    monkeypatch.setattr(large, "_save", slow)
    with pytest.raises(OutputError, match="exists"):
        enlarge(identity, tmp_path / "in.png", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == b"theirs" and left(tmp_path) == ["in.png", "out.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(identity: Upscaler, tmp_path: Path) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission"):
        enlarge(identity, tmp_path / "in.png", tmp_path / "locked" / "out.png")


def test_without_pyvips_the_extra_is_named(identity: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(BackendUnavailable, match=r"sr-sdk\[large\]"):
        enlarge(identity, tmp_path / "in.png", tmp_path / "out.png")
    assert left(tmp_path) == ["in.png"]


def test_no_file_stays_open(identity: Upscaler, tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")
    Image.fromarray(photo(3)).save(tmp_path / "in.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "in.png").read_bytes()[:-2000])
    before = None
    for _ in range(4):
        enlarge(identity, tmp_path / "in.png", tmp_path / "out.tif", overwrite=True)
        with pytest.raises(SRError):
            enlarge(identity, tmp_path / "bad.png", tmp_path / "out.tif", overwrite=True)
        names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        open_pipes = sum("pipe:" in name for name in names)
        assert before in (None, open_pipes)
        before = open_pipes


PEAK = """
import resource, sys
from pathlib import Path
from sdk import Upscaler, large
from sdk.jobs import Options

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, model = map(Path, sys.argv[1:])
with Upscaler(model, backend="onnxruntime") as upscaler:
    for name in ("small", "small", "in"):
        before = peak_mib()
        large.enlarge(upscaler, folder / f"{name}.jpg", folder / "out.jpg", Options(tile=256, overwrite=True))
print(peak_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """Go from 5000 x 600 to 5000 x 5000 pixels, 72 MiB decoded and 286 MiB enlarged, and turned on the way."""
    tile = pyvips.Image.new_from_array(photo(3))
    for name, width in (("in", 5000), ("small", 600)):
        picture = tile.replicate(-(-width // WIDTH), -(-5000 // HEIGHT)).crop(0, 0, width, 5000).copy()
        picture.set_type(pyvips.GValue.gint_type, "orientation", 6)
        picture.write_to_file(str(tmp_path / f"{name}.jpg"))
    code = [sys.executable, "-c", PEAK, str(tmp_path), str(bundles.shared("identity"))]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else each new thread takes some MiB from the system
    done = subprocess.run(code, check=True, capture_output=True, text=True, env=environment)
    result = pyvips.Image.new_from_file(str(tmp_path / "out.jpg"))
    assert (result.width, result.height) == (10000, 10000)
    assert float(done.stdout) < 60, done.stdout  # what allocators leave unused; up to 40 was seen


def test_the_pages_of_a_tiff_are_not_counted(tmp_path, monkeypatch):
    """Pillow takes the square of their number for it: a small file of many pages would hold a server up for ever."""
    from PIL import TiffImagePlugin

    def count(self: object) -> int:
        raise AssertionError("counted")

    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(tmp_path / "in.tif", save_all=True, append_images=[image] * 3)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(count))
    header = large.read_header(tmp_path / "in.tif", max_pixels=None)
    assert header.notes == ("several pages, only the first is read",)


def test_a_picture_beyond_the_limit_is_not_opened_to_see_whether_it_is_large(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(large, "read_header", lambda path, *, max_pixels: seen.append(max_pixels))
    with pytest.raises(AttributeError):  # of None, which stands for a header here
        large.is_large(tmp_path / "in.ico", tmp_path / "out.png", scale=2, max_pixels=10)
    assert seen == [10]
