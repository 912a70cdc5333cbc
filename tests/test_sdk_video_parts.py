"""Video: segments that join, runs that are interrupted and go on, folders that are locked or planted, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from clips import (  # noqa: F401 - two are fixtures
    Doubler,
    make,
    names,
    no_thread_is_left,
    no_waiting,
    packets,
    pictures,
    rgb,
    stop_after,
    times,
)

from sdk import BackendError, OutputError, Upscaler
from sdk.video import VideoProgress, folder, mux, parts, upscale_video

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SEGMENT", 8)


def interrupted(source: Path, target: Path, **options: Any) -> Path:
    """Run until some segments are complete; give their folder."""
    before = set(target.parent.glob(".sr-*.parts"))
    with pytest.raises(BackendError):
        upscale_video(Doubler(fail=stop_after(25, BackendError("no more"))), source, target, **options)
    (made,) = set(target.parent.glob(".sr-*.parts")) - before
    assert {"000000.json", "000001.json"} <= set(names(made))
    return made


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_segments_join_into_a_clip_that_decodes(tmp_path: Path, codec: str, short_segments: None) -> None:
    """Every frame shows its own picture: what was joined is compared with frames encoded in one piece."""
    source = make(tmp_path / "in.mkv", frames=25)
    report = upscale_video(Doubler(), source, tmp_path / "out.mkv", codec=codec, crf=10)
    assert report.frames == 25 and report.codec == codec
    for got, expected in zip(rgb(tmp_path / "out.mkv"), rgb(source), strict=True):
        # Neighbouring frames differ by more than 20 on average: a swap would be seen.
        assert abs(got[::2, ::2].astype(int) - expected).mean() < 6


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


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from sdk import Upscaler, video
    from sdk.video import parts

    class Killed(Upscaler):
        count = 0

        def upscale_batch(self, images):
            Killed.count += len(images)
            if Killed.count > 30:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().upscale_batch(images)

    model, source, target = sys.argv[1:]
    parts.SEGMENT = 8
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
    assert upscale_video(Doubler(), source, tmp_path / "1.mp4", crf=20).resumed == 0
    other = Doubler()
    other.info["model"] = "another"
    assert upscale_video(other, source, tmp_path / "2.mp4").resumed == 0
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert upscale_video(Doubler(), source, tmp_path / "3.mp4").resumed == 0
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    cut_otherwise = Doubler(batch=3)
    cut_otherwise.info |= {"one_piece_pixels": 2, "largest_window": (1, 2)}  # the memory that is free differs
    assert upscale_video(cut_otherwise, source, target).resumed >= 16


def test_a_finished_result_removes_what_other_settings_left_for_it(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    interrupted(source, target, crf=20)
    interrupted(source, target, crf=21)
    kept = interrupted(source, tmp_path / "other.mp4", crf=22)
    locked = interrupted(source, target, crf=23)
    with folder.open_folder(locked):
        upscale_video(Doubler(), source, target)
    assert names(tmp_path) == sorted(["in.mp4", "out.mp4", kept.name, locked.name])


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


@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The first segment, its list."""
    calls, sync = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    source = make(tmp_path / "in.mp4")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mp4"]


