"""The memory budget, whatever /proc and the container's limits look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdk import memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give `machine(meminfo, limit, used)`, which writes what the system would say; None: no such file."""

    def write(meminfo: str | bytes | None, limit: str | None = None, used: str | None = None) -> None:
        for name, text in (("MEMINFO", meminfo), ("CGROUP_LIMIT", limit), ("CGROUP_USED", used)):
            path = tmp_path / name
            if text is not None:
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
            monkeypatch.setattr(memory, name, path)

    return write


def test_a_quarter_of_what_is_free(machine) -> None:
    machine("MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n")
    assert memory.free_bytes() == 8192 * MIB
    assert memory.budget_bytes() == 2048 * MIB


def test_between_the_bounds(machine) -> None:
    machine("MemAvailable: 1 kB\n")
    assert memory.budget_bytes() == memory.MIN_BYTES
    machine("MemAvailable: 999999999999 kB\n")
    assert memory.budget_bytes() == memory.MAX_BYTES


def test_a_container_limit_counts(machine) -> None:
    machine("MemAvailable: 8388608 kB\n", str(3000 * MIB), str(1000 * MIB))
    assert memory.free_bytes() == 2000 * MIB
    machine("MemAvailable: 8388608 kB\n", "max\n", str(1000 * MIB))
    assert memory.free_bytes() == 8192 * MIB
    machine("MemAvailable: 8388608 kB\n", str(1000 * MIB), str(2000 * MIB))  # over its limit
    assert memory.free_bytes() == 0 and memory.budget_bytes() == memory.MIN_BYTES


@pytest.mark.parametrize(
    "meminfo",
    [None, "", "MemAvailable:", "MemAvailable: lots kB", "MemTotal: 12 kB", b"\xff\xfe\0", "MemAvailable: -5 kB"],
)
@pytest.mark.parametrize("limit", [None, "", "much"])
def test_odd_systems_still_get_a_budget(machine, meminfo: str | bytes | None, limit: str | None) -> None:
    machine(meminfo, limit, limit)
    assert memory.MIN_BYTES <= memory.budget_bytes() <= memory.MAX_BYTES
