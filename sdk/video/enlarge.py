"""Enlarge a video: frames are decoded, run in batches and encoded at once; timestamps, sound and subtitles stay.

Encoded frames are kept in a hidden folder beside the result, `.sr-KEY.parts`, until the clip is complete. A call that
was interrupted, even by SIGKILL, is continued by the same call: KEY is made of the source's path, size and time of
change, of the model and of the settings, so that nothing else is ever mixed in. The folder is removed when the result
stands, when the source turns out damaged, and on errors before the first segment was complete; otherwise it stays for
the next call (delete it if there will be none). A finished call removes those of other settings for its result.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files, opening, pipeline
from ..errors import OutputError
from . import ffmpeg, mux
from .clip import Clip, probe
from .containers import check_output
from .decode import Frame, decode
from .encoding import Encoding, choose_encoding
from .parts import SEGMENT, Parts, open_parts

if TYPE_CHECKING:
    from ..upscaler import Upscaler

LOG = logging.getLogger(__name__)
BATCH_PIXELS = 2**26  # of enlarged frames; up to five batches are on their way at once
# How frames are cut follows the free memory, and changes at most 1 code value.
CUTTING = ("one_piece_pixels", "largest_window", "batch")


@dataclass(frozen=True)
class VideoProgress:
    """How far a clip is. frames: done, with those of an earlier call; total: expected; fps: of this call, 0 at first;
    eta_s: seconds left without the final remux, None at first."""

    frames: int
    total: int
    fps: float
    eta_s: float | None


@dataclass(frozen=True)
class VideoReport:
    """What was written. size: (height, width); resumed: frames taken from an earlier call; left_out: streams of the
    source, and metadata of its frames, that are not in the result."""

    frames: int
    size: tuple[int, int]
    codec: str
    pixel_format: str
    resumed: int
    seconds: float
    left_out: tuple[str, ...]


def upscale_video(
    upscaler: Upscaler,
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    crf: int = 16,
    codec: str = "auto",
    max_pixels: int | None = files.MAX_PIXELS,
    progress: Callable[[VideoProgress], None] | None = None,
) -> VideoReport:
    """Enlarge every frame of a video; sound, subtitles, chapters, metadata and timestamps are copied.

    crf: the encoder's quality, 0 (best) to 51, or 63 for vp9. codec: "h264", "hevc", "vp9", or "auto": vp9 in WebM,
    else h264, and hevc for more than 8 bits. max_pixels: larger frames are refused; 0 or None is no limit. progress:
    called in this thread after each batch.
    Matrix and range of the source are used and kept; an untagged source counts as BT.709 from 720 rows on, else as
    BT.601, limited, and the result says so. More than 8 bits run in 16 and come out as 10. Rotated clips come out
    upright. An interrupted call is continued by the same call (see the module).
    Raises: ImageError if the source is no video, damaged, truncated, too large, interlaced or has alpha; OutputError if
    the result cannot be written, its container cannot hold a stream, or another call is at the same clip; OptionError;
    BackendError if the engine fails; BackendUnavailable without PyAV. No partial result stays at dst.
    """
    ffmpeg.load()
    opening.check_max_pixels(max_pixels)
    src, dst = Path(src), Path(dst)
    started = time.monotonic()
    check_output(dst, overwrite=overwrite)
    clip = probe(src, max_pixels=max_pixels)
    encoding = choose_encoding(clip, dst, scale=upscaler.scale, codec=codec, crf=crf)
    headers, left_out = mux.try_headers(clip, encoding, dst)
    for item in left_out:
        LOG.warning("%s: not copied: %s", src, item)
    folder = dst.parent / f".sr-{_key(upscaler, clip, encoding)}.parts"
    with open_parts(folder, dst, clip, encoding, headers) as parts:
        resumed = parts.frames
        if resumed:
            LOG.info("%s: going on with %d of %d frames done", src, resumed, clip.frames)
        frames = _enlarge(upscaler, clip, parts, progress)
        with files.new_file(dst, overwrite=overwrite) as stream:
            try:
                written = mux.join(Path(stream.name), clip, encoding, dst, parts.packets())
            except OutputError as exc:
                refusal = isinstance(exc.__cause__, ffmpeg.load().error.FFmpegError)
                if refusal and not isinstance(exc.__cause__, (OSError, MemoryError)):  # it would come again
                    parts.remove()
                raise
            if not frames == parts.frames == written:
                parts.remove()  # going on from it would end here again
                raise OutputError(f"{dst}: {frames} frames were decoded and {written} written; nothing is kept")
    seconds = time.monotonic() - started
    return VideoReport(
        frames, encoding.size, encoding.codec, encoding.pixel_format, resumed, seconds, left_out + clip.lost
    )


def _key(upscaler: Upscaler, clip: Clip, encoding: Encoding) -> str:
    """Name everything that the encoded frames depend on."""
    status = clip.path.stat()
    source = [str(clip.path.resolve()), status.st_size, status.st_mtime_ns]
    info = sorted((name, value) for name, value in upscaler.info.items() if name not in CUTTING)
    text = repr([2, SEGMENT, source, info, encoding])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _enlarge(upscaler: Upscaler, clip: Clip, parts: Parts, progress: Callable[[VideoProgress], None] | None) -> int:
    """Complete all segments; give the number of frames. Decoder and engine run ahead of the encoder, in threads."""
    height, width = parts.encoding.size
    batch = max(1, min(int(upscaler.info["batch"]), BATCH_PIXELS // (height * width)))
    started, computed, frames = time.monotonic(), 0, 0
    batches = _batches(decode(clip, parts.is_done), batch)

    def compute(taken: list[Frame | None] | None) -> tuple[int, list[Frame]] | None:
        if taken is None:
            return None
        new = [frame for frame in taken if frame is not None]
        large = upscaler.upscale_batch([frame.pixels for frame in new]) if new else []
        return len(taken), [replace(frame, pixels=pixels) for frame, pixels in zip(new, large)]

    def enlarged() -> Generator[Frame, None, None]:
        nonlocal computed, frames
        endless = pipeline.overlap(itertools.count(), decode=lambda _: next(batches, None), compute=compute)
        with closing(batches), closing(endless) as results:
            for _, result in results:
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    return
                yield from result[1]
                frames, computed = frames + result[0], computed + len(result[1])
                if progress:
                    fps = computed / max(time.monotonic() - started, 1e-9)
                    left = max(0, clip.frames - frames)
                    progress(VideoProgress(frames, clip.frames, fps, left / fps if fps else None))

    with closing(enlarged()) as new_frames:
        parts.add(new_frames)
    return frames


def _batches(frames: Generator[Frame | None, None, None], size: int) -> Generator[list[Frame | None], None, None]:
    """Group frames; those done already (None) fill a batch too, so that progress is told while they pass."""
    with closing(frames):
        while batch := list(itertools.islice(frames, size)):
            yield batch