@pytest.mark.parametrize(("limit", "crf"), [(1000, 16), (1000, 0), (5000, 0)])
def test_a_disk_that_fills_while_encoding(tmp_path: Path, limit: int, crf: int) -> None:
    """Buffers are written when the file is closed, too."""
    source = make(tmp_path / "in.mp4")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="too large"):
            upscale_video(Doubler(), source, tmp_path / "out.mp4", crf=crf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["in.mp4"]


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "h264"), (".mkv", "h264"), (".webm", "vp9")])
@pytest.mark.parametrize("share", [0.6, 0.99])
def test_a_disk_that_fills_while_joining_keeps_the_segments(
    tmp_path: Path, short_segments: None, suffix: str, codec: str, share: float
) -> None:
    """The limit of a file's size lies above every segment, and below the result: FFmpeg's own writes fail."""
    source = make(tmp_path / "in.mp4", frames=40)
    upscale_video(Doubler(), source, tmp_path / f"whole{suffix}", crf=0, codec=codec)
    limit = int((tmp_path / f"whole{suffix}").stat().st_size * share)
    (tmp_path / f"whole{suffix}").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="too large"):
            upscale_video(Doubler(), source, tmp_path / f"out{suffix}", crf=0, codec=codec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = tmp_path.glob(".sr-*.parts")
    assert names(tmp_path) == [folder.name, "in.mp4"]
    again = Doubler()
    assert (
        upscale_video(again, source, tmp_path / f"out{suffix}", crf=0, codec=codec).resumed == 40 and not again.frames
    )


def test_a_refused_container_keeps_earlier_work(tmp_path: Path, short_segments: None) -> None:
    source = make(tmp_path / "in.mkv", frames=30, subtitles="subrip")
    with pytest.raises(BackendError):
        upscale_video(Doubler(fail=stop_after(25, BackendError("no more"))), source, tmp_path / "out.mkv")
    with pytest.raises(OutputError, match="subtitle"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert upscale_video(Doubler(), source, tmp_path / "out.mkv").resumed >= 16


SECOND = """
    import sys
    from clips import Doubler
    from sdk.video import upscale_video

    upscale_video(Doubler(), *sys.argv[1:])
"""


def test_a_second_process_at_the_same_clip_is_refused(tmp_path: Path) -> None:
    """It leaves the first one's work alone. That a killed process leaves no lock is seen above."""
    source, target = make(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    command = [sys.executable, "-c", textwrap.dedent(SECOND), str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    errors: list[str] = []

    def start_another(count: int) -> None:
        if count == 3:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            errors.append(result.stderr.strip().splitlines()[-1])
        if count == 5:
            with pytest.raises(OutputError, match="another call"):
                upscale_video(Doubler(), source, target)

    assert upscale_video(Doubler(fail=start_another), source, target).frames == 24
    (error,) = errors
    assert error.startswith("sdk.errors.OutputError: ") and "another call is enlarging the same clip" in error
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


def test_links_that_another_user_planted_are_not_followed(tmp_path: Path, short_segments: None) -> None:
    source, target, victim = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4", tmp_path / "victim"
    victim.write_text("precious")
    hidden = interrupted(source, target)
    for name in ("000000.packets", "000000.json", "000003.packets", "000003.json", "target"):
        (hidden / name).unlink(missing_ok=True)
        (hidden / name).symlink_to(victim)
    assert upscale_video(Doubler(), source, target).frames == 30
    assert victim.read_text() == "precious"
    assert names(tmp_path) == ["in.mp4", "out.mp4", "victim"]


@pytest.mark.usefixtures("no_waiting")
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    hidden = interrupted(source, target)
    (hidden / "lock").unlink()
    (hidden / "lock").symlink_to(tmp_path / "new")
    with pytest.raises(OutputError, match="lock: cannot be written"):
        upscale_video(Doubler(), source, target)
    (hidden / "lock").unlink()
    os.mkfifo(hidden / "lock")
    with pytest.raises(OutputError, match="lock: cannot be written"):
        upscale_video(Doubler(), source, target)
    assert names(tmp_path) == [hidden.name, "in.mp4"]


@pytest.mark.parametrize("kind", ["link", "file", "writable by others", "of another user"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, short_segments: None, kind: str) -> None:
    source, target, other = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4", tmp_path / "other"
    hidden = interrupted(source, target)
    assert hidden.stat().st_mode & 0o777 == 0o700
    if kind == "link":
        hidden.rename(other)
        hidden.symlink_to(other)
    elif kind == "file":
        hidden.rename(other)
        hidden.write_text("")
    elif kind == "writable by others":
        hidden.chmod(0o770)
    elif os.geteuid() == 0:
        os.chown(hidden, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    inside = {path: path.read_bytes() for path in [*hidden.glob("*"), *other.glob("*")]}
    with pytest.raises(OutputError, match="not a folder of this user alone"):
        upscale_video(Doubler(), source, target)
    assert inside == {path: path.read_bytes() for path in inside} and not target.exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_system_without_owners_is_no_obstacle(
    tmp_path: Path, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a stick with exFAT: whatever rights a folder is made with, all may write in it."""
    make_folder = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: (make_folder(path), path.chmod(0o777))[0])
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    assert interrupted(source, target).stat().st_mode & 0o777 == 0o777
    assert upscale_video(Doubler(), source, target).resumed >= 16


PACKET = [0, 1001, 1, True]


@pytest.mark.parametrize(
    "packets",
    [
        "deep", "cut", [], {}, {"a": 1}, None, [1, 2], ["ab"], [[1, 2]], [[*PACKET, 1]], [PACKET] * 8,
        [["x", 1, 1, True]], [[None, 1, 1, True]], [[0.5, 1, 1, True]], [[0, None, 1, True]], [[0, 1, 1, 1]],
        [[0, 1, True, True]], [[0, 1, -1, True]], [[0, 1, 2**62, True]], [[2**70, 1, 1, True]], [[0, 2**70, 1, True]],
        [[0, -1, 1, True]], [[5, 1001, 1, True]], [[1001 * number, 1001, 1, True] for number in range(9)],
        [[1001 * number, 1001, 1, True] for number in range(7)],
        [[1001 * number, 1001, 1, True] for number in range(8)],
    ],
    ids=lambda packets: str(packets)[:24],
)  # fmt: skip
def test_lists_that_do_not_fit_are_made_again(tmp_path: Path, short_segments: None, packets: Any) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    hidden = interrupted(source, target)
    text = (hidden / "000000.json").read_text()
    if packets == "deep":
        text = "[" * 100_000
    elif packets == "cut":
        text += " " * parts.MAX_LISTING_BYTES
        text = text[:1] + text[1:].rjust(len(text) + 10)
    else:
        text = json.dumps({**json.loads(text), "packets": packets, "sha256": hashlib.sha256(b"x").hexdigest()})
        (hidden / "000000.packets").write_bytes(b"x")
    (hidden / "000000.json").write_text(text)
    again = Doubler()
    report = upscale_video(again, source, target, crf=16)
    assert report.frames == 30 == report.resumed + len(again.frames) and report.resumed >= 8
    assert times(target) == times(source) and names(tmp_path) == ["in.mp4", "out.mp4"]


@pytest.mark.parametrize(
    "name", ["-1.json", "-00001.json", "000099.json", "x.json", "00000\u0663.json", "9" * 200 + ".json"]
)
def test_lists_of_no_segment_are_ignored(tmp_path: Path, short_segments: None, name: str) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    hidden = interrupted(source, target)
    (hidden / name).write_bytes((hidden / "000000.json").read_bytes())
    (hidden / name).with_suffix(".packets").write_bytes((hidden / "000000.packets").read_bytes())
    assert upscale_video(Doubler(), source, target).frames == 30
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


@pytest.mark.usefixtures("no_waiting")
def test_segments_that_are_pipes_or_devices_are_made_again(tmp_path: Path, short_segments: None) -> None:
    source, target = make(tmp_path / "in.mp4", frames=30), tmp_path / "out.mp4"
    hidden = interrupted(source, target)
    for name in ("000000.json", "000001.packets"):
        (hidden / name).unlink()
        os.mkfifo(hidden / name)
    (hidden / "000002.packets").unlink(missing_ok=True)
    (hidden / "000002.packets").symlink_to("/dev/zero")
    again = Doubler()
    assert upscale_video(again, source, target).frames == 30 == len(again.frames)
    assert names(tmp_path) == ["in.mp4", "out.mp4"]


def test_timestamps_that_a_container_refuses_keep_nothing(tmp_path: Path, short_segments: None) -> None:
    """MP4 counts 2^31 ticks from frame to frame: said before any frame is computed, where packets tell."""
    pts = [*range(20), 2**40]
    source = make(tmp_path / "in.mkv", frames=21, pts=pts, time_base=Fraction(1, 24), codec="ffv1")
    upscaler = Doubler()
    with pytest.raises(OutputError, match=r"cannot hold a frame of \d+ s; write an .mkv file"):
        upscale_video(upscaler, source, tmp_path / "out.mp4")
    assert not upscaler.frames and names(tmp_path) == ["in.mkv"]
    assert upscale_video(upscaler, source, tmp_path / "out.mkv").frames == 21


def test_a_clip_that_ffmpeg_refuses_at_the_end_keeps_nothing(
    tmp_path: Path, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mux, "_check_pauses", lambda *_: None)
    source = make(tmp_path / "in.mkv", frames=21, pts=[*range(20), 2**40], time_base=Fraction(1, 24), codec="ffv1")
    with pytest.raises(OutputError, match="cannot be written"):
        upscale_video(Doubler(), source, tmp_path / "out.mp4")
    assert names(tmp_path) == ["in.mkv"]
