"""Write the container of a result: its enlarged video, and all other streams of the source copied."""

from __future__ import annotations

import contextlib
import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from . import ffmpeg
from .clip import Clip
from .containers import WRITTEN, written_format
from .encoding import Encoding, configure

# Metadata that the muxer makes anew, of the file and (beginnings) of the video.
BRANDS = ("major_brand", "minor_version", "compatible_brands", "encoder")
STALE = ("encoder", "duration", "rotate", "bps", "number_of_", "_statistics")

MIN_TICKS = 10000  # a second, in FFmpeg's MP4 files


@dataclass(frozen=True)
class Output:
    """A container whose headers are written. copied: the source's stream index -> stream; left_out: in words."""

    source: Any
    container: Any
    video: Any
    copied: dict[int, Any]
    left_out: tuple[str, ...]


def try_headers(clip: Clip, encoding: Encoding, dst: Path) -> tuple[str, tuple[str, ...]]:
    """Write headers to memory, to learn early what the container cannot hold.

    Returns: the encoder's headers in hex, and what is left out. Raises: OutputError.
    """
    if written_format(dst) in ("mp4", "mov"):
        _check_pauses(clip, dst)
    with ffmpeg.writing(dst), _opened_output(io.BytesIO(), clip, encoding, dst) as output:
        return (output.video.codec_context.extradata or b"").hex(), output.left_out


def join(path: Path, clip: Clip, encoding: Encoding, dst: Path, packets: Iterable[Any]) -> int:
    """Write encoded packets, and those of the copied streams, to a path from which they will be moved to dst.

    Returns: the video packets of the finished file, as a reader finds them. Raises: ImageError, OutputError.
    """
    with ffmpeg.writing(dst):
        with _opened_output(ffmpeg.url(path), clip, encoding, dst) as output:
            ours = ((packet, output.video) for packet in packets)
            theirs = ((packet, output.copied[packet.stream.index]) for packet in _source_packets(clip, output))
            for packet, stream in heapq.merge(ours, theirs, key=lambda pair: _decoding_time(pair[0])):
                packet.stream = stream
                output.container.mux(packet)
        with ffmpeg.opened(path) as (container, stream):
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))


def _check_pauses(clip: Clip, dst: Path) -> None:
    """Raise OutputError if a frame lasts longer than MP4 can tell: 2^31 ticks, of which FFmpeg takes 10000 a second."""
    ticks = clip.time_base.denominator
    while ticks < MIN_TICKS:
        ticks *= 2
    longest = int(np.diff(clip.pts).max(initial=0)) * clip.time_base
    if longest * ticks >= 2**31:
        raise OutputError(
            f"{dst}: {dst.suffix} files cannot hold a frame of {float(longest):.0f} s; write an .mkv file"
        )


def _decoding_time(packet: Any) -> Fraction:
    return (packet.dts if packet.dts is not None else packet.pts or 0) * Fraction(packet.time_base)


def _source_packets(clip: Clip, output: Output) -> Iterator[Any]:
    """Read the packets of the copied streams. Raises: ImageError, so that its errors are told from ours."""
    if output.copied:
        with ffmpeg.reading(clip.path):
            for packet in output.source.demux([output.source.streams[index] for index in output.copied]):
                if packet.size:
                    yield packet


