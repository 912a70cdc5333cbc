"""Video: timestamps, colour, copied streams, damage, resuming. Clips are synthesised; most run a doubling stand-in."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import bundles
import numpy as np
import pytest
from PIL import Image

from sdk import BackendError, BackendUnavailable, ImageError, OptionError, OutputError, Upscaler, video
from sdk.video import VideoProgress, upscale_video

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 48, 32
FILM = Fraction(1, 24000)  # ticks of 24000/1001 frames a second: 1001 each


class Doubler:
    """Stands in for an Upscaler: repeats pixels and keeps the frames it was given."""

    def __init__(self, scale: int = 2, batch: int = 2, fail: Callable[[int], None] = lambda count: None):
        self.scale, self.fail = scale, fail
        self.info = {"model": "doubler", "scale": scale, "batch": batch, "one_piece_pixels": 1}
        self.frames: list[np.ndarray] = []
        self.batches: list[int] = []

    def upscale_batch(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append(len(images))
        for image in images:
            self.frames.append(image)
            self.fail(len(self.frames))
        return [image.repeat(self.scale, 0).repeat(self.scale, 1) for image in images]


def make(
    path: Path,
    *,
    frames: int = 24,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction = FILM,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    colour: tuple[int, int, int, int] = (2, 0, 2, 2),
    planes: Callable[[int], list[np.ndarray | int]] | None = None,
    prepare: Callable[[Any, Any], None] = lambda out, stream: None,
    audio: str | None = None,
    subtitles: str | None = None,
) -> Path:
    """Write a clip of seeded noise blocks that move, or of the given planes.

    colour: matrix, range, primaries, transfer as tagged. planes: frame number -> code values of each plane.
    """
    height, width = size
    with av.open(str(path), "w", container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=24)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base = width, height, pixel_format, time_base
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = colour
        context.options = {"crf": "18"} | (options or {}) if codec.startswith("lib") else options or {}
        if codec == "libx265":
            context.options = {"x265-params": "log-level=none", **context.options}
        context.flags |= av.codec.context.Flags.frame_duration
        sound = out.add_stream(audio, rate=48000, layout="mono") if audio else None
        text = out.add_mux_stream(subtitles, time_base=Fraction(1, 1000)) if subtitles else None
        prepare(out, stream)
        noise = np.random.default_rng(3).integers(40, 200, (height // 4 + 9, width // 4 + 9), dtype=np.uint8)
        noise = noise.repeat(4, 0).repeat(4, 1)
        samples = 0
        for number in range(frames):
            frame = av.VideoFrame(width, height, pixel_format)
            deep = frame.format.components[0].bits > 8
            values = planes(number) if planes else None
            for index, view in enumerate(video._views(frame, np.uint16 if deep else np.uint8)):
                if values is not None:
                    view[:] = values[index]
                else:
                    moved = noise[number % 9 : number % 9 + view.shape[0], number % 7 : number % 7 + view.shape[1]]
                    view[:] = (moved.astype(np.uint16) * (4 if deep else 1)) if index == 0 else (512 if deep else 128)
            frame.pts, frame.time_base = pts[number] if pts else number * 1001, time_base
            frame.duration = 1001
            out.mux(stream.encode(frame))
            while sound and samples / 48000 < (number + 1) * 1001 / 24000:
                wave = np.random.default_rng(samples).normal(0, 0.1, (1, 960)).astype(np.float32)
                block = av.AudioFrame.from_ndarray(wave, format="fltp" if audio == "aac" else "flt", layout="mono")
                block.sample_rate, block.pts, block.time_base = 48000, samples, Fraction(1, 48000)
                samples += 960
                out.mux(sound.encode(block))
            if text and number in (2, 10):
                line = f"line {number}".encode()
                packet = av.Packet(line if subtitles == "subrip" else len(line).to_bytes(2, "big") + line)
                packet.pts = packet.dts = number * 40
                packet.duration, packet.time_base, packet.stream = 200, Fraction(1, 1000), text
                out.mux(packet)
        out.mux(stream.encode(None))
        if sound:
            out.mux(sound.encode(None))
    return path


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def packets(path: Path, kind: str) -> list[tuple[Fraction, Fraction, bytes]]:
    """List (start and duration in seconds, data) of the packets of the first stream of a kind."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [
            (packet.pts * packet.time_base, (packet.duration or 0) * packet.time_base, bytes(packet))
            for packet in container.demux(stream)
            if packet.size
        ]


