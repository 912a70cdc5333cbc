from __future__ import annotations

import pytest

from benchmarks.energy import energy_joules


def make_package(root, number: int, energy: int, *, span: int = 10_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"package-{number}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder / "energy_uj"


def test_energy_of_a_call_is_that_of_all_packages(tmp_path):
    counters = [make_package(tmp_path, number, 1000) for number in range(2)]
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package, which counts it already
    make_package(tmp_path, 2, 1000).with_name("name").write_text("psys\n")  # and the whole board
    calls = []

    def work() -> None:
        calls.append(1)
        for counter in counters:
            counter.write_text(str(int(counter.read_text()) + 250_000))

    assert energy_joules(work, root=tmp_path, seconds=0.05) == pytest.approx(0.5)
    assert len(calls) > 1


def test_a_counter_that_begins_anew(tmp_path):
    counter = make_package(tmp_path, 0, 9_900_000)

    def work() -> None:
        counter.write_text(str((int(counter.read_text()) + 200_000) % 10_000_000))

    assert energy_joules(_once(work), root=tmp_path, seconds=1e-9) == pytest.approx(0.2)


def _once(work):
    """Do some work the first time only."""
    left = [1]

    def call() -> None:
        if left:
            left.pop()
            work()

    return call


def test_what_cannot_be_read_is_not_known(tmp_path):
    assert energy_joules(lambda: None, root=tmp_path / "none", seconds=0.01) is None
    make_package(tmp_path, 0, 1).write_text("no number")
    assert energy_joules(lambda: None, root=tmp_path, seconds=0.01) is None
