"""Energy that the processor's packages take, where Linux lets it be read (RAPL, below /sys/class/powercap)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MEASURE_S = 1.0  # the counters step every millisecond or so


def energy_joules(work: Callable[[], object], *, root: Path = POWERCAP, seconds: float = MEASURE_S) -> float | None:
    """Give what one call of `work` takes, the idle machine included, from as many calls as fit into some seconds.

    Returns: joules; None where the counters are missing or not readable (since Linux 5.10 by root alone).
    """
    before = _read(root)
    if before is None:
        return None
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < seconds:
        work()
        calls += 1
    after = _read(root)
    if after is None:
        return None
    total = 0.0
    for (start, _), (end, span) in zip(before, after, strict=True):
        total += end - start if end >= start else end - start + span  # a counter that has begun anew
    return total / calls / 1e6


def _read(root: Path) -> list[tuple[int, int]] | None:
    """Read (microjoules, where the counter begins anew) of each package; None if there are none that can be read."""
    try:
        zones = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        # "psys", where there is one, is the whole board, packages included.
        packages = [path for path in zones if (path / "name").read_text().startswith("package")]
        found = [
            tuple(int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
            for package in packages
        ]
    except (OSError, ValueError):
        return None
    return [(value, span) for value, span in found] or None