def times(path: Path) -> list[Fraction]:
    return [frame.pts * frame.time_base for frame in decoded(path)]


def means(frame: Any) -> list[float]:
    """Mean code value of each plane."""
    deep = frame.format.components[0].bits > 8
    return [float(view.mean()) for view in video._views(frame, np.uint16 if deep else np.uint8)]


def pictures(path: Path) -> list[bytes]:
    return [hashlib.sha256(frame.to_ndarray().tobytes()).digest() for frame in decoded(path)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "SEGMENT", 8)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


def test_a_clip_through_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    source, target = make(tmp_path / "in.mp4", audio="aac"), tmp_path / "out.mp4"
    with Upscaler(bundles.shared("identity"), backend="onnxruntime", device="cpu") as upscaler:
        report = upscale_video(upscaler, str(source), str(target), crf=0)
        expected = upscaler.upscale(video._to_rgb(*_first(source)))
        got = video._to_rgb(*_first(target))
    assert (report.frames, report.size, report.codec, report.resumed) == (24, (64, 96), "h264", 0)
    assert abs(got.astype(int) - expected).max() <= 2  # two roundings to code values, one of them of limited range
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


def _first(path: Path) -> tuple[Any, video.Clip, Any]:
    return decoded(path)[0], video.probe(path), av.video.reformatter.VideoReformatter()


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "h264"), (".mp4", "hevc"), (".mkv", "h264"), (".mov", "h264"), (".webm", "vp9")]
)
def test_timestamps_of_a_variable_frame_rate_are_kept(
    tmp_path: Path, suffix: str, codec: str, short_segments: None
) -> None:
    """With long pauses, some at the borders of segments, where decoding times of two encoders would overlap."""
    steps = np.random.default_rng(5).integers(1, 90, 40)
    steps[[7, 8, 9, 15, 24, 31]] = 2500
    pts = [7000, *(7000 + np.cumsum(steps)).tolist()][:40]
    source = make(tmp_path / "in.mkv", frames=40, pts=pts, time_base=Fraction(1, 1000))
    report = upscale_video(Doubler(), source, tmp_path / f"out{suffix}", codec=codec)
    assert report.frames == 40
    assert times(tmp_path / f"out{suffix}") == [Fraction(value, 1000) for value in pts] == times(source)


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3", "b-pyramid": "normal"}])
def test_timestamps_in_fine_ticks_with_an_offset(tmp_path: Path, options: dict[str, str], short_segments: None) -> None:
    pts = [90001 + 3003 * number for number in range(21)]
    source = make(tmp_path / "in.mp4", frames=21, pts=pts, time_base=Fraction(1, 90000), options=options, audio="aac",
                  container_options={"movie_timescale": "90000"})  # fmt: skip
    upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert times(tmp_path / "out.mp4") == times(source) == [Fraction(value, 90000) for value in pts]
    assert packets(tmp_path / "out.mp4", "audio") == packets(source, "audio")


