"""The cores that a benchmark may use, and how it is kept to some of them."""

from __future__ import annotations

import os

from sdk.errors import OptionError

TASKS = "/proc/self/task"


def usable_cores() -> int:
    """Count the cores that this process may use; containers have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(count: int) -> None:
    """Keep this process and those that it starts to `count` cores; to be called before an engine is imported.

    Raises: OptionError if there are not so many, or the system is not Linux.
    """
    if not os.path.isdir(TASKS):
        raise OptionError("only Linux ties a process to cores; on other systems all of them are used")
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise OptionError(f"--threads {count}: there are {len(cores)} cores")
    for thread in os.listdir(TASKS):
        os.sched_setaffinity(int(thread), cores[:count])
    os.environ["SR_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(count)


def strays() -> set[int]:
    """Give the threads that engines tied to other cores than this process has: ONNX Runtime does by default."""
    if not os.path.isdir(TASKS):
        return set()
    own = os.sched_getaffinity(0)
    return {int(thread) for thread in os.listdir(TASKS) if os.sched_getaffinity(int(thread)) - own}
