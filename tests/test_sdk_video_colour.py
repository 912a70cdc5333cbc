"""Video: matrix, range, depth, chroma, odd sizes, turned and stretched clips."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import HEIGHT, WIDTH, Doubler, decoded, make, means

from sdk import ImageError, OutputError
from sdk.video import upscale_video

# Published code values of pure red, green and blue.
BT709_LIMITED = [(63, 102, 240), (173, 42, 26), (32, 240, 118)]
BT601_LIMITED = [(81, 90, 240), (145, 54, 34), (41, 240, 110)]
BT601_FULL = [(76, 85, 255), (150, 44, 21), (29, 255, 107)]
BT2020_LIMITED_10 = [(294, 387, 960), (658, 189, 98), (116, 960, 476)]
PURE = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


@pytest.mark.parametrize(
    ("colour", "pixel_format", "codes"),
    [
        ((1, 1, 1, 1), "yuv420p", BT709_LIMITED),
        ((6, 1, 6, 6), "yuv420p", BT601_LIMITED),
        ((5, 1, 5, 6), "yuv444p", BT601_LIMITED),
        ((6, 2, 2, 2), "yuv420p", BT601_FULL),
        ((2, 0, 2, 2), "yuv420p", BT601_LIMITED),
        ((9, 1, 9, 16), "yuv420p10le", BT2020_LIMITED_10),
    ],
)
def test_colours_and_their_tags(
    tmp_path: Path, colour: tuple[int, int, int, int], pixel_format: str, codes: list[tuple[int, int, int]]
) -> None:
    deep = "10" in pixel_format
    source = make(tmp_path / "in.mp4", frames=3, colour=colour, pixel_format=pixel_format, options={"crf": "0"},
                  planes=lambda number: list(codes[number]), codec="libx264")  # fmt: skip
    upscaler = Doubler()
    report = upscale_video(upscaler, source, tmp_path / "out.mp4", crf=1)
    assert report.pixel_format == pixel_format and report.codec == ("hevc" if deep else "h264")
    top = 65535 if deep else 255
    for given, pure in zip(upscaler.frames, PURE):
        assert given.dtype == (np.uint16 if deep else np.uint8) and given.shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_allclose(given.mean((0, 1)) / top, pure, atol=0.008)  # published codes are rounded
    matrix, full_range, primaries, transfer = colour
    for before, after in zip(decoded(source), decoded(tmp_path / "out.mp4"), strict=True):
        # Clipping to RGB costs up to a code value of 8 bits, the encoder another.
        np.testing.assert_allclose(means(after), means(before), atol=8 if deep else 2)
        assert after.colorspace == (6 if matrix == 2 else matrix)
        assert after.color_range == (full_range or 1)
        assert (after.color_primaries, after.color_trc) == (primaries, transfer)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv420p10le", "yuvj420p", "gray"])
def test_mean_colour_is_kept(tmp_path: Path, pixel_format: str) -> None:
    """Colours inside the RGB cube, through every step but a lossy encoder: the means stay within half a code value."""
    unit = 4 if "10" in pixel_format else 1
    rng = np.random.default_rng(2)

    def planes(number: int) -> list[np.ndarray | int]:
        luma = rng.integers(100 * unit, 150 * unit, (HEIGHT, WIDTH))
        return [luma, int(unit * (110 + 9 * number)), int(unit * (140 - 6 * number))]

    colour = (6, 2 if "j" in pixel_format else 1, 2, 2)
    codec = "ffv1" if pixel_format == "gray" else "libx264"
    source = make(tmp_path / "in.mkv", frames=4, pixel_format=pixel_format, options={"crf": "0"}, planes=planes,
                  colour=colour, codec=codec)  # fmt: skip
    upscale_video(Doubler(), source, tmp_path / "out.mkv", crf=0)
    for before, after in zip(decoded(source), decoded(tmp_path / "out.mkv"), strict=True):
        expected = means(before) if pixel_format != "gray" else [*means(before), 128, 128]
        np.testing.assert_allclose(means(after), expected, atol=0.5 * unit)


def test_rgb_is_taken_as_it_is_and_becomes_bt709(tmp_path: Path) -> None:
    lossless = {"x265-params": "lossless=1:log-level=none"}
    source = make(tmp_path / "in.mp4", frames=8, size=(64, 64), codec="libx265", pixel_format="gbrp", options=lossless,
                  planes=lambda number: [200, 30, 255])  # fmt: skip
    upscaler, again = Doubler(), Doubler(1)
    report = upscale_video(upscaler, source, tmp_path / "out.mp4", crf=1)
    assert report.pixel_format == "yuv444p"
    assert (upscaler.frames[0] == (255, 200, 30)).all()
    upscale_video(again, tmp_path / "out.mp4", tmp_path / "again.mp4")
    np.testing.assert_allclose(again.frames[0].mean((0, 1)), (255, 200, 30), atol=1.5)
    assert (decoded(tmp_path / "out.mp4")[0].colorspace, decoded(tmp_path / "out.mp4")[0].color_range) == (1, 1)


def test_untagged_clips_from_720_rows_on_are_bt709(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", frames=2, size=(720, 32), planes=lambda number: [63, 102, 240])
    upscaler = Doubler()
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    np.testing.assert_allclose(upscaler.frames[0].mean((0, 1)), (255, 0, 0), atol=2)
    assert decoded(tmp_path / "out.mp4")[0].colorspace == 1


def test_chroma_stays_at_the_left_of_its_luma(tmp_path: Path) -> None:
    """A ramp of chroma, repeated by the doubler, lies where it lay, within the blur of a repeated pixel."""
    ramp = np.broadcast_to(np.linspace(60, 200, WIDTH // 2).astype(int), (HEIGHT // 2, WIDTH // 2))
    source = make(tmp_path / "in.mkv", frames=1, planes=lambda number: [128, ramp, 128], options={"crf": "0"})
    upscaler = Doubler()
    upscale_video(upscaler, source, tmp_path / "out.mkv", crf=0)
    blue = upscaler.frames[0][HEIGHT // 2, :, 2].astype(float)
    # Sample k of chroma lies on luma column 2k; its blue is 128 + (cb - 128) * 255/224 * 1.772 less the luma offset.
    cb = 128 + (blue[0::2] - (128 - 16) * 255 / 219) * 224 / 255 / 1.772
    inside = slice(2, -2)
    np.testing.assert_allclose(cb[inside][ramp[0][inside] < 180], ramp[0][inside][ramp[0][inside] < 180], atol=1.5)


@pytest.mark.parametrize(
    ("size", "pixel_format", "scale", "wanted"),
    [
        ((31, 47), "yuv444p", 1, "yuv444p"),
        ((31, 47), "yuv444p", 2, "yuv444p"),
        ((33, 49), "yuv420p", 1, "yuv444p"),
        ((33, 49), "yuv420p", 2, "yuv420p"),
        ((33, 48), "yuv422p", 3, "yuv422p"),
    ],
)
def test_odd_sizes(tmp_path: Path, size: tuple[int, int], pixel_format: str, scale: int, wanted: str) -> None:
    codec = "ffv1" if "420" in pixel_format else "libx264"
    source = make(tmp_path / "in.mkv", frames=3, size=size, pixel_format=pixel_format, codec=codec)
    report = upscale_video(Doubler(scale), source, tmp_path / "out.mkv")
    (frame, *_) = decoded(tmp_path / "out.mkv")
    assert (frame.height, frame.width) == report.size == (size[0] * scale, size[1] * scale)
    assert frame.format.name == report.pixel_format == wanted


# Counter-clockwise turn and mirror as stored -> what turns a stored picture upright.
TURNS: list[tuple[int, bool, Callable[[np.ndarray], np.ndarray]]] = [
    (90, False, lambda picture: np.rot90(picture, 1)),
    (180, False, lambda picture: np.rot90(picture, 2)),
    (270, False, lambda picture: np.rot90(picture, 3)),
    (0, True, lambda picture: picture[:, ::-1]),
]


@pytest.mark.parametrize(("degrees", "mirrored", "upright"), TURNS)
def test_rotated_clips_come_out_upright(
    tmp_path: Path, degrees: int, mirrored: bool, upright: Callable[[np.ndarray], np.ndarray]
) -> None:
    def turn(out: Any, stream: Any) -> None:
        stream.set_display_rotation(degrees, hflip=mirrored)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    plain, turned = make(tmp_path / "plain.mp4"), make(tmp_path / "in.mp4", prepare=turn)
    upscaler = Doubler()
    upscale_video(upscaler, plain, tmp_path / "plain_out.mp4")
    stored = upscaler.frames[0]
    upscaler = Doubler()
    report = upscale_video(upscaler, turned, tmp_path / "out.mp4")
    np.testing.assert_array_equal(upscaler.frames[0], upright(stored))
    assert report.size == (upright(stored).shape[0] * 2, upright(stored).shape[1] * 2)
    with av.open(str(tmp_path / "out.mp4")) as container:
        across = degrees in (90, 270)
        assert container.streams.video[0].sample_aspect_ratio == (Fraction(3, 4) if across else Fraction(4, 3))
        assert next(container.decode(video=0)).rotation == 0


def test_a_turn_by_an_odd_angle_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", prepare=lambda out, stream: stream.set_display_rotation(30))
    with pytest.raises(ImageError, match="90 degrees"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_sample_aspect_ratio_is_kept(tmp_path: Path, suffix: str) -> None:
    def prepare(out: Any, stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)

    source = make(tmp_path / "in.mp4", frames=4, prepare=prepare)
    upscale_video(Doubler(), source, tmp_path / f"out{suffix}")
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 15)
    with pytest.raises(OutputError, match="square"):
        upscale_video(Doubler(), source, tmp_path / "out.webm")


def test_metadata_of_frames_that_is_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"x265-params": "log-level=none:max-cll=1000,400"}
    source = make(tmp_path / "in.mp4", frames=8, size=(64, 64), codec="libx265", options=options)
    assert upscale_video(Doubler(), source, tmp_path / "out.mp4").left_out == ("HDR10 light levels",)
    assert "not kept: HDR10 light levels" in caplog.text


def test_what_would_crash_x265_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", frames=2, size=(32, 24), pixel_format="yuv420p10le")
    with pytest.raises(OutputError, match="hevc needs 64 pixels of width, not 48; use codec h264"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert upscale_video(Doubler(), source, tmp_path / "out.mp4", codec="h264").pixel_format == "yuv420p10le"