def test_the_last_frame_keeps_its_duration(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", frames=5)
    upscale_video(Doubler(), source, tmp_path / "out.mp4")
    for path in (source, tmp_path / "out.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.duration * stream.time_base == 5 * 1001 * FILM


def test_frames_hidden_by_an_edit_list_stay_hidden(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", frames=20, pts=[1001 * number for number in range(-6, 14)])
    assert len(decoded(source)) == 14
    report = upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert report.frames == 14 and times(tmp_path / "out.mp4") == times(source)


@pytest.mark.parametrize(("suffix", "audio"), [(".mp4", "aac"), (".mkv", "pcm_f32le"), (".mov", "aac")])
def test_sound_is_copied_bit_by_bit_and_in_time(tmp_path: Path, suffix: str, audio: str) -> None:
    source = make(tmp_path / f"in{suffix}", audio=audio, frames=30)
    upscale_video(Doubler(), source, tmp_path / f"out{suffix}")
    copied = packets(tmp_path / f"out{suffix}", "audio")
    assert copied == packets(source, "audio") and len(copied) > 20
    assert times(tmp_path / f"out{suffix}") == times(source)


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "subrip"), (".mp4", "mov_text")])
def test_subtitles_are_copied(tmp_path: Path, suffix: str, codec: str) -> None:
    def language(out: Any, stream: Any) -> None:
        out.streams[-1].metadata["language"] = "deu"
        out.streams[-1].disposition = av.stream.Disposition.forced

    source = make(tmp_path / f"in{suffix}", subtitles=codec, prepare=language)
    upscale_video(Doubler(), source, tmp_path / f"out{suffix}")
    copied = packets(tmp_path / f"out{suffix}", "subtitle")
    assert [row for row in copied if b"line" in row[2]] == [
        row for row in packets(source, "subtitle") if b"line" in row[2]
    ]
    assert sum(b"line" in row[2] for row in copied) == 2
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert container.streams.subtitles[0].language == "deu"
        assert container.streams.subtitles[0].disposition & av.stream.Disposition.forced


def test_metadata_chapters_covers_and_fonts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chapters = [
        {"id": 1, "start": 0, "end": 400, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}},
        {"id": 2, "start": 400, "end": 1000, "time_base": Fraction(1, 1000), "metadata": {"title": "two"}},
    ]

    def prepare(out: Any, stream: Any) -> None:
        out.metadata["title"] = "A film"
        out.set_chapters(chapters)
        stream.metadata["title"] = "the picture"
        out.add_attachment("font.ttf", "application/x-truetype-font", b"not really a font")

    source = make(tmp_path / "in.mkv", prepare=prepare)
    assert upscale_video(Doubler(), source, tmp_path / "out.mkv").left_out == ()
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.metadata["title"] == "A film"
        assert container.streams.video[0].metadata["title"] == "the picture"
        assert [each["metadata"]["title"] for each in container.chapters()] == ["one", "two"]
        assert [each["start"] * each["time_base"] for each in container.chapters()] == [0, Fraction(2, 5)]
        assert [s.data for s in container.streams if s.type == "attachment"] == [b"not really a font"]
    with caplog.at_level(logging.WARNING):
        report = upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert len(report.left_out) == 1 and "attachment" in report.left_out[0] and "not copied" in caplog.text


