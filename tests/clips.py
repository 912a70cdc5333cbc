"""Synthetic clips for tests, what is found in a result, and a doubling stand-in for an Upscaler."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sdk.video.clip import probe
from sdk.video.colour import plane_views
from sdk.video.decode import decode

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
    duration: int | None = 1001,
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
            for index, view in enumerate(plane_views(frame)):
                if values is not None:
                    view[:] = values[index]
                else:
                    moved = noise[number % 9 : number % 9 + view.shape[0], number % 7 : number % 7 + view.shape[1]]
                    view[:] = (moved.astype(np.uint16) * (4 if deep else 1)) if index == 0 else (512 if deep else 128)
            frame.pts, frame.time_base = pts[number] if pts else number * 1001, time_base
            if duration is not None:
                frame.duration = duration
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


def rgb(path: Path) -> list[np.ndarray]:
    """Decode all frames to upright RGB."""
    return [frame.pixels for frame in decode(probe(path), lambda index: False) if frame]


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
    return [float(view.mean()) for view in plane_views(frame)]


def pictures(path: Path) -> list[bytes]:
    return [hashlib.sha256(frame.to_ndarray().tobytes()).digest() for frame in decoded(path)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_after(limit: int, error: BaseException) -> Callable[[int], None]:
    def fail(count: int) -> None:
        if count > limit:
            raise error

    return fail


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """End a test that waits for a pipe, or reads a device, for ever."""

    def fail(*_: object) -> None:
        pytest.fail("waits for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
