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

    Raises: as run_fresh.
    """
    return run_fresh(_peak_mib_of, activity, arguments)


def run_fresh(activity: Callable[..., Any], *arguments: Any) -> Any:
    """Give what `activity(*arguments)` returns in a new process.

    activity: a function at module level.
    Raises: what the activity raises; OutOfMemory if the process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(activity, *arguments).result()
        except BrokenProcessPool as exc:
            raise OutOfMemory("the process that measures memory was killed; try smaller pictures") from exc


def _peak_mib_of(activity: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    activity(*arguments)
    return own_peak_mib()


def own_peak_mib() -> float:
    """Give the peak resident memory of this process in MiB."""
    # Not getrusage: Linux starts a child's ru_maxrss with the peak of the process that spawned it.
    peak = _status_mib("VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def own_rss_mib() -> float | None:
    """Give the resident memory of this process in MiB; None where the system has no /proc."""
    return _status_mib("VmRSS")


def _status_mib(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)