def test_covers_and_the_titles_of_chapters_in_mp4(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(jpeg, "JPEG")

    def prepare(out: Any, stream: Any) -> None:
        titles = {"metadata": {"title": "one"}, "time_base": Fraction(1, 1000)}
        out.set_chapters([{"id": 1, "start": 0, "end": 500, **titles}])
        cover = out.add_mux_stream("mjpeg", width=16, height=16, time_base=Fraction(1, 90000))
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(jpeg.getvalue())
        packet.pts = packet.dts = 0
        packet.stream, packet.time_base, packet.is_keyframe = cover, Fraction(1, 90000), True
        out.mux(packet)

    source = make(tmp_path / "in.mp4", prepare=prepare)
    assert upscale_video(Doubler(), source, tmp_path / "out.mp4").left_out == ()
    with av.open(str(tmp_path / "out.mp4")) as container:
        (cover,) = [s for s in container.streams if s.disposition & av.stream.Disposition.attached_pic]
        assert [bytes(packet) for packet in container.demux(cover) if packet.size] == [jpeg.getvalue()]
        assert [each["metadata"]["title"] for each in container.chapters()] == ["one"]
    (left_out,) = upscale_video(Doubler(), source, tmp_path / "out.mkv").left_out
    assert "mjpeg" in left_out


@pytest.mark.parametrize(
    ("made", "wanted", "text"),
    [
        ({"subtitles": "subrip"}, ".mp4", r"stream 1 \(subtitle, (subrip|srt)\); write .mkv"),
        ({"audio": "aac"}, ".webm", r"stream 1 \(audio, aac\); write .mkv or .mp4"),
    ],
)
def test_a_stream_that_the_container_cannot_hold_is_named(
    tmp_path: Path, made: dict[str, Any], wanted: str, text: str
) -> None:
    source, upscaler = make(tmp_path / "in.mkv", **made), Doubler()
    with pytest.raises(OutputError, match=text):
        upscale_video(upscaler, source, tmp_path / f"out{wanted}")
    assert not upscaler.frames and names(tmp_path) == ["in.mkv"]


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
    source = make(tmp_path / "in.mp4", frames=2, codec="libx265", pixel_format="gbrp", options=lossless,
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


@pytest.mark.parametrize(
    ("made", "text"),
    [
        ({"codec": "ffv1", "pixel_format": "yuva420p"}, "alpha"),
        ({"options": {"x264-params": "tff=1"}}, "interlaced"),
        ({"colour": (8, 1, 2, 2)}, "matrix"),
    ],
)
def test_what_would_come_out_wrong_is_refused(tmp_path: Path, made: dict[str, Any], text: str) -> None:
    source = make(tmp_path / "in.mkv", **made)
    with pytest.raises(ImageError, match=text):
        upscale_video(Doubler(), source, tmp_path / "out.mkv")
    assert names(tmp_path) == ["in.mkv"]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_segments_join_into_a_clip_that_decodes(tmp_path: Path, codec: str, short_segments: None) -> None:
    """Every frame shows its own picture: what was joined is compared with frames encoded in one piece."""
    source = make(tmp_path / "in.mkv", frames=25)
    report = upscale_video(Doubler(), source, tmp_path / "out.mkv", codec=codec, crf=10)
    assert report.frames == 25 and report.codec == codec
    reference = Doubler()
    list(reference.upscale_batch([video._to_rgb(frame, *_first(source)[1:]) for frame in decoded(source)]))
    clip = video.probe(tmp_path / "out.mkv")
    for frame, expected in zip(decoded(tmp_path / "out.mkv"), reference.frames, strict=True):
        got = video._to_rgb(frame, clip, av.video.reformatter.VideoReformatter())
        # Neighbouring frames differ by more than 20 on average: a swap would be seen.
        assert abs(got[::2, ::2].astype(int) - expected).mean() < 6


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from sdk import Upscaler, video

    class Killed(Upscaler):
        count = 0

        def upscale_batch(self, images):
            Killed.count += len(images)
            if Killed.count > 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().upscale_batch(images)

    model, source, target = sys.argv[1:]
    video.SEGMENT = 8
    video.upscale_video(Killed(model, backend="onnxruntime", device="cpu"), source, target, crf=0)
"""


def test_a_killed_run_goes_on_and_gives_the_same_file(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=45, audio="aac"), tmp_path / "out.mp4"
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        str(bundles.shared("identity")),
        str(source),
        str(target),
    ]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (folder,) = tmp_path.glob(".sr-*.parts")
    complete = sorted(path.name for path in folder.glob("*.json"))
    assert complete[:2] == ["000000.json", "000001.json"] and not target.exists()

    with Upscaler(bundles.shared("identity"), backend="onnxruntime", device="cpu") as upscaler:
        told: list[VideoProgress] = []
        # Lossless, because lossy x264 varies from run to run for small frames (its mbtree, with one thread too).
        report = upscale_video(upscaler, source, target, crf=0, progress=told.append)
        assert report.frames == 45 and report.resumed == 8 * len(complete) > 0
        assert upscaler.stats.pictures == 45 - report.resumed
        assert told[0].frames >= 1 and told[-1].frames == 45
        upscale_video(upscaler, source, tmp_path / "whole.mp4", crf=0)
    assert target.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert pictures(target) == pictures(tmp_path / "whole.mp4") and len(pictures(target)) == 45
    assert [path for path in tmp_path.glob(".sr-*") if path.suffix == ".parts"] == []


def stop_after(limit: int, error: BaseException) -> Callable[[int], None]:
    def fail(count: int) -> None:
        if count > limit:
            raise error

    return fail


def test_a_damaged_segment_is_made_again(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=45), tmp_path / "out.mp4"
    upscale_video(Doubler(), source, tmp_path / "whole.mp4", crf=0)
    with pytest.raises(BackendError):
        upscale_video(Doubler(fail=stop_after(38, BackendError("no more"))), source, target, crf=0)
    (folder,) = tmp_path.glob(".sr-*.parts")
    data = (folder / "000001.packets").read_bytes()
    (folder / "000001.packets").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "000002.json").write_text("{")
    complete = len(list(folder.glob("*.json")))
    again = Doubler()
    report = upscale_video(again, source, target, crf=0)
    assert report.resumed == 8 * (complete - 2) and len(again.frames) == 45 - report.resumed
    assert target.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_other_settings_models_and_sources_start_anew(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    with pytest.raises(BackendError):
        upscale_video(Doubler(fail=stop_after(25, BackendError("no more"))), source, target)
    assert upscale_video(Doubler(), source, target, crf=20).resumed == 0
    other = Doubler()
    other.info["model"] = "another"
    assert upscale_video(other, source, target, overwrite=True).resumed == 0
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert upscale_video(Doubler(), source, target, overwrite=True).resumed == 0
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert upscale_video(Doubler(), source, target, overwrite=True).resumed >= 16


def test_ctrl_c_keeps_what_is_complete(tmp_path: Path, short_segments: None, caplog: pytest.LogCaptureFixture) -> None:
    source, target = make(tmp_path / "in.mp4", frames=40), tmp_path / "out.mp4"
    with pytest.raises(KeyboardInterrupt):
        upscale_video(Doubler(fail=stop_after(30, KeyboardInterrupt())), source, target)
    (folder,) = tmp_path.glob(".sr-*.parts")
    assert names(tmp_path) == [folder.name, "in.mp4"] and str(folder) in caplog.text
    assert not list(folder.glob("*.part"))
    assert upscale_video(Doubler(), source, target).resumed >= 16
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


def test_an_error_before_a_segment_is_complete_leaves_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4")
    with pytest.raises(BackendError, match="no more"):
        upscale_video(Doubler(fail=stop_after(4, BackendError("no more"))), source, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mp4"]


def test_an_error_of_the_callback_ends_the_run(tmp_path: Path) -> None:
    def fail(progress: VideoProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        upscale_video(Doubler(), make(tmp_path / "in.mp4"), tmp_path / "out.mp4", progress=fail)
    assert names(tmp_path) == ["in.mp4"]


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    told: list[VideoProgress] = []
    upscaler = Doubler(batch=5)
    upscale_video(upscaler, make(tmp_path / "in.mp4"), tmp_path / "out.mp4", progress=told.append)
    assert [progress.frames for progress in told] == [5, 10, 15, 20, 24] and upscaler.batches == [5, 5, 5, 5, 4]
    assert all(progress.total == 24 and progress.fps > 0 for progress in told)
    assert told[-1].eta_s == 0 and all((progress.eta_s or 0) > 0 for progress in told[:-1])


def test_frames_are_taken_only_a_few_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, upscaler, converted = make(tmp_path / "in.mp4", frames=60), Doubler(batch=2), []
    convert, ahead = video._to_rgb, []

    def counted(*arguments: Any) -> np.ndarray:
        converted.append(1)
        return convert(*arguments)

    monkeypatch.setattr(video, "_to_rgb", counted)
    upscaler.fail = lambda count: ahead.append(len(converted) - count)
    upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert max(ahead) <= 8 and len(converted) == 60


@pytest.mark.parametrize(
    ("suffix", "options"), [(".mp4", {"movflags": "faststart"}), (".mp4", {"movflags": "frag_keyframe+empty_moov"}),
                            (".mkv", {}), (".mp4", {})]
)  # fmt: skip
@pytest.mark.parametrize("share", [0.6, 0.97])
def test_a_truncated_source_is_an_error(tmp_path: Path, suffix: str, options: dict[str, str], share: float) -> None:
    source = make(tmp_path / f"in{suffix}", container_options=options, frames=60, options={"g": "10"})
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    upscaler = Doubler()
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert not upscaler.frames and names(tmp_path) == [source.name]


def test_damage_is_an_error_that_says_where(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mp4", frames=60, options={"g": "10"})
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][45]
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    source.write_bytes(data)
    with pytest.raises(ImageError, match=r"frame \d+ \(1\.\d+ s\)"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mp4"]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.mp4").write_bytes(content)
    with pytest.raises(ImageError, match="not a video"):
        upscale_video(Doubler(), tmp_path / "in.mp4", tmp_path / "out.mp4")
    with pytest.raises(ImageError):
        upscale_video(Doubler(), tmp_path / "missing.mp4", tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mp4"]


def test_sound_alone_is_not_a_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "in.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=48000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.sample_rate = 48000
        out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    with pytest.raises(ImageError, match="no video"):
        upscale_video(Doubler(), tmp_path / "in.mp4", tmp_path / "out.mp4")


def test_a_frame_lost_on_the_way_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = video._count_frames
    monkeypatch.setattr(video, "_count_frames", lambda path: count(path) - 1)
    with pytest.raises(OutputError, match="24 frames were decoded and 23 written"):
        upscale_video(Doubler(), make(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The first write of all, the first segment, its list."""
    calls, sync = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    source = make(tmp_path / "in.mp4")
    monkeypatch.setattr(video.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mp4"]


def test_a_disk_that_fills_while_joining_keeps_the_segments(tmp_path: Path, short_segments: None) -> None:
    """The limit of a file's size lies above every segment, and below the result: FFmpeg's own writes fail."""
    source = make(tmp_path / "in.mp4", frames=40)
    upscale_video(Doubler(), source, tmp_path / "whole.mp4", crf=0)
    limit = (tmp_path / "whole.mp4").stat().st_size * 2 // 3
    (tmp_path / "whole.mp4").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="too large"):
            upscale_video(Doubler(), source, tmp_path / "out.mp4", crf=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = tmp_path.glob(".sr-*.parts")
    assert names(tmp_path) == [folder.name, "in.mp4"]
    again = Doubler()
    assert upscale_video(again, source, tmp_path / "out.mp4", crf=0).resumed == 40 and not again.frames


def test_a_refused_container_keeps_earlier_work(tmp_path: Path, short_segments: None) -> None:
    source = make(tmp_path / "in.mkv", frames=30, subtitles="subrip")
    with pytest.raises(BackendError):
        upscale_video(Doubler(fail=stop_after(25, BackendError("no more"))), source, tmp_path / "out.mkv")
    with pytest.raises(OutputError, match="subtitle"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert upscale_video(Doubler(), source, tmp_path / "out.mkv").resumed >= 16


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source, upscaler = make(tmp_path / "in.mp4"), Doubler()
    (tmp_path / "there.mp4").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    for name, text in [
        ("there.mp4", "exists"), ("folder.mp4", "is a folder"), ("no/out.mp4", "does not exist"), ("out.avi", ".mkv"),
    ]:  # fmt: skip
        with pytest.raises(OutputError, match=text):
            upscale_video(upscaler, source, tmp_path / name)
    assert not upscaler.frames and (tmp_path / "there.mp4").read_text() == "mine"
    upscale_video(upscaler, source, tmp_path / "there.mp4", overwrite=True)
    assert len(decoded(tmp_path / "there.mp4")) == 24


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    def appear(count: int) -> None:
        (tmp_path / "out.mp4").write_text("mine")

    with pytest.raises(OutputError, match="meanwhile"):
        upscale_video(Doubler(fail=appear), make(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_text() == "mine" and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("options", [{"crf": -1}, {"crf": 52}, {"crf": 1.5}, {"crf": True}, {"codec": "divx"}])
def test_options_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        upscale_video(Doubler(), make(tmp_path / "in.mp4"), tmp_path / "out.mp4", **options)
    assert names(tmp_path) == ["in.mp4"]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'sr-sdk\[video\]'"):
        upscale_video(Doubler(), tmp_path / "in.mp4", tmp_path / "out.mp4")


def test_videos_are_told_by_their_suffix() -> None:
    assert video.is_video(Path("a.MP4")) and video.is_video(Path("b.mkv"))
    assert not video.is_video(Path("a.png")) and not video.is_video(Path("mp4"))
    assert set(video.CONTAINERS) <= set(video.SUFFIXES)
