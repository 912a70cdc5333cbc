"""Animated GIF, WebP, APNG and AVIF, frame by frame: timing, loops and transparency are kept.

Frames are read and written one after the other, so that memory holds a few of them, whatever their number; only what
libwebp and libavif have encoded stays in memory until the end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import composing, files, gif, opening, pixels, png
from .errors import ImageError, OutputError
from .opening import MAX_PIXELS, Metadata

LOG = logging.getLogger(__name__)
FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
MAX_MS = {"GIF": 10 * gif.MAX_DELAY, "WEBP": (1 << 24) - 1, "PNG": 1000 * png.MAX_DELAY}  # that a frame may stay
SPLITTERS = {"GIF": gif.read_parts, "PNG": png.read_parts}  # those that Pillow composes wrongly


@dataclass(frozen=True)
class Frame:
    """One picture of an animation, whole, as it is seen.

    image: (H, W, 4) uint8 RGBA. milliseconds: how long it stays; 0 is as fast as the viewer can (many take 100).
    """

    image: np.ndarray
    milliseconds: float


@dataclass(frozen=True)
class Animation:
    """An animated file.

    size: (height, width) of its frames. plays: how often all is shown, 0 for ever. kind: Pillow's name of the format.
    orientation: that of EXIF, which is applied to the frames. longest_ms: of the times of the frames, 0 if it is not
    known before they are decoded.
    """

    path: Path
    size: tuple[int, int]
    count: int
    plays: int
    metadata: Metadata
    kind: str
    orientation: int = 1
    max_pixels: int | None = MAX_PIXELS
    longest_ms: float = 0.0

    def frames(self) -> Iterator[Frame]:
        """Decode one frame after the other, each composed with those before it.

        Yields: `count` frames of `size`. Raises: ImageError at one that is damaged or missing.
        """
        pictures = self._pictures()
        for number in range(1, self.count + 1):
            with opening.told(self.path):
                picture = next(pictures, None)
                if picture is None:
                    raise ImageError(f"frame {number} of {self.count} is missing; the file is damaged")
                frame = Frame(opening.turn(picture[0], self.orientation), picture[1])
            yield frame

    def _pictures(self) -> Iterator[tuple[np.ndarray, float]]:
        """Give ((H, W, 4) uint8 RGBA, milliseconds) of each frame, not turned."""
        if self.kind in SPLITTERS:
            size = self.size if self.orientation in opening.SWAPPED else self.size[::-1]
            with opening.open_source(self.path) as stream:
                yield from composing.compose(SPLITTERS[self.kind](stream), size, max_pixels=self.max_pixels)
            return
        with opening.opened(self.path, max_pixels=self.max_pixels) as image:
            for index in range(self.count):
                image.seek(index)
                image.load()
                # The duration after decoding: WebP and AVIF know it no sooner.
                yield np.asarray(image.convert("RGBA")), float(image.info.get("duration") or 0)


def read(path: Path, *, max_pixels: int | None = MAX_PIXELS) -> Animation | None:
    """Open an animated file; None if it holds a still picture (several pages of a TIFF are no animation).

    max_pixels: of one frame; 0 or None is no limit.
    Raises: ImageError if it is missing, damaged, larger than the limit, or an animation in more than 8 bits.
    """
    opening.check_max_pixels(max_pixels)
    with opening.told(path):
        # A TIFF that Pillow does not know is no animation either: files.read tells more.
        if opening.is_tiff(path):
            return None
        with opening.opened(path, max_pixels=max_pixels) as image:
            count = _count(image) if image.format in FORMATS else 1
            times = _read_times(image)
            if len(times) > max(count, 1):
                LOG.warning("%s: %d frames, only the %d that its header tells are read", path, len(times), count)
            if count < 2:
                return None
            if opening.depth(image) > 8:
                raise ImageError("animations of more than 8 bits a channel are not supported; convert it first")
            orientation = image.getexif().get(opening.ORIENTATION, 1)
            size = image.size if orientation in opening.SWAPPED else image.size[::-1]
            longest = max(times[:count], default=0.0)
            metadata = opening.take_metadata(image)
            return Animation(path, size, count, _plays(image), metadata, image.format, orientation, max_pixels, longest)


def check_output(path: Path, size: tuple[int, int], *, overwrite: bool, scale: int = 1) -> None:
    """Refuse a destination for an animation of (height, width) enlarged, before any work is done for it.

    Raises: OutputError.
    """
    files.check_output(path, overwrite=overwrite)
    kind = files.FORMATS[path.suffix.lower()]
    if kind not in FORMATS:
        raise OutputError(f"{path}: {kind} holds no animation; write GIF, WebP, PNG (APNG) or AVIF")
    files.check_side(path, size, scale=scale)


def write(
    path: Path,
    frames: Iterable[Frame],
    *,
    like: Animation,
    overwrite: bool,
    quality: int,
    subsampling: str = "4:4:4",
    lossless: bool = False,
) -> None:
    """Write an animation as its frames come, under a temporary name until all are there.

    frames: RGBA of one size, as many as `like` has; loops, ICC profile and EXIF are taken from `like`.
    quality, subsampling, lossless: as for files.write.
    GIF: each frame gets its own palette, alpha becomes visible or not, times are rounded to 10 ms without drift.
    WebP: libwebp joins equal frames and adds their times. GIF holds neither ICC profile nor EXIF and is brought to
    sRGB; AVIF holds no loops.
    Raises: OutputError if frames are missing, too many or stay too long, or it cannot be written; what `frames` raises
    passes, but for OSError.
    """
    quality = files.check_quality(quality)
    files.check_subsampling(subsampling)
    check_output(path, like.size, overwrite=overwrite)
    kind = files.FORMATS[path.suffix.lower()]
    _check_time(like.longest_ms, kind)
    metadata = files.fit_metadata(path, like.metadata, channels=4)
    counting = _counted(frames, like.count, kind)
    with files.new_file(path, overwrite=overwrite) as stream, files.encoding(path, counting) as counted:
        if kind == "GIF":
            convert = pixels.srgb_converter(like.metadata.icc_profile, name=path)
            gif.write(stream, ((convert(image), duration) for image, duration in counted), plays=like.plays)
        elif kind == "PNG":
            png.write_animation(stream, counted, count=like.count, plays=like.plays, metadata=metadata)
        else:
            options = files.encoder_options(kind, metadata, quality=quality, subsampling=subsampling, lossless=lossless)
            lazy = _LazyFrames(counted, like.count)
            lazy.save(stream, kind, save_all=True, duration=lazy.durations, loop=like.plays, **options)
            next(counted, None)  # raises if there are more


def _count(image: Any) -> int:
    if image.format == "GIF":  # Pillow counts no further than it can read
        return sum(1 for _ in gif.read_parts(image.fp))
    # Pillow counts the picture that an APNG may have for viewers that do not animate.
    return int(getattr(image, "n_frames", 1)) - (image.format == "PNG" and bool(image.info.get("default_image")))


def _read_times(image: Any) -> list[float]:
    if image.format != "PNG":
        return []
    position = image.fp.tell()
    times = png.read_times(image.fp)
    image.fp.seek(position)
    return times


def _check_time(milliseconds: float, kind: str) -> None:
    """Raise OutputError for a frame that stays longer than a format can tell."""
    limit = MAX_MS.get(kind, milliseconds)
    if milliseconds > limit:
        raise OutputError(f"a frame stays {milliseconds / 1000:g} s, and {kind} holds at most {limit / 1000:g} s")


def _plays(image: Any) -> int:
    loop = image.info.get("loop")
    if image.format == "GIF":  # repetitions after the first time, as browsers and libwebp's gif2webp take it
        return 1 if loop is None else loop + 1 if loop else 0
    return loop or 0


def _counted(frames: Iterable[Frame], count: int, kind: str) -> Iterator[tuple[np.ndarray, float]]:
    """Pass on pictures and times of the frames and require that there are `count`, of one size and for a format."""
    number, size = 0, None
    for number, frame in enumerate(frames, 1):
        size = size or frame.image.shape
        if frame.image.dtype != np.uint8 or frame.image.shape != size or size[2:] != (4,):
            raise ImageError(
                f"frame {number} is {frame.image.dtype} {frame.image.shape}, expected uint8 {size[:2]} x 4"
            )
        if number > count:
            raise OutputError(f"more than the {count} frames that were expected; nothing is written")
        _check_time(frame.milliseconds, kind)
        yield frame.image, frame.milliseconds
    if number != count:
        raise OutputError(f"{number} frames instead of {count}; nothing is written")


class _LazyFrames(Image.Image):
    """A picture for Pillow's encoders whose frames come from an iterator when they are sought, once and in order."""

    is_animated = True

    def __init__(self, frames: Iterator[tuple[np.ndarray, float]], count: int):
        super().__init__()
        self.n_frames = count
        self.durations: list[int] = []  # grows with the frames; an encoder looks at one after its frame
        self._frames = frames
        self._elapsed = 0.0
        self._take()

    def seek(self, frame: int) -> None:
        if frame >= self.n_frames:
            raise EOFError
        if frame == len(self.durations):
            self._take()

    def tell(self) -> int:
        return len(self.durations) - 1

    def _take(self) -> None:
        image, milliseconds = next(self._frames)
        picture = Image.fromarray(image)
        self.im, self._mode, self._size = picture.im, picture.mode, picture.size
        self._elapsed += milliseconds
        self.durations.append(round(self._elapsed) - sum(self.durations))  # whole milliseconds, without drift
