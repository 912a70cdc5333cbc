"""Animations: every frame as it is seen, its time, the loops, whole or not at all."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageCms

from sdk import BackendError, ImageError, OutputError, Upscaler, animation, files, opening, pixels, png
from sdk.animation import Animation, Frame

pytest.importorskip("onnxruntime")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
AVIF = pytest.param(".avif", marks=pytest.mark.skipif(not opening.has_avif(), reason="Pillow was built without AVIF"))
KINDS = [".gif", ".webp", ".png", ".apng", AVIF]
TIMES = [40.0, 100.0, 70.0, 30.0, 250.0, 90.0]
COUNT = len(TIMES)


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def moving(*, transparent: bool) -> list[Frame]:
    """Draw a square that moves and changes colour, above a bar that stays, on nothing or on a plain ground."""
    frames = []
    for index, milliseconds in enumerate(TIMES):
        image = np.zeros((40, 50, 4), np.uint8)
        if not transparent:
            image[...] = 20, 30, 40, 255
        image[5 + index : 15 + index, 4 + 5 * index : 14 + 5 * index] = 255, 40 * index, 0, 255
        image[25:30, 10:40] = 0, 200, 50, 255
        frames.append(Frame(image, milliseconds))
    return frames


def like(*, size: tuple[int, int] = (40, 50), count: int = COUNT, plays: int = 0, **metadata: bytes) -> Animation:
    return Animation(Path("source"), size, count, plays, files.Metadata(**metadata), "GIF")


def save(path: Path, frames: list[Frame], **facts: object) -> Path:
    source = like(size=frames[0].image.shape[:2], count=len(frames), **facts)
    animation.write(path, iter(frames), like=source, overwrite=True, quality=95, lossless=path.suffix == ".webp")
    return path


def opened(path: Path) -> Animation:
    found = animation.read(path)
    assert found is not None
    return found


def assert_same(result: np.ndarray, expected: np.ndarray, *, error: int = 0) -> None:
    """Compare alpha, and colour where it is seen."""
    np.testing.assert_array_equal(result[..., 3], expected[..., 3])
    seen = expected[..., 3] > 0
    assert abs(result[seen].astype(int) - expected[seen]).max(initial=0) <= error


@pytest.mark.parametrize("transparent", [True, False])
@pytest.mark.parametrize("suffix", KINDS)
def test_frames_times_and_loops_come_back(tmp_path: Path, suffix: str, transparent: bool) -> None:
    frames = moving(transparent=transparent)
    for plays in (0, 1, 3):
        found = opened(save(tmp_path / f"a{suffix}", frames, plays=plays))
        assert (found.size, found.count) == ((40, 50), COUNT)
        assert found.plays == (0 if suffix == ".avif" else plays)  # AVIF has no loops in Pillow
    results = list(found.frames())
    assert [frame.milliseconds for frame in results] == TIMES
    for result, frame in zip(results, frames, strict=True):
        assert_same(result.image, frame.image, error=4 if suffix == ".avif" else 0)


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_an_independent_decoder_agrees(tmp_path: Path, suffix: str) -> None:
    av = pytest.importorskip("av", reason="FFmpeg is the independent decoder")
    for transparent in (True, False):
        frames = moving(transparent=transparent)
        with av.open(str(save(tmp_path / f"a{suffix}", frames))) as container:
            results = [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
        for result, frame in zip(results, frames, strict=True):
            assert_same(result, frame.image)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_is_enlarged_frame_by_frame(tmp_path: Path, suffix: str) -> None:
    frames = moving(transparent=True)
    source = opened(save(tmp_path / "in.gif", frames, plays=2))
    target = tmp_path / f"out{suffix}"
    with Upscaler(bundles.shared("identity"), backend="onnxruntime") as upscaler:
        larger = (replace(frame, image=upscaler.upscale(frame.image)) for frame in source.frames())
        animation.write(target, larger, like=source, overwrite=False, quality=95, lossless=suffix == ".webp")
    found = opened(target)
    assert found.size == (80, 100) and found.plays == 2
    for result, frame, milliseconds in zip(found.frames(), frames, TIMES, strict=True):
        assert_same(result.image, frame.image.repeat(2, axis=0).repeat(2, axis=1))
        assert result.milliseconds == milliseconds


def random_parts(seed: int, *, full_first: bool) -> list[tuple[np.ndarray, int, int]]:
    """Draw (image, top, left) of small parts of a 12 x 14 canvas, with holes."""
    rng = np.random.default_rng(seed)
    parts = []
    for index in range(6):
        top, left, height, width = (int(value) for value in (*rng.integers(0, 6, 2), *rng.integers(1, 6, 2)))
        if index == 0 and full_first:
            top, left, height, width = 0, 0, 12, 14
        image = np.full((height, width, 4), 255, np.uint8)
        image[..., :3] = rng.integers(0, 4, (height, width, 3)) * 80
        if seed % 2:
            image[rng.random((height, width)) < 0.3] = 0
        parts.append((image, top, left))
    return parts


def compose(parts: list[tuple[np.ndarray, int, int]], disposals: list[int], overs: list[bool]) -> list[np.ndarray]:
    """Compose as the specifications of GIF and APNG say. disposals: 0, 1 keep, 2 clear, 3 restore."""
    canvas, results = np.zeros((12, 14, 4), np.uint8), []
    for (image, top, left), disposal, over in zip(parts, disposals, overs, strict=True):
        before = canvas.copy()
        place = canvas[top : top + image.shape[0], left : left + image.shape[1]]
        drawn = image[..., 3] > 0 if over else np.ones(image.shape[:2], bool)
        place[drawn] = image[drawn]
        results.append(canvas.copy())
        if disposal == 2:
            place[:] = 0
        elif disposal == 3:
            canvas = before
    return results


@pytest.mark.parametrize("seed", range(12))
def test_parts_of_gif_are_composed_as_specified(tmp_path: Path, seed: int) -> None:
    parts = random_parts(seed, full_first=seed % 3 > 0)
    disposals = [int(value) for value in np.random.default_rng(seed).integers(0, 4, len(parts))]
    stream = io.BytesIO()
    canvas = Image.new("P", (14, 12))
    canvas.putpalette(bytes(range(6)))
    stream.write(b"".join(GifImagePlugin.getheader(canvas, info={"loop": 4, "duration": 1})[0]))
    for (image, top, left), disposal in zip(parts, disposals, strict=True):
        picture, transparent = pixels.to_palette(image)
        options = {} if transparent is None else {"transparency": transparent}
        options |= {"duration": 50, "disposal": disposal, "include_color_table": True}
        stream.write(b"".join(GifImagePlugin.getdata(picture, (left, top), **options)))
    path = tmp_path / "a.gif"
    path.write_bytes(stream.getvalue() + b";")
    found = opened(path)
    assert found.plays == 5  # four more after the first
    for result, expected in zip(found.frames(), compose(parts, disposals, [True] * 6), strict=True):
        assert_same(result.image, expected)


def chunk(kind: bytes, data: bytes) -> bytes:
    stream = io.BytesIO()
    png.write_chunk(stream, kind, data)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(12))
def test_parts_of_apng_are_composed_as_specified(tmp_path: Path, seed: int) -> None:
    parts = random_parts(seed, full_first=True)
    rng = np.random.default_rng(seed)
    disposals, overs = [int(value) for value in rng.integers(1, 4, 6)], [bool(value) for value in rng.integers(0, 2, 6)]
    data = png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 14, 12, 8, 6, 0, 0, 0))
    data += chunk(b"acTL", struct.pack(">II", 6, 2))
    separate = seed % 4 == 3  # a still picture for viewers that do not animate stands before
    if separate:
        data += chunk(b"IDAT", zlib.compress((b"\0" + b"\x7f" * 56) * 12))
    sequence = 0
    for index, (image, top, left) in enumerate(parts):
        height, width = image.shape[:2]
        place = (width, height, left, top, index + 1, 30, disposals[index] - 1, overs[index])
        data += chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, *place))
        sequence += 1
        raw = zlib.compress(b"".join(b"\0" + row.tobytes() for row in image))
        if index == 0 and not separate:
            data += chunk(b"IDAT", raw)
        else:
            data += chunk(b"fdAT", struct.pack(">I", sequence) + raw)
            sequence += 1
    path = tmp_path / "a.png"
    path.write_bytes(data + chunk(b"IEND", b""))
    found = opened(path)
    assert found.count == 6 and found.plays == 2
    for index, (result, expected) in enumerate(zip(found.frames(), compose(parts, disposals, overs), strict=True)):
        assert_same(result.image, expected)
        assert result.milliseconds == pytest.approx(1000 * (index + 1) / 30)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", AVIF])
def test_still_pictures_are_no_animations(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}")
    assert animation.read(tmp_path / f"a{suffix}") is None


def test_pages_and_previews_are_no_animations(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert animation.read(tmp_path / "a.tif") is None and animation.read(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("name", ["missing.gif", "text.gif", "folder.gif", "null\0.gif"])
def test_what_is_no_picture_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.gif").write_text("not a picture")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ImageError) as caught:
        animation.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_profile_and_exif_are_kept_and_orientation_is_applied(tmp_path: Path) -> None:
    block = Image.Exif()
    block[opening.ORIENTATION], block[0x013B] = 6, "A. Painter"
    frames = moving(transparent=True)
    for suffix in (".png", ".webp"):
        path = save(tmp_path / f"in{suffix}", frames, icc_profile=SRGB, exif=block.tobytes())
        found = opened(path)
        assert found.size == (50, 40) and found.metadata.icc_profile == SRGB
        for result, frame in zip(found.frames(), frames, strict=True):
            assert_same(result.image, np.rot90(frame.image, -1))
        tags = Image.Exif()
        tags.load(found.metadata.exif)
        assert dict(tags) == {0x013B: "A. Painter"}


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".bmp"])
def test_formats_without_frames_are_refused_before_the_work(tmp_path: Path, suffix: str) -> None:
    def frames() -> Iterator[Frame]:
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(OutputError, match="write GIF, WebP, PNG"):
        animation.write(tmp_path / f"a{suffix}", frames(), like=like(), overwrite=False, quality=95)
    with pytest.raises(OutputError, match="at most 16383"):
        animation.check_output(tmp_path / "a.webp", (5000, 10), overwrite=False, scale=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", KINDS)
def test_the_number_of_frames_is_asserted(tmp_path: Path, suffix: str) -> None:
    frames = moving(transparent=True)
    for given in ([], frames[:1], frames[:-1], [*frames, frames[0]]):
        with pytest.raises(OutputError, match="6"):
            animation.write(tmp_path / f"a{suffix}", iter(given), like=like(), overwrite=False, quality=95)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [BackendError("the engine failed"), ZeroDivisionError("a mistake")], ids=repr)
@pytest.mark.parametrize("suffix", KINDS)
def test_a_failed_frame_leaves_nothing(tmp_path: Path, suffix: str, error: Exception) -> None:
    def failing() -> Iterator[Frame]:
        yield from moving(transparent=True)[:3]
        raise error

    with pytest.raises(type(error)) as caught:
        animation.write(tmp_path / f"a{suffix}", failing(), like=like(), overwrite=False, quality=95)
    assert caught.value is error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", KINDS)
def test_what_an_encoder_raises_is_told(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("of Pillow")

    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setattr(GifImagePlugin, "getdata", fail)
    with pytest.raises(OutputError, match=r"cannot be written \('of Pillow'\)"):
        save(tmp_path / f"a{suffix}", moving(transparent=True))
    assert list(tmp_path.iterdir()) == []


def test_a_gif_gets_srgb(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips", reason="its Display P3 profile is taken")
    frames = moving(transparent=False)
    profile = pyvips.Operation.call("profile_load", "p3")
    convert = pixels.srgb_converter(profile, name="a.gif")
    found = opened(save(tmp_path / "a.gif", frames, icc_profile=profile))
    for result, frame in zip(found.frames(), frames, strict=True):
        np.testing.assert_array_equal(result.image, convert(frame.image))
        assert (result.image != frame.image).any()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", AVIF])
def test_truncated_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    frames = [Frame(rng.integers(0, 256, (32, 32, 4), dtype=np.uint8) | np.uint8(128), 50) for _ in range(5)]
    path = save(tmp_path / f"a{suffix}", frames)
    data = path.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError):
            found = animation.read(path)
            assert found is not None
            list(found.frames())


def test_a_gif_that_ends_before_an_announced_frame_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gif", moving(transparent=False))
    data, control = path.read_bytes()[:-1], b"!\xf9\x04\x04\x05\0\0\0"
    for end in (b"", b";", control + b";"):  # some files lack the end
        path.write_bytes(data + end)
        assert len(list(opened(path).frames())) == COUNT
    path.write_bytes(data + control)
    with pytest.raises(ImageError, match="before a frame that was announced"):
        animation.read(path)


def apng(*frames: tuple[int, int, int], count: int, delay: tuple[int, int] = (1, 10)) -> bytes:
    """Encode 8 x 8 grey by hand: sequence numbers of control and data (the first is in IDAT), rows of data."""
    data = png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    data += chunk(b"acTL", struct.pack(">II", count, 0))
    for index, (control, number, rows) in enumerate(frames):
        raw = zlib.compress((b"\0" + bytes([50 * index] * 8)) * rows)
        data += chunk(b"fcTL", struct.pack(">IIIIIHHBB", control, 8, 8, 0, 0, *delay, 0, 0))
        data += chunk(b"fdAT", struct.pack(">I", number) + raw) if index else chunk(b"IDAT", raw)
    return data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "frames,words",
    [
        (((0, 0, 8), (3, 4, 8), (1, 2, 8)), "in another order"),
        (((0, 0, 8), (1, 2, 8), (1, 2, 8)), "in another order"),
        (((0, 0, 8), (1, 3, 8), (4, 5, 8)), "in another order"),
        (((0, 0, 8), (1, 2, 5), (3, 4, 8)), "missing; the file is damaged"),
        (((0, 0, 8), (1, 2, 8), (3, 4, 0)), "missing; the file is damaged"),
    ],
)
def test_frames_of_apng_in_disorder_or_without_rows_are_refused(
    tmp_path: Path, frames: tuple[tuple[int, int, int], ...], words: str
) -> None:
    (tmp_path / "a.png").write_bytes(apng((0, 0, 8), (1, 2, 8), (3, 4, 8), count=3))
    assert len(list(opened(tmp_path / "a.png").frames())) == 3
    (tmp_path / "a.png").write_bytes(apng(*frames, count=3))
    with pytest.raises(ImageError, match=words):
        list(opened(tmp_path / "a.png").frames())


def test_frames_beyond_the_header_of_apng_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for count, told in ((3, False), (2, True), (1, True)):
        (tmp_path / "a.png").write_bytes(apng((0, 0, 8), (1, 2, 8), (3, 4, 8), count=count))
        caplog.clear()
        found = animation.read(tmp_path / "a.png")
        assert (found.count if found else 1) == count
        assert (f"3 frames, only the {count}" in caplog.text) == told


@pytest.mark.parametrize("suffix,seconds", [(".gif", 655), (".webp", 16777), (".png", 65535)])
def test_times_too_long_for_a_format_are_refused_before_the_work(tmp_path: Path, suffix: str, seconds: int) -> None:
    def frames() -> Iterator[Frame]:
        raise AssertionError("a frame was asked for")
        yield

    (tmp_path / "in.png").write_bytes(apng((0, 0, 8), (1, 2, 8), count=2, delay=(seconds, 1)))
    found = opened(tmp_path / "in.png")
    animation.write(
        tmp_path / f"out{suffix}", found.frames(), like=found, overwrite=False, quality=95, lossless=suffix == ".webp"
    )
    assert [frame.milliseconds for frame in opened(tmp_path / f"out{suffix}").frames()] == [1000 * seconds] * 2
    longer = replace(found, longest_ms=1000 * seconds + 1000)
    with pytest.raises(OutputError, match="holds at most"):
        animation.write(tmp_path / f"a{suffix}", frames(), like=longer, overwrite=False, quality=95)
    given = [replace(frame, milliseconds=longer.longest_ms) for frame in found.frames()]
    with pytest.raises(OutputError, match="holds at most"):
        animation.write(tmp_path / f"a{suffix}", given, like=found, overwrite=False, quality=95)
    assert not (tmp_path / f"a{suffix}").exists()


def test_parts_that_reach_outside_are_cut_off(tmp_path: Path) -> None:
    """Nor does a part, larger than the picture, take memory beyond the limit."""
    frames = moving(transparent=False)[:2]
    path = save(tmp_path / "a.gif", frames)
    picture, _ = pixels.to_palette(frames[0].image)
    outside = b"".join(GifImagePlugin.getdata(picture, (30, 35), duration=50, include_color_table=True))
    path.write_bytes(path.read_bytes()[:-1] + outside + b";")
    found = animation.read(path, max_pixels=40 * 50)
    assert found is not None and found.size == (40, 50) and found.count == 3
    expected = frames[1].image.copy()
    expected[35:, 30:] = frames[0].image[:5, :20]
    assert_same(list(found.frames())[2].image, expected)
    place, larger = struct.pack("<HHHH", 30, 35, 50, 40), struct.pack("<HHHH", 30, 35, 51, 40)
    path.write_bytes(path.read_bytes().replace(place, larger))
    with pytest.raises(ImageError, match="limit is 2000 pixels"):
        list(found.frames())


def test_the_limit_of_pixels_is_of_a_frame(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", moving(transparent=True))
    assert animation.read(path, max_pixels=2000) is not None
    with pytest.raises(ImageError, match="limit is 1999 pixels"):
        animation.read(path, max_pixels=1999)


def test_animations_in_16_bits_are_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "a.png", moving(transparent=True)).read_bytes()
    header = struct.pack(">IIBBBBB", 50, 40, 16, 6, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png.SIGNATURE + chunk(b"IHDR", header) + data[33:])
    with pytest.raises(ImageError, match="more than 8 bits"):
        animation.read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", KINDS)
def test_times_do_not_drift(tmp_path: Path, suffix: str) -> None:
    frames = [replace(frame, milliseconds=1000 / 60) for frame in moving(transparent=False) * 10]
    found = opened(save(tmp_path / f"a{suffix}", frames))
    assert found.count == 60
    assert sum(frame.milliseconds for frame in found.frames()) == pytest.approx(1000)


def test_equal_frames_stay_frames(tmp_path: Path) -> None:
    """Pillow's own encoders join them, which changes the count."""
    frames = [moving(transparent=True)[0]] * 4
    for suffix in (".gif", ".png"):
        results = list(opened(save(tmp_path / f"a{suffix}", frames)).frames())
        assert len(results) == 4
        for result in results:
            assert_same(result.image, frames[0].image)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_memory_holds_a_few_frames(tmp_path: Path, suffix: str) -> None:
    """60 frames of 1 MiB go through, and about 12 at a time are there at most."""
    height = width = 512

    def frames() -> Iterator[Frame]:
        for index in range(60):
            image = np.full((height, width, 4), 255, np.uint8)
            image[index * 8 : index * 8 + 8, :, 0] = index
            yield Frame(image, 20)

    source = like(size=(height, width), count=60)
    tracemalloc.start()
    try:
        animation.write(tmp_path / f"a{suffix}", frames(), like=source, overwrite=False, quality=95)
        for _ in opened(tmp_path / f"a{suffix}").frames():
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


def test_a_profile_that_does_not_fit_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    with caplog.at_level(logging.WARNING):
        found = opened(save(tmp_path / "a.png", moving(transparent=True), icc_profile=grey))
    assert found.metadata.icc_profile is None and "ICC" in caplog.text
