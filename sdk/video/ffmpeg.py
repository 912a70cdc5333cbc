"""PyAV, which is FFmpeg in Python: imported when first needed, its errors turned into ours."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, ImageError, OutputError

# The containers of containers.READ. Others, as playlists, make FFmpeg open more files than the one it is given.
FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "asf", "flv", "ogg")
WHITELISTS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
MAX_PIXELS = 2**31 - 1  # FFmpeg's own limit


def load() -> Any:
    """Import PyAV. Raises: BackendUnavailable if it is not installed."""
    try:
        import av
    except ImportError as exc:
        raise BackendUnavailable("video needs PyAV: pip install 'sr-sdk[video]'") from exc
    return av


def url(path: Path) -> str:
    """Name a file for FFmpeg, which takes a bare name with a colon, or "-", for something else."""
    return f"file:{os.path.abspath(path)}"


@contextlib.contextmanager
def opened(path: Path, *, max_pixels: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a video and give its container and its video stream, set to tell errors instead of hiding them.

    max_pixels: rough limit of a frame, for what takes memory before its size can be looked at.
    Raises: ImageError if it cannot be opened or has no video; what FFmpeg raises inside the block passes.
    """
    av = load()
    # From PyAV 19 on, metadata that is not UTF-8 never raises.
    lenient = {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}
    # Twice: decoders ask for more than what is shown.
    limits = {"max_pixels": str(min(2 * max_pixels, MAX_PIXELS))} if max_pixels else {}
    with reading(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ImageError(f"{path}: not a file")
        container = av.open(url(path), options=limits, container_options=WHITELISTS, **lenient)
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise ImageError(f"{path}: has no video that can be decoded")
        stream = streams[0]
        if stream.metadata.get("alpha_mode") == "1":
            raise ImageError(f"{path}: video with alpha is not supported; flatten it first")
        # A decoder fills damaged areas with a guess, and drops frames whose references are missing, by default.
        stream.codec_context.options = {"err_detect": "explode", **limits}
        stream.codec_context.flags |= av.codec.context.Flags.output_corrupt
        yield container, stream


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the system and of FFmpeg into ImageError."""
    try:
        yield
    except (load().error.FFmpegError, OSError) as exc:
        raise ImageError(f"{path}: not a video, or damaged ({exc.strerror or exc})") from exc


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the system and of FFmpeg into OutputError."""
    try:
        yield
    except (load().error.FFmpegError, OSError) as exc:
        raise OutputError(f"{path}: cannot be written ({exc.strerror or exc})") from exc
