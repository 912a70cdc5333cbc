"""The memory budget, whatever /proc and the container's limits look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdk import Upscaler, memory
from sdk.runner import ROWS_BYTES

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
        monkeypatch.setattr(memory, "CGROUP_STAT", tmp_path / "none")

    return write


def pixels(activation_bytes: int, *, halo: int, batch: int = 1, limit_mib: int | None = None) -> int:
    return memory.window_pixels(activation_bytes, halo=halo, batch=batch, limit_mib=limit_mib)


def test_a_quarter_of_what_is_free(machine) -> None:
    machine("MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n")
    assert memory.free_bytes() == 8192 * MIB
    # A wide halo of a costly model takes all it may: 2 GiB at 1.5 times 4 KiB a pixel, shared by a batch.
    assert pixels(4096, halo=1000) == 2048 * MIB // 6144
    assert pixels(4096, halo=1000, batch=4) == 2048 * MIB // 6144 // 4


def test_what_is_comfortable_does_not_grow_with_the_machine(machine) -> None:
    machine("MemAvailable: 999999999999 kB\n")
    assert pixels(100, halo=8) == memory.COMFORTABLE_BYTES // 150
    assert pixels(100_000, halo=100) == 800 * 800  # eight halos a side, whatever they take


def test_a_wish_is_a_wish(machine) -> None:
    machine("MemAvailable: 1 kB\n")
    assert pixels(100, halo=8, limit_mib=300) == 300 * MIB // 150
    assert pixels(100, halo=8, limit_mib=300, batch=3) == 300 * MIB // 450


def test_a_container_limit_counts(machine) -> None:
    machine("MemAvailable: 8388608 kB\n", str(3000 * MIB), str(1000 * MIB))
    assert memory.free_bytes() == 2000 * MIB
    machine("MemAvailable: 8388608 kB\n", "max\n", str(1000 * MIB))
    assert memory.free_bytes() == 8192 * MIB
    machine("MemAvailable: 8388608 kB\n", str(1000 * MIB), str(2000 * MIB))  # over its limit
    assert memory.free_bytes() == 0 and pixels(100, halo=8) == 0


def test_a_containers_file_cache_is_free(machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine("MemAvailable: 8388608 kB\n", str(3000 * MIB), str(1000 * MIB))
    (tmp_path / "stat").write_text(f"anon 5\ninactive_file {700 * MIB}\n")
    monkeypatch.setattr(memory, "CGROUP_STAT", tmp_path / "stat")
    assert memory.free_bytes() == 2700 * MIB


@pytest.mark.parametrize(
    "meminfo",
    [None, "", "MemAvailable:", "MemAvailable: lots kB", "MemTotal: 12 kB", b"\xff\xfe\0", "MemAvailable: -5 kB"],
)
@pytest.mark.parametrize("limit", [None, "", "much"])
def test_odd_systems_still_get_a_window(machine, meminfo: str | bytes | None, limit: str | None) -> None:
    machine(meminfo, limit, limit)
    assert 0 <= pixels(100, halo=8) <= memory.COMFORTABLE_BYTES // 150


def test_rows_of_wide_pictures_are_held_in_bounds() -> None:
    """Rows of windows are as wide as the picture: 16 bits and a large width make them lower."""
    with Upscaler("fast-x2", backend="onnxruntime", device="cpu") as opened:
        planner = opened._runner.plan
        heights = {dtype: planner((20_000, 20_000), np.dtype(dtype)).window[0] for dtype in (np.uint8, np.uint16)}
        assert heights[np.uint16] < heights[np.uint8]
        assert 20_000 * 2 * 44 * heights[np.uint16] <= ROWS_BYTES
        assert planner((3000, 4000), np.dtype(np.uint16)) == planner((3000, 4000), np.dtype(np.uint8))
