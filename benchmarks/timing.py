"""Time contestants in turns within one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

WARM_UPS = 5  # OpenVINO in the SDK compiles for a shape when it comes for the fourth time
# Worker threads of one engine spin for a while after its run, on the cores of the next.
PAUSE_S = 0.05

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """Statistics of one contestant's samples, in milliseconds."""

    median_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


def take_turns(
    runners: Mapping[Key, Callable[[], object]], *, repeats: int, pause_s: float = PAUSE_S
) -> dict[Key, list[float]]:
    """Time the contestants in turn, so that whatever else the machine does meets all of them.

    Returns: `repeats` samples in milliseconds for each.
    """
    for runner in runners.values():
        for _ in range(WARM_UPS):
            runner()
    samples: dict[Key, list[float]] = {contestant: [] for contestant in runners}
    for _ in range(repeats):
        for contestant, runner in runners.items():
            time.sleep(pause_s)
            runner()
            start = time.perf_counter_ns()
            runner()
            samples[contestant].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def summarise(times_ms: Sequence[float]) -> Timing:
    """Reduce samples to median, 95th and 99th percentile (linear between samples), minimum and maximum."""
    median, p95, p99 = (float(value) for value in np.percentile(times_ms, (50, 95, 99)))
    return Timing(median, p95, p99, float(min(times_ms)), float(max(times_ms)))
