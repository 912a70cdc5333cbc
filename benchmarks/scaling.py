"""How time grows: with the picture, the tile, the batch and the cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sdk import Bundle, Upscaler
from sdk.errors import BackendError, BackendUnavailable, OptionError

from .cores import limit_threads, strays, usable_cores
from .memory import run_fresh
from .pictures import draw_picture
from .result import model_facts, result_head
from .timing import take_turns

PROTOCOL = (
    "Time: of Upscaler.upscale, from array to array, the points of an axis in turns; threads: a process of its own for "
    "each number of cores. Exponent: slope of the least-squares line through the logarithms of value and median time, "
    "1 for time in proportion; r2: the share of the variance that the line explains, none where all times are equal. "
    "Pixels: of the LR picture, cut as the SDK chooses. Tile: its side, of a picture of {side}x{side}; batch: windows "
    "run at once, of the same picture in tiles of {tile}."
)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    axes: of AXES; none of them: all. sides: of the squares of "pixels". side: of the picture of "tile" and "batch",
    thread_side: of "threads". tiles: sides; tile: of "batch". batches: windows at once. threads: numbers of cores;
    None: 1, 2, 4 ... and all that the process may use.
    """

    axes: tuple[str, ...] = ()
    model: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    repeats: int = 7
    sides: tuple[int, ...] = (128, 181, 256, 362, 512, 724, 1024, 1448)
    side: int = 768
    tiles: tuple[int, ...] = (32, 64, 96, 128, 192, 256, 384, 768)
    tile: int = 128
    batches: tuple[int, ...] = (1, 2, 4, 8)
    thread_side: int = 512
    threads: tuple[int, ...] | None = None

    def open(self, **options: Any) -> Upscaler:
        """Make the Upscaler that is timed. Raises: SRError."""
        return Upscaler(self.model, backend=self.backend, device=self.device, precision=self.precision, **options)


def run_scaling(settings: Settings, *, progress: Callable[[str], None] = lambda news: None) -> dict[str, Any]:
    """Time the points of every axis that is asked for.

    Returns: the JSON form: facts, one row for each point, a fit for each axis, and what was skipped and why.
    Raises: SRError for a missing model or an engine that cannot run.
    """
    protocol = PROTOCOL.format(side=settings.side, tile=settings.tile)
    head = result_head("scaling", protocol=protocol) | {"model": model_facts(Bundle.load(settings.model))}
    with settings.open() as upscaler:
        info = upscaler.info
    rows: list[dict[str, Any]] = []
    fits: dict[str, dict[str, float | None]] = {}
    skipped: list[dict[str, str]] = []
    for axis in dict.fromkeys(settings.axes or AXES):
        progress(f"timing {axis}")
        try:
            samples = AXES[axis](settings)
        except (BackendError, OptionError) as exc:
            skipped.append({"axis": axis, "reason": str(exc)})
            continue
        points = {value: float(np.median(times_ms)) for value, times_ms in samples.items()}
        fits[axis] = fit_exponent(points)
        rows += [
            {
                "axis": axis, "value": value, "median_ms": round(points[value], 4),
                "min_ms": round(min(times_ms), 4), "max_ms": round(max(times_ms), 4),
            }
            for value, times_ms in samples.items()
        ]  # fmt: skip
    return head | {"info": info, "repeats": settings.repeats, "rows": rows, "fits": fits, "skipped": skipped}


def fit_exponent(points: Mapping[int, float]) -> dict[str, float | None]:
    """Fit time = factor * value ** exponent to medians by value; nothing to fit is None, and r2 says it of three on."""
    if len(points) < 2:
        return {"exponent": None, "r2": None}
    x, y = np.log(list(points)), np.log(list(points.values()))
    exponent, level = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum()) if np.ptp(y) else 0.0
    left = float(((y - (exponent * x + level)) ** 2).sum())
    return {
        "exponent": round(float(exponent), 4),
        "r2": round(1 - left / spread, 4) if spread and len(points) > 2 else None,
    }


Samples = dict[int, list[float]]


@dataclass(frozen=True)
class Point:
    """What is timed once: a square picture, in tiles or not."""

    side: int
    tile: int | None = None
    batch: int | str = "auto"


def time_pixels(settings: Settings) -> Samples:
    """Time squares of rising size: milliseconds by LR pixels."""
    return _time(settings, {side**2: Point(side) for side in settings.sides})


def time_tiles(settings: Settings) -> Samples:
    """Time one picture in tiles of rising size: milliseconds by the tile's side."""
    return _time(settings, {tile: Point(settings.side, tile) for tile in settings.tiles})


def time_batches(settings: Settings) -> Samples:
    """Time one picture in tiles, with rising numbers of them at once: milliseconds by batch."""
    return _time(settings, {batch: Point(settings.side, settings.tile, batch) for batch in settings.batches})


def _time(settings: Settings, points: Mapping[int, Point]) -> Samples:
    with ExitStack() as stack:
        turns = {}
        for value, point in points.items():
            # One for each: an engine keeps few shapes ready.
            upscaler = stack.enter_context(settings.open(batch=point.batch))
            turns[value] = partial(upscaler.upscale, draw_picture((point.side, point.side)), point.tile)
        return take_turns(turns, repeats=settings.repeats)


def time_threads(settings: Settings) -> Samples:
    """Time one picture on rising numbers of cores: milliseconds by cores.

    Raises: BackendUnavailable for an engine that does not run on the CPU or does not keep to the cores it is given.
    """
    counts = settings.threads or rising_counts(usable_cores())
    return {count: run_fresh(_time_on_cores, settings, count) for count in counts}


def rising_counts(cores: int) -> tuple[int, ...]:
    """Give 1, 2, 4 ... below a number, and that number."""
    powers = [1 << index for index in range(cores.bit_length())]
    return (*[power for power in powers if power < cores], cores)


def _time_on_cores(settings: Settings, count: int) -> list[float]:
    limit_threads(count)
    with settings.open() as upscaler:
        if upscaler.info["device"] != "cpu":
            raise BackendUnavailable(f"{upscaler.info['backend']} does not run on the CPU")
        upscaler.warmup()
        if strays():
            raise BackendUnavailable(f"{upscaler.info['backend']} does not keep to the cores that it is given")
        picture = draw_picture((settings.thread_side, settings.thread_side))
        return take_turns({count: partial(upscaler.upscale, picture)}, repeats=settings.repeats)[count]


AXES: dict[str, Callable[[Settings], Samples]] = {
    "pixels": time_pixels, "tile": time_tiles, "batch": time_batches, "threads": time_threads,
}  # fmt: skip
