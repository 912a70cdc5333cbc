"""How much host memory an engine's activations may take, and how large a window that is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Engines take 1.4 times the live activations of the graph (OpenVINO, ONNX Runtime without memory patterns; measured
# from 512x512 to 2048x2048).
REAL_SHARE = 1.5
COMFORTABLE_BYTES = 128 << 20
COMFORTABLE_HALOS = 8  # a window of so many halos a side runs 1.8 times the pixels that it keeps
DEVICE_COMFORTABLE_BYTES = 1 << 30  # a GPU has no canvas to leave room for
FREE_SHARE = 4  # of the free memory, one part
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")


def window_pixels(
    activation_bytes: int, *, halo: int, batch: int, limit_mib: int | None, device_free: int | None = None
) -> int:
    """Give the LR pixels that one window may have, when `batch` of them run at once.

    activation_bytes: of the model, for each LR pixel. limit_mib: asked for by the user, in MiB; None is 128 MiB, or
    what keeps the overhead of wide halos bearable, and at most a quarter of the memory that is free now.
    device_free: bytes free on a GPU, which then stands for the host's memory, with 1 GiB for 128 MiB.
    """
    real_bytes = int(activation_bytes * REAL_SHARE)
    if limit_mib is not None:
        return (limit_mib << 20) // (real_bytes * batch)
    comfortable_bytes = COMFORTABLE_BYTES if device_free is None else DEVICE_COMFORTABLE_BYTES
    free = free_bytes() if device_free is None else device_free
    comfortable = max(comfortable_bytes // real_bytes, (COMFORTABLE_HALOS * halo) ** 2)
    return min(comfortable, free // FREE_SHARE // (real_bytes * batch))


def free_bytes() -> int:
    """Read the free memory of the machine, or of the container's limit if that is less."""
    free = _machine_free()
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        limit = int(CGROUP_LIMIT.read_text())
        free = min(free, limit - int(CGROUP_USED.read_text()) + _reclaimable())
    return max(0, free)


def _reclaimable() -> int:
    """Read how much of the container's used memory is file cache that the kernel would give back."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in CGROUP_STAT.read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _machine_free() -> int:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # no /proc, or one that does not look like Linux's
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 1 << 30  # unknown system
