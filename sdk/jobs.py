"""One file in, one file out: stills, animations and very large pictures; of many files the steps overlap."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import animation, compare, files, large, pipeline, resize, vips
from .animation import Animation, Frame
from .errors import SRError
from .files import MAX_PIXELS, Metadata
from .stats import Meter

if TYPE_CHECKING:
    from .upscaler import Upscaler

LOG = logging.getLogger(__name__)
MAX_ENCODERS = 4  # threads; each holds one result


@dataclass(frozen=True)
class Options:
    """How files are enlarged and written.

    quality: of JPEG, WebP and AVIF. subsampling: of the colour of JPEG and AVIF. lossless: of WebP. factor, size:
    as for Upscaler.upscale. max_pixels: of a source, 0 is no limit.
    """

    overwrite: bool = False
    quality: int = 95
    subsampling: str = "4:4:4"
    lossless: bool = False
    factor: float | None = None
    size: tuple[int | None, int | None] | None = None
    tile: int | None = None
    max_pixels: int | None = MAX_PIXELS


@dataclass(frozen=True)
class Streamed:
    """Stands for a picture that is read, enlarged and written in bands, all in the last step."""


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


def run_file(upscaler: Upscaler, job: Job, options: Options) -> None:
    """Enlarge one file. Raises: SRError; no partial file stays."""
    steps = Steps(upscaler, options)
    steps.encode(job, steps.compute(steps.decode(job)))


def run_files(
    upscaler: Upscaler, jobs: Iterable[Job], options: Options
) -> Generator[tuple[Job, SRError | None], None, None]:
    """Enlarge many files; yield each job in order, with its error if it failed."""
    steps = Steps(upscaler, options)
    encoders = min(MAX_ENCODERS, _cores())
    work = pipeline.overlap(jobs, decode=steps.decode, compute=steps.compute, encode=steps.encode, encoders=encoders)
    with closing(work) as results:
        yield from results


def _cores() -> int:
    """Count the cores that this process may use; containers have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Steps:
    """The three steps of a file. What comes in frames or bands is enlarged and written in the last."""

    upscaler: Upscaler
    options: Options

    def decode(self, job: Job) -> Any:
        """Read a still picture, or open an animation; refuse what cannot be done before the work."""
        options = self.options
        files.check_quality(options.quality)
        files.check_subsampling(options.subsampling)
        # What exists already is refused first; what is no picture is told before a wrong destination.
        for target in filter(os.path.lexists, job.targets):
            files.check_output(target, overwrite=options.overwrite)
        meter = Meter()
        if self._is_streamed(job):
            return Streamed(), Metadata(), meter
        source: np.ndarray | Animation
        with meter.part("decode"):
            moving = animation.read(job.source, max_pixels=options.max_pixels)
            if moving:
                source, metadata = moving, moving.metadata
            else:
                source, metadata = files.read(job.source, max_pixels=options.max_pixels)
        size = source.size if isinstance(source, Animation) else source.shape[:2]
        wanted = resize.target_size(size, scale=self.upscaler.scale, factor=options.factor, size_wanted=options.size)
        for target in job.targets:
            files.check_output(target, overwrite=options.overwrite)
        if isinstance(source, Animation):
            animation.check_output(job.target, wanted, overwrite=options.overwrite)
        else:
            files.check_format(job.target, source, scale=1)
            files.check_side(job.target, wanted, scale=1)
        return source, metadata, meter

    def compute(self, decoded: tuple[Any, Metadata, Meter]) -> tuple[Any, Any, Metadata, Meter]:
        """Enlarge a still picture."""
        image, metadata, meter = decoded
        result = self._enlarge(image, meter) if isinstance(image, np.ndarray) else None
        return image, result, metadata, meter

    def encode(self, job: Job, computed: tuple[Any, Any, Metadata, Meter]) -> None:
        """Write a still picture, or enlarge and write what comes in frames or bands."""
        image, result, metadata, meter = computed
        if isinstance(image, Streamed):
            large.enlarge(self.upscaler, job.source, job.target, self.options)
            return
        if isinstance(image, Animation):
            result, image = self._write_animation(job, image, meter)
        else:
            with meter.part("encode"):
                files.write(job.target, result, metadata, **self._how())
        if job.panel:
            panel = compare.panel(image, result)
            files.write(job.panel, panel, Metadata(), quality=self.options.quality, overwrite=self.options.overwrite)
        self.upscaler.record(meter.stats())

    def _is_streamed(self, job: Job) -> bool:
        """Tell whether a picture is so large that it is better read and written in bands, and can be."""
        options = self.options
        plain = job.panel is None and options.factor is None and options.size is None
        if not (plain and large.is_large(job.source, job.target, scale=self.upscaler.scale)):
            return False
        if not vips.is_installed():
            LOG.warning("%s: needs much memory; pip install 'sr-sdk[large]' to have it streamed", job.source)
            return False
        return True

    def _enlarge(self, image: np.ndarray, meter: Meter) -> np.ndarray:
        options = self.options
        return self.upscaler.upscale_metered(image, options.tile, factor=options.factor, size=options.size, meter=meter)

    def _write_animation(self, job: Job, source: Animation, meter: Meter) -> tuple[np.ndarray, np.ndarray]:
        """Enlarge and write frame by frame; give the last frame, enlarged and as it was."""
        shown: list[np.ndarray] = []

        def frames() -> Iterator[Frame]:
            for frame in source.frames():
                result = self._enlarge(frame.image, meter)
                shown[:] = [result, frame.image]
                yield replace(frame, image=result)

        animation.write(job.target, frames(), like=source, **self._how())
        return shown[0], shown[1]

    def _how(self) -> dict[str, Any]:
        options = self.options
        return {
            "quality": options.quality, "overwrite": options.overwrite, "subsampling": options.subsampling,
            "lossless": options.lossless,
        }  # fmt: skip
