"""One file in, one file out: stills, animations and very large pictures; of many files the steps overlap."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import animation, compare, files, large, memory, pipeline, pixels, resize, vips
from .animation import Animation, Frame
from .errors import ImageError, OutOfMemory, SRError
from .files import MAX_PIXELS, Metadata
from .stats import Meter, Progress, Stats, shape_pixels

if TYPE_CHECKING:
    from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
FRAME_PIXEL_BYTES = 4  # of an animation's frame, RGBA
MAX_ENCODERS = 4  # threads; each holds one result


@dataclass(frozen=True)
class Options:
    """How files are enlarged and written.

    quality: of JPEG, WebP and AVIF. subsampling: of the colour of JPEG and AVIF. lossless: of WebP. factor, size:
    as for Upscaler.upscale. max_pixels: of a source, max_result_pixels: of a result, or of a frame of one; 0 or None is
    no limit.
    """

    overwrite: bool = False
    quality: int = 95
    subsampling: str = "4:4:4"
    lossless: bool = False
    factor: float | None = None
    size: tuple[int | None, int | None] | None = None
    tile: int | None = None
    max_pixels: int | None = MAX_PIXELS
    max_result_pixels: int | None = None


@dataclass(frozen=True)
class Job:
    """One picture to enlarge: from `source` to `target`, and a comparison to `panel`."""

    source: Path
    target: Path
    panel: Path | None = None

    @property
    def targets(self) -> list[Path]:
        """List the files that will be written."""
        return [self.target, self.panel] if self.panel else [self.target]


@dataclass(frozen=True)
class Enlarged:
    """What a job has still to write.

    picture: with its metadata; None if it went out in frames or bands. shown: a picture before and after, for the
    panel, and the ICC profile of both. spent: up to now; None if it is in the totals already.
    """

    picture: tuple[np.ndarray, Metadata] | None = None
    shown: tuple[np.ndarray, np.ndarray] | None = None
    profile: bytes | None = None
    spent: Stats | None = None


def run_file(upscaler: Upscaler, job: Job, options: Options, *, progress: Progress | None = None) -> None:
    """Enlarge one file. Raises: SRError, and what `progress` raises; no partial file stays."""
    steps = Steps(upscaler, options, progress)
    steps.encode(job, steps.decode(job)())


def run_files(
    upscaler: Upscaler, jobs: Iterable[Job], options: Options
) -> Generator[tuple[Job, SRError | None], None, None]:
    """Enlarge many files; yield each job in order, with its error if it failed."""
    steps = Steps(upscaler, options)
    encoders = min(MAX_ENCODERS, _cores())
    work = pipeline.overlap(
        jobs, decode=steps.decode, compute=lambda enlarge: enlarge(), encode=steps.encode, encoders=encoders
    )
    with closing(work) as results:
        yield from results


def _cores() -> int:
    """Count the cores that this process may use; containers have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Steps:
    """The three steps of a file; the second is to call what the first gives.

    What comes in frames or bands is written in the second, too: only one of them is under way at a time.
    """

    upscaler: Upscaler
    options: Options
    progress: Progress | None = None

    def decode(self, job: Job) -> Callable[[], Enlarged]:
        """Read a still picture, or open an animation; refuse what cannot be done before the work.

        Returns: what enlarges it, and writes what comes in frames or bands.
        """
        options, meter = self.options, Meter()
        files.check_quality(options.quality)
        files.check_subsampling(options.subsampling)
        # What exists already is refused first; what is no picture is told before a wrong destination.
        for target in filter(os.path.lexists, job.targets):
            files.check_output(target, overwrite=options.overwrite)
        if self._is_streamed(job):
            self._check_result(job, self._target_size(large.read_header(job.source, max_pixels=None).size))
            return partial(self._stream, job)
        with meter.part("decode"):
            moving = animation.read(job.source, max_pixels=options.max_pixels)
        if moving:
            wanted = self._check(job, moving.size, FRAME_PIXEL_BYTES)
            animation.check_output(job.target, wanted, overwrite=options.overwrite)
            return partial(self._enlarge_frames, job, moving, meter.stats(pictures=0))
        with meter.part("decode"):
            image, metadata = files.read(job.source, max_pixels=options.max_pixels)
        wanted = self._check(job, image.shape[:2], image.nbytes // shape_pixels(image))
        files.check_format(job.target, image, scale=1)
        files.check_side(job.target, wanted, scale=1)
        return partial(self._enlarge_still, job, image, metadata, meter.stats(pictures=0))

    def encode(self, job: Job, enlarged: Enlarged) -> None:
        """Write what is not written yet: a still picture, and the panel."""
        options, meter = self.options, Meter()
        with meter.part("encode"):
            if enlarged.picture:
                image, metadata = enlarged.picture
                files.write(job.target, image, metadata, **self._how())
            if enlarged.shown and job.panel:
                panel, profile = _panel(job.panel, *enlarged.shown), enlarged.profile
                if profile and not pixels.fits_profile(profile, "RGB"):  # one of grey, and the panel is RGB
                    profile = None
                files.write(job.panel, panel, Metadata(profile), quality=options.quality, overwrite=options.overwrite)
        if enlarged.spent:
            self.upscaler.record(enlarged.spent + meter.stats(pictures=0))

    def _is_streamed(self, job: Job) -> bool:
        """Tell whether a picture is so large that it is better read and written in bands, and can be."""
        if not large.is_large(job.source, job.target, scale=self.upscaler.scale, max_pixels=self.options.max_pixels):
            return False
        obstacle = self._obstacle(job)
        if obstacle:
            LOG.warning("%s: needs much memory; %s", job.source, obstacle)
        return obstacle is None

    def _obstacle(self, job: Job) -> str | None:
        """Say why a large picture cannot be streamed."""
        options, scale = self.options, self.upscaler.scale
        if not vips.is_installed():
            return "pip install 'sr-sdk[large]' to have it streamed"
        if job.panel:
            return "without a comparison it would be streamed"
        if files.FORMATS[job.target.suffix.lower()] == "JPEG" and options.subsampling not in large.SUBSAMPLE:
            return f"with a subsampling of {' or '.join(large.SUBSAMPLE)} it would be streamed"
        if options.factor is not None or options.size is not None:
            height, width = large.read_header(job.source, max_pixels=None).size
            if self._target_size((height, width)) != (height * scale, width * scale):
                return f"{scale} times as large it would be streamed"
        return None

    def _target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        options = self.options
        return resize.target_size(size, scale=self.upscaler.scale, factor=options.factor, size_wanted=options.size)

    def _check(self, job: Job, size: tuple[int, int], pixel_bytes: int) -> tuple[int, int]:
        """Refuse a size or destination that cannot be; give the size of the result."""
        wanted, scale = self._target_size(size), self.upscaler.scale
        self._check_result(job, wanted)
        grown = scale ** resize.count_passes(size, wanted, scale=scale)
        # Without a pass the picture itself, which is there already, would be the larger one.
        height, width = max((size[0] * grown, size[1] * grown), wanted, key=math.prod) if grown > 1 else wanted
        needed, free = height * width * pixel_bytes, memory.free_bytes()
        if needed > free:
            raise ImageError(
                f"{job.source}: {width} x {height} pixels, which it is enlarged to, take {needed >> 20} MiB of memory, "
                f"and {free >> 20} MiB are free; ask for a smaller factor or size"
            )
        for target in job.targets:
            files.check_output(target, overwrite=self.options.overwrite)
        return wanted

    def _check_result(self, job: Job, wanted: tuple[int, int]) -> None:
        """Raises: ImageError if the result would be larger than the limit."""
        limit = self.options.max_result_pixels
        if limit and math.prod(wanted) > limit:
            height, width = wanted
            raise ImageError(
                f"{job.source}: would become {width} x {height} pixels, and results have at most {limit} pixels; ask "
                "for a smaller factor or size, or send a smaller picture"
            )

    def _stream(self, job: Job) -> Enlarged:
        with _named(job):
            large.enlarge(self.upscaler, job.source, job.target, self.options, progress=self.progress)
        return Enlarged()

    def _enlarge_still(self, job: Job, image: np.ndarray, metadata: Metadata, spent: Stats) -> Enlarged:
        meter = Meter(self.progress)
        with _named(job):
            result = self._enlarge(image, meter)
        shown = (image, result) if job.panel else None
        return Enlarged((result, metadata), shown, metadata.icc_profile, spent + meter.stats())

    def _enlarge_frames(self, job: Job, source: Animation, spent: Stats) -> Enlarged:
        """Enlarge and write frame by frame; the last one is shown."""
        meter, shown = Meter(self.progress), None
        passes = resize.count_passes(source.size, self._target_size(source.size), scale=self.upscaler.scale)
        windows = self.upscaler.count_windows(source.size, np.dtype(np.uint8), self.options.tile, passes=passes)
        meter.expect(2 * source.count * windows)  # frames are RGBA

        def frames() -> Iterator[Frame]:
            nonlocal shown
            for frame in meter.each(source.frames(), "decode"):
                result = self._enlarge(frame.image, meter)
                shown = frame.image, result
                with meter.part("encode"):  # by who takes the frame
                    yield replace(frame, image=result)

        with _named(job):
            animation.write(job.target, frames(), like=source, **self._how())
        return Enlarged(None, shown, source.metadata.icc_profile, spent + meter.stats())

    def _enlarge(self, image: np.ndarray, meter: Meter) -> np.ndarray:
        options = self.options
        return self.upscaler.upscale_metered(image, options.tile, factor=options.factor, size=options.size, meter=meter)

    def _how(self) -> dict[str, Any]:
        options = self.options
        return {
            "quality": options.quality, "overwrite": options.overwrite, "subsampling": options.subsampling,
            "lossless": options.lossless,
        }  # fmt: skip


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Put the source before a message that names no file of the job."""
    try:
        yield
    except SRError as exc:
        if str(exc).startswith(tuple(f"{path}: " for path in (job.source, *job.targets))):
            raise
        raise type(exc)(f"{job.source}: {exc}") from exc


def _panel(path: Path, image: np.ndarray, enlarged: np.ndarray) -> np.ndarray:
    try:
        return compare.panel(image, enlarged)
    except MemoryError as exc:
        raise OutOfMemory(f"{path}: the comparison does not fit into memory") from exc
