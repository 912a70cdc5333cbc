"""What a meter adds up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from sdk import Stats, stats
from sdk.stats import Meter


class Clock(SimpleNamespace):
    """Stands for the module `time`; goes on only when told."""

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(now=100.0)
    monkeypatch.setattr(stats, "time", made)
    return made


def test_a_part_adds_up(clock: Clock) -> None:
    meter = Meter()
    for seconds in (1, 2, 4):
        with meter.part("run"):
            clock.now += seconds
        clock.now += 8
    with pytest.raises(ValueError, match="while it ran"), meter.part("run"):
        clock.now += 16
        raise ValueError("while it ran")
    assert meter.stats() == Stats(pictures=1, seconds=7 + 24 + 16, run_s=7 + 16)


def test_counts_add_up() -> None:
    meter = Meter()
    for number in (1, 2):
        meter.add(tiles=number, pixels=10 * number, retries=100 * number)
    found = meter.stats(pictures=0)
    assert (found.pictures, found.tiles, found.pixels, found.retries) == (0, 3, 30, 300)


def test_every_field_is_added() -> None:
    count = len(vars(Stats()))
    assert Stats(*range(1, count + 1)) + Stats(*[10] * count) == Stats(*range(11, count + 11))


def test_each_times_what_comes_and_not_what_is_done_with_it(clock: Clock) -> None:
    def source() -> Iterator[int]:
        for number in (1, 2, 4):
            clock.now += number
            yield number
        clock.now += 8

    meter = Meter()
    for number in meter.each(source(), "decode"):
        clock.now += 100 * number
    assert meter.stats().decode_s == 1 + 2 + 4 + 8