@contextlib.contextmanager
def _opened_output(target: Any, clip: Clip, encoding: Encoding, dst: Path) -> Iterator[Output]:
    """Open the source, and a container at a path or in memory, and write its headers. Raises: OutputError."""
    av, kind = ffmpeg.load(), written_format(dst)
    # MP4 keeps the start of a stream in ticks of the whole film, 1 ms by default: too coarse for most time bases.
    ticks = clip.time_base.denominator * -(-1000 // clip.time_base.denominator)
    options = {"movie_timescale": str(ticks)} if kind in ("mp4", "mov") else {}
    with (
        ffmpeg.opened(clip.path, max_pixels=clip.max_pixels) as (source, _),
        av.open(target, "w", format=kind, container_options=options) as container,
    ):
        video: Any = None
        copied, left_out = {}, []
        for stream in source.streams:  # in their order
            if stream.index == clip.stream:
                video = _add_video(container, stream, clip, encoding, dst)
            elif stream.type == "data" and stream.name == "bin_data" and source.chapters():
                pass  # the chapters' titles, as MP4 stores them
            elif copy := _add_copy(container, stream, dst):
                copied[stream.index] = copy
            else:
                left_out.append(_describe(stream))
        container.metadata.update({key: text for key, text in source.metadata.items() if key.lower() not in BRANDS})
        container.set_chapters(source.chapters())
        try:
            video.codec_context.open()
        except (av.error.FFmpegError, ValueError) as exc:
            height, width = encoding.size
            text = f"{encoding.library} refuses frames of {width} x {height} px in {encoding.pixel_format}"
            reason = getattr(exc, "strerror", None) or exc
            raise OutputError(f"{dst}: {text} ({reason}); choose another codec or a smaller source") from exc
        try:
            container.start_encoding()
        except (av.error.FFmpegError, ValueError) as exc:
            names = ", ".join(_describe(source.streams[index]) for index in copied) or "these settings"
            raise OutputError(f"{dst}: the container refuses {names} ({exc}); write an .mkv file") from exc
        yield Output(source, container, video, copied, tuple(left_out))


def _add_video(container: Any, stream: Any, clip: Clip, encoding: Encoding, dst: Path) -> Any:
    try:
        video = container.add_stream(encoding.library, rate=clip.rate)
    except ValueError as exc:
        raise OutputError(f"{dst}: {dst.suffix} files do not hold {encoding.codec}; write an .mkv file") from exc
    configure(video.codec_context, clip, encoding)
    video.time_base = clip.time_base
    if encoding.codec == "hevc" and written_format(dst) != "matroska":
        video.codec_context.codec_tag = "hvc1"  # Apple's players know no other
    video.metadata.update({key: text for key, text in stream.metadata.items() if not key.lower().startswith(STALE)})
    video.disposition = stream.disposition
    return video


def _add_copy(container: Any, stream: Any, dst: Path) -> Any:
    """Add a stream to hold a copy of the source's; None for covers, fonts and data that the container cannot hold.

    Raises: OutputError for sound or subtitles that it cannot hold.
    """
    av, kind = ffmpeg.load(), written_format(dst)
    needed = stream.type in ("audio", "subtitle")
    is_cover = stream.type == "video" and stream.disposition & av.stream.Disposition.attached_pic
    if not needed and not (is_cover and kind == "mp4") and not (stream.type == "attachment" and kind == "matroska"):
        return None
    try:
        copy = container.add_stream_from_template(stream, opaque=True)
    except (av.error.FFmpegError, ValueError) as exc:
        if not needed:
            return None
        able = " or ".join(_able_containers(stream))
        advice = f"write {able}" if able else "remove it from the source"
        raise OutputError(f"{dst}: {dst.suffix} files cannot hold {_describe(stream)}; {advice}") from exc
    copy.metadata.update(stream.metadata)
    copy.disposition = stream.disposition
    return copy


def _able_containers(stream: Any) -> list[str]:
    """List the suffixes whose containers hold a copy of a stream."""
    av, able = ffmpeg.load(), []
    for suffix in (".mkv", ".mp4", ".mov", ".webm"):
        with (
            av.open(io.BytesIO(), "w", format=WRITTEN[suffix]) as container,
            contextlib.suppress(av.error.FFmpegError, ValueError),
        ):
            container.add_stream_from_template(stream, opaque=True)
            able.append(suffix)
    return able


def _describe(stream: Any) -> str:
    name = stream.codec_context.name if stream.codec_context else stream.name
    return f"stream {stream.index} ({stream.type}, {name or 'unknown codec'})"
