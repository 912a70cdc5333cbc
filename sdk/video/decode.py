"""Decode a clip: upright RGB frames in order, each of them or an error."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ImageError
from . import ffmpeg
from .clip import Clip, format_time
from .colour import read_colour, to_rgb

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """A frame: pts and duration in the clip's time_base; pixels (H, W, 3) uint8 or uint16 RGB, upright."""

    index: int
    pts: int
    duration: int
    pixels: np.ndarray


def decode(clip: Clip, is_done: Callable[[int], bool]) -> Generator[Frame | None, None, None]:
    """Decode all frames in order; those that are done already come as None.

    Raises: ImageError that says at which frame the source broke.
    """
    av = ffmpeg.load()
    reformatter = av.video.reformatter.VideoReformatter()
    index, last, skipped = -1, None, 0
    with ffmpeg.reading(clip.path), ffmpeg.opened(clip.path, max_pixels=clip.max_pixels) as (container, stream):
        try:
            for index, frame in enumerate(container.decode(stream)):
                where = f"{clip.path}: frame {index} ({format_time(frame.pts, clip.time_base)})"
                _check(frame, clip, last, where)
                if index == 0 and clip.pts.size:
                    skipped = bisect_left(clip.pts, frame.pts)
                    if skipped:
                        LOG.warning("%s: the first %d frames need ones before the beginning", clip.path, skipped)
                if clip.pts.size and (index + skipped >= clip.pts.size or frame.pts != clip.pts[index + skipped]):
                    raise ImageError(f"{where} does not follow the one before: a frame between them is damaged")
                last = frame.pts
                if is_done(index):
                    yield None
                else:
                    colour = replace(read_colour(frame, name=where), bits=clip.colour.bits)
                    pixels = _turn_upright(to_rgb(frame, colour, reformatter), clip)
                    yield Frame(index, frame.pts, frame.duration or 0, pixels)
        except av.error.FFmpegError as exc:
            after = "" if last is None else f" ({format_time(last, clip.time_base)})"
            raise ImageError(f"{clip.path}: damaged after frame {index}{after}: {exc.strerror}") from exc
    if clip.pts.size and index + 1 + skipped != clip.pts.size:
        raise ImageError(f"{clip.path}: only {index + 1} of {clip.pts.size - skipped} frames can be decoded")


def _check(frame: Any, clip: Clip, last: int | None, where: str) -> None:
    """Raise ImageError for a frame that cannot be enlarged. last: pts of the frame before."""
    if frame.is_corrupt:
        raise ImageError(f"{where} is damaged")
    if frame.interlaced_frame:
        raise ImageError(f"{where} is interlaced; deinterlace first (ffmpeg -i IN -vf bwdif -crf 0 OUT)")
    if (frame.height, frame.width) != clip.size:
        raise ImageError(f"{where} is {frame.width}x{frame.height}, the first one {clip.size[::-1]}")
    if frame.pts is None or (last is not None and frame.pts <= last):
        raise ImageError(f"{where} has no later timestamp than the one before; remux the file first")


def _turn_upright(pixels: np.ndarray, clip: Clip) -> np.ndarray:
    if clip.transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if clip.flip_rows else 1, :: -1 if clip.flip_columns else 1])
