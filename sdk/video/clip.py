"""What is to be known of a clip before its frames are run: all its packets are read once, and its first frame."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .. import opening
from ..errors import ImageError
from . import ffmpeg
from .colour import UNSPECIFIED, Colour, read_colour

LOG = logging.getLogger(__name__)
# Codecs with one packet for every picture shown: a packet without its frame is a loss.
ONE_TO_ONE = {"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg", "prores", "ffv1", "dnxhd", "mpeg1video", "mpeg2video"}
# What a frame may carry that is not in the result.
LOST = {
    "A53_CC": "closed captions inside the video",
    "MASTERING_DISPLAY_METADATA": "HDR10 mastering metadata",
    "CONTENT_LIGHT_LEVEL": "HDR10 light levels",
    "DYNAMIC_HDR_PLUS": "HDR10+ metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
}


@dataclass(frozen=True)
class Clip:
    """A source.

    stream: index of its video. size: (height, width) as stored; transpose, flip_rows, flip_columns: what turns it
    upright, in this order. frames: expected. pts: of the frames to be shown, in time_base, rising; empty where packets
    do not tell. chroma: like "420". lost: what its frames carry that the result cannot. max_pixels: rough limit of a
    frame, None for none.
    """

    path: Path
    stream: int
    size: tuple[int, int]
    frames: int
    pts: np.ndarray = field(repr=False)
    time_base: Fraction
    rate: Fraction
    aspect: Fraction | None
    transpose: bool
    flip_rows: bool
    flip_columns: bool
    chroma: str
    colour: Colour
    lost: tuple[str, ...]
    max_pixels: int | None


def probe(path: Path, *, max_pixels: int | None = opening.MAX_PIXELS) -> Clip:
    """Read what is to be known of a clip.

    max_pixels: largest frame that is decoded; 0 or None is no limit.
    Raises: ImageError if the file is missing, has no video, is truncated, or holds what cannot be enlarged.
    """
    with ffmpeg.reading(path), ffmpeg.opened(path, max_pixels=max_pixels) as (container, stream):
        _check_size(path, stream, max_pixels)
        pts, frames = _scan(path, container, stream)
    with ffmpeg.reading(path), ffmpeg.opened(path, max_pixels=max_pixels) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise ImageError(f"{path}: none of its {frames} frames can be decoded")
        _check_size(path, first, max_pixels)
        side_data = first.side_data
        if "DOVI_METADATA" in side_data and first.colorspace == UNSPECIFIED:
            raise ImageError(f"{path}: Dolby Vision without a base in known colours (profile 5) is not supported")
        transpose, flip_rows, flip_columns = _orientation(path, side_data.get("DISPLAYMATRIX"))
        aspect = Fraction(stream.sample_aspect_ratio or 0)
        lost = tuple(text for name, text in LOST.items() if name in side_data)
        for text in lost:
            LOG.warning("%s: not kept: %s", path, text)
        bits = max(component.bits for component in first.format.components)
        if bits > 10:
            LOG.warning("%s: its %d bits come out as 10", path, bits)
        return Clip(
            path=path,
            stream=stream.index,
            size=(first.height, first.width),
            frames=frames,
            pts=pts,
            time_base=Fraction(stream.time_base),
            rate=Fraction(stream.average_rate or stream.guessed_rate or 25),
            aspect=(1 / aspect if transpose else aspect) if aspect else None,
            transpose=transpose,
            flip_rows=flip_rows,
            flip_columns=flip_columns,
            chroma=_chroma(first.format),
            colour=read_colour(first, name=str(path)),
            lost=lost,
            max_pixels=max_pixels,
        )


def format_time(pts: int | None, time_base: Any) -> str:
    """Write a timestamp in seconds, for messages."""
    return "time unknown" if pts is None else f"{float(pts * time_base):.3f} s"


def _check_size(path: Path, frame: Any, max_pixels: int | None) -> None:
    with opening.told(path):
        opening.check_size((frame.width, frame.height), max_pixels)


def _scan(path: Path, container: Any, stream: Any) -> tuple[np.ndarray, int]:
    """Read all packets without decoding: give the rising pts of the frames to be shown, and their number.

    Raises: ImageError if the file ends before its headers say; FFmpeg reads such a file to its end and is content.
    Transport streams have no such headers: there is a warning if one ends inside a packet.
    """
    pts: list[int | None] = []
    packets, end_s = 0, 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None:
            end_s = max(end_s, float((at + (packet.duration or 0)) * packet.time_base))
        if packet.is_corrupt:
            raise ImageError(f"{path}: truncated or damaged at {format_time(at, packet.time_base)}")
        if packet.stream.index == stream.index:
            packets += 1
            if not packet.is_discard:  # hidden by an edit list
                pts.append(packet.pts)
    promised_s = (container.duration or 0) / 1e6
    if container.format.name.startswith("mov"):
        is_cut = packets < len(stream.index_entries)
    elif container.format.name.startswith("matroska"):
        is_cut = _missing_bytes(path) > 0
    else:
        is_cut = end_s < promised_s - 1  # durations in headers are rough, and hold the padding of sound
    if is_cut:
        text = f"it ends at {end_s:.2f} s, after {packets} frames; its header promises {promised_s:.2f} s"
        raise ImageError(f"{path}: truncated: {text}; if it is whole, remux it (ffmpeg -i IN -c copy OUT.mkv)")
    if not pts:
        raise ImageError(f"{path}: its video stream is empty")
    if container.format.name == "mpegts" and _ends_inside_packet(path):
        LOG.warning("%s: ends inside a packet, after %d frames: it may be cut short", path, packets)
    known = [value for value in pts if value is not None]
    complete = len(known) == len(pts) and stream.codec_context.name in ONE_TO_ONE
    return np.array(sorted(known) if complete else [], np.int64), len(pts)


def _missing_bytes(path: Path) -> int:
    """Compare the size that a Matroska file gives for itself with the file's (RFC 8794, 9559); 0 if it gives none."""

    def number(at: int) -> tuple[int, int, bool]:
        length = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        return at + length, value, value == (1 << 7 * length) - 1

    with open(path, "rb") as stream:
        head = stream.read(4096)
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    at, size, _ = number(4)
    if head[at + size : at + size + 4] != b"\x18\x53\x80\x67":
        return 0
    at, size, unknown = number(at + size + 4)
    return 0 if unknown else at + size - path.stat().st_size


def _ends_inside_packet(path: Path) -> bool:
    """Tell whether a transport stream ends inside one of its packets, of 188 bytes or a few more (ISO 13818-1)."""
    with open(path, "rb") as stream:
        head = stream.read(4096)
    for size, before in ((188, 0), (192, 4), (204, 0)):
        if len(head) > 4 * size and set(head[before : before + 4 * size : size]) == {0x47}:
            return path.stat().st_size % size > 0
    return False  # begins inside one itself, as a recording may


def _orientation(path: Path, matrix: Any) -> tuple[bool, bool, bool]:
    """Turn a display matrix into (transpose, flip rows, flip columns).

    matrix: nine int32 [a b u c d v x y w] with x' = a x + c y, y' = b x + d y, or None.
    """
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    raise ImageError(f"{path}: turned by an angle that is not a multiple of 90 degrees")


def _chroma(pixel_format: Any) -> str:
    """Name the chroma of the result: grey as 420, and a subsampling that no encoder here has as the next finer one."""
    halves = pixel_format.chroma_width(64) < 64, pixel_format.chroma_height(64) < 64
    if len(pixel_format.components) == 1 or halves == (True, True):
        return "420"
    return "422" if halves[0] else "444"
