"""How much host memory an engine's activations may take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SHARE = 4  # of the free memory, one part
MIN_BYTES, MAX_BYTES = 256 << 20, 4 << 30
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def budget_bytes() -> int:
    """Give a quarter of the memory that is free now, between 256 MiB and 4 GiB."""
    return min(MAX_BYTES, max(MIN_BYTES, free_bytes() // SHARE))


def free_bytes() -> int:
    """Read the free memory of the machine, or of the container's limit if that is less."""
    free = _machine_free()
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        free = min(free, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USED.read_text()))
    return max(0, free)


def _machine_free() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # no /proc, or one that does not look like Linux's
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * MIN_BYTES  # unknown system: one budget of the smallest size
