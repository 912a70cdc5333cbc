"""Peak memory of one activity, measured in a fresh process that does nothing else."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from sdk.errors import OutOfMemory


def measure_peak_mib(activity: Callable[..., object], *arguments: Any) -> float:
    """Run `activity(*arguments)` in a new process and give its peak resident memory in MiB, libraries included.

    activity: a function at module level; its result is dropped.
    Raises: what the activity raises; OutOfMemory if the process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_mib_of, activity, arguments).result()
        except BrokenProcessPool as exc:
            raise OutOfMemory("the process that measures memory was killed; try a smaller --size") from exc


def _peak_mib_of(activity: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    activity(*arguments)
    return own_peak_mib()


def own_peak_mib() -> float:
    """Give the peak resident memory of this process in MiB."""
    try:
        # Not getrusage: Linux starts a child's ru_maxrss with the peak of the process that spawned it.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024
