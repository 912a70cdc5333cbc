"""Video: timestamps, copied streams, damage, refusals. Clips are synthesised; most run a doubling stand-in."""

from __future__ import annotations

import io
import logging
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import bundles
import numpy as np
import pytest
from click.testing import CliRunner
from clips import (  # noqa: F401 - two are fixtures
    FILM,
    Doubler,
    decoded,
    make,
    names,
    no_thread_is_left,
    no_waiting,
    packets,
    rgb,
    times,
)
from PIL import Image

from sdk import BackendUnavailable, ImageError, OptionError, OutputError, Upscaler
from sdk.cli import main
from sdk.video import VideoProgress, containers, decode, is_video, mux, upscale_video

pytest.importorskip("onnxruntime")


def test_a_clip_through_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    source, target = make(tmp_path / "in.mp4", audio="aac"), tmp_path / "out.mp4"
    with Upscaler(bundles.shared("identity"), backend="onnxruntime", device="cpu") as upscaler:
        report = upscale_video(upscaler, str(source), str(target), crf=0)
        expected = upscaler.upscale(rgb(source)[0])
        got = rgb(target)[0]
    assert (report.frames, report.size, report.codec, report.resumed) == (24, (64, 96), "h264", 0)
    assert abs(got.astype(int) - expected).max() <= 2  # two roundings to code values, one of them of limited range
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


def test_the_program_takes_clips_and_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))
    source, target = make(tmp_path / "in.mp4", frames=3, size=(32, 48)), tmp_path / "out.mp4"
    arguments = [str(source), "-o", str(target), "--model", str(bundles.shared("identity"))]
    arguments += ["--backend", "onnxruntime", "--device", "cpu", "--max-pixels"]
    refused = CliRunner().invoke(main, [*arguments, str(32 * 48 - 1)])
    assert refused.exit_code == 1 and "too large" in refused.output and not target.exists()
    assert CliRunner().invoke(main, [*arguments, str(32 * 48)]).exit_code == 0 and len(rgb(target)) == 3


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
    convert, ahead = decode.to_rgb, []

    def counted(*arguments: Any) -> np.ndarray:
        converted.append(1)
        return convert(*arguments)

    monkeypatch.setattr(decode, "to_rgb", counted)
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


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.mp4")
    with pytest.raises(ImageError, match="not a file"):
        upscale_video(Doubler(), tmp_path / "in.mp4", tmp_path / "out.mp4")
    with pytest.raises(ImageError, match="not a file"):
        upscale_video(Doubler(), tmp_path, tmp_path / "out.mp4")


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.ts\n#EXT-X-ENDLIST\n"
ADAPTATION = '<Representation id="1" bandwidth="1"><BaseURL>secret.ts</BaseURL></Representation>'
DASH = f"""<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>
<AdaptationSet mimeType="video/mp4">{ADAPTATION}</AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile secret.ts\n", HLS, DASH])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".m3u8"])
def test_a_file_that_names_others_is_no_video(tmp_path: Path, content: str, suffix: str) -> None:
    make(tmp_path / "secret.ts")
    (tmp_path / f"in{suffix}").write_text(content)
    with pytest.raises(ImageError, match="not a video"):
        upscale_video(Doubler(), tmp_path / f"in{suffix}", tmp_path / "out.mp4")


@pytest.mark.parametrize(
    "name",
    [
        "http:x.mp4", "pipe:0.mp4", "concat:a.mp4|b.mp4", "file:a.mp4", "-x.mp4", "12:30 x.mp4", "a%03d.mp4",
        "\u00fc \u732b.mp4",
    ],
)  # fmt: skip
def test_a_name_is_never_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "in.mp4", frames=3).rename(name)
    Path("to:folder").mkdir()
    for target in (Path(f"out {name}"), Path("to:folder") / name):
        assert upscale_video(Doubler(), Path(name), target).frames == 3
        assert len(rgb(tmp_path / target)) == 3


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".mp4", "libx264"), (".m4v", "libx264"), (".mov", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"),
        (".avi", "mpeg4"), (".ts", "libx264"), (".m2ts", "libx264"), (".mts", "libx264"), (".mpg", "mpeg2video"),
        (".mpeg", "mpeg1video"), (".wmv", "msmpeg4v3"), (".flv", "flv"), (".3gp", "mpeg4"),
    ],
)  # fmt: skip
def test_containers_that_are_read(tmp_path: Path, suffix: str, codec: str) -> None:
    base = Fraction(1001, 24000) if codec != "libx264" else FILM
    source = make(tmp_path / f"in{suffix}", codec=codec, time_base=base, frames=6, size=(48, 64), duration=None,
                  pts=[*range(6)] if codec != "libx264" else None)  # fmt: skip
    assert is_video(source) and upscale_video(Doubler(), source, tmp_path / "out.mkv").frames == 6


def test_frames_of_any_size_are_not_decoded(tmp_path: Path) -> None:
    source, upscaler = make(tmp_path / "in.mkv"), Doubler()
    with pytest.raises(ImageError, match=r"in.mkv: too large \(48 x 32 px, the limit is 1535 pixels\)"):
        upscale_video(upscaler, source, tmp_path / "out.mkv", max_pixels=48 * 32 - 1)
    with pytest.raises(OptionError, match="max_pixels"):
        upscale_video(upscaler, source, tmp_path / "out.mkv", max_pixels=-1)
    assert not upscaler.frames
    for limit in (48 * 32, 0, None):
        upscale_video(Doubler(), source, tmp_path / "out.mkv", max_pixels=limit, overwrite=True)


def test_a_clip_too_large_for_its_encoder(tmp_path: Path) -> None:
    source = make(tmp_path / "in.mkv", frames=1, size=(16, 8400), codec="ffv1")
    with pytest.raises(OutputError, match=r"libx264 refuses frames of 16800 x 32 px .*; choose another codec"):
        upscale_video(Doubler(), source, tmp_path / "out.mkv")
    assert upscale_video(Doubler(), source, tmp_path / "out.mkv", codec="hevc").size == (32, 16800)


@pytest.mark.parametrize(("suffix", "size"), [(".ts", 188), (".m2ts", 192)])
def test_a_transport_stream_that_ends_inside_a_packet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, size: int
) -> None:
    source = make(tmp_path / f"in{suffix}", frames=40)
    data = source.read_bytes()
    assert len(data) % size == 0
    upscale_video(Doubler(), source, tmp_path / "whole.mp4")
    assert "cut short" not in caplog.text
    source.write_bytes(data[: len(data) // 2 // size * size + 100])
    assert upscale_video(Doubler(), source, tmp_path / "out.mp4").frames < 40
    assert "ends inside a packet" in caplog.text and "cut short" in caplog.text


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
    join = mux.join
    monkeypatch.setattr(mux, "join", lambda *arguments: join(*arguments) - 1)
    with pytest.raises(OutputError, match="24 frames were decoded and 23 written"):
        upscale_video(Doubler(), make(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob("*.part"))


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

    with pytest.raises(OutputError, match="exists already"):
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
    assert is_video(Path("a.MP4")) and is_video(Path("b.mkv"))
    assert not is_video(Path("a.png")) and not is_video(Path("mp4"))
    assert set(containers.WRITTEN) <= containers.READ
