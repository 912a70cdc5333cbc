"""How a result is encoded: codec, pixel format, and an encoder set up for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, OptionError, OutputError
from . import ffmpeg
from .clip import Clip
from .colour import FULL, LIMITED
from .containers import written_format

# Codec -> FFmpeg's encoder, its options, its largest crf. Open GOPs would tie a segment's frames to its neighbours.
ENCODERS: dict[str, tuple[str, dict[str, str], int]] = {
    "h264": ("libx264", {"preset": "medium"}, 51),
    "hevc": ("libx265", {"preset": "medium", "x265-params": "open-gop=0:log-level=error"}, 51),
    "vp9": ("libvpx-vp9", {"deadline": "good", "cpu-used": "2", "row-mt": "1", "b": "0"}, 63),
}
# From 33 to 48, x265 writes past its memory and the process dies, in every PyAV from 17.1 to 19.0.
X265_MIN_WIDTH = 64


@dataclass(frozen=True)
class Encoding:
    """How a result is encoded. library: FFmpeg's name of the encoder; size: (height, width)."""

    codec: str
    library: str
    options: dict[str, str]
    pixel_format: str
    size: tuple[int, int]


def choose_encoding(clip: Clip, dst: Path, *, scale: int, codec: str, crf: int) -> Encoding:
    """Decide codec and pixel format. Raises: OptionError; OutputError if the codec cannot hold the clip."""
    if codec != "auto" and codec not in ENCODERS:
        raise OptionError(f"codec {codec!r}: auto or one of {', '.join(ENCODERS)}")
    container, deep = written_format(dst), clip.colour.bits > 8
    if codec == "auto":
        codec = "vp9" if container == "webm" else "hevc" if deep else "h264"
    library, options, largest = ENCODERS[codec]
    if not isinstance(crf, int) or isinstance(crf, bool) or not 0 <= crf <= largest:
        raise OptionError(f"crf {crf!r}: a number from 0 to {largest} for {codec}")
    if codec == "vp9" and clip.aspect not in (None, 1) and container in ("matroska", "webm"):
        # VP9 has no field for it, and PyAV no way to set the container's.
        reason = f"vp9 here holds square pixels only, not {clip.aspect}"
        raise OutputError(f"{dst}: {reason}; use codec h264 and an .mkv file")
    height, width = (side * scale for side in (clip.size[::-1] if clip.transpose else clip.size))
    if codec == "hevc" and width < X265_MIN_WIDTH:
        raise OutputError(f"{dst}: hevc needs {X265_MIN_WIDTH} pixels of width, not {width}; use codec h264")
    chroma = "444" if clip.transpose and clip.chroma == "422" else clip.chroma
    if codec != "vp9" and ((chroma == "420" and height % 2) or (chroma != "444" and width % 2)):
        chroma = "444"  # these encoders take odd sizes only with full chroma
    pixel_format = f"yuv{chroma}p" + ("10le" if deep else "")
    if pixel_format not in _pixel_formats(library):
        raise OutputError(f"{dst}: {library} here has no {pixel_format}; use codec hevc and an .mkv or .mp4 file")
    return Encoding(codec, library, {**options, "crf": str(crf)}, pixel_format, (height, width))


def _pixel_formats(library: str) -> list[str]:
    av = ffmpeg.load()
    try:
        return [each.name for each in av.codec.Codec(library, "w").video_formats or ()]
    except av.codec.codec.UnknownCodecError as exc:
        raise BackendUnavailable(f"this build of PyAV has no {library}; choose another codec") from exc


def configure(context: Any, clip: Clip, encoding: Encoding) -> None:
    """Set up an encoder: the same for every segment and for the stream of the result, which shares their headers."""
    flags = ffmpeg.load().codec.context.Flags
    context.height, context.width = encoding.size
    context.pix_fmt = encoding.pixel_format
    context.time_base, context.framerate = clip.time_base, clip.rate
    if clip.aspect:
        context.sample_aspect_ratio = clip.aspect
    context.colorspace, context.color_range = clip.colour.matrix, FULL if clip.colour.full_range else LIMITED
    context.color_primaries, context.color_trc = clip.colour.primaries, clip.colour.transfer
    context.thread_type = "AUTO"  # PyAV's default cuts every frame into slices
    context.flags |= flags.global_header | flags.frame_duration
    context.options = dict(encoding.options)
