"""PyAV, which is FFmpeg in Python: imported when first needed, its errors turned into ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, ImageError, OutputError


def load() -> Any:
    """Import PyAV. Raises: BackendUnavailable if it is not installed."""
    try:
        import av
    except ImportError as exc:
        raise BackendUnavailable("video needs PyAV: pip install 'sr-sdk[video]'") from exc
    return av


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video and give its container and its video stream, set to tell errors instead of hiding them.

    Raises: ImageError if it cannot be opened or has no video; what FFmpeg raises inside the block passes.
    """
    av = load()
    # From PyAV 19 on, metadata that is not UTF-8 never raises.
    lenient = {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}
    with reading(path):
        container = av.open(str(path), **lenient)
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            raise ImageError(f"{path}: has no video that can be decoded")
        stream = streams[0]
        if stream.metadata.get("alpha_mode") == "1":
            raise ImageError(f"{path}: video with alpha is not supported; flatten it first")
        # A decoder fills damaged areas with a guess, and drops frames whose references are missing, by default.
        stream.codec_context.options = {"err_detect": "explode"}
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
