"""Overlapped work: order, errors, bounds, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sdk import ImageError, OutputError, pipeline
from sdk.pipeline import AHEAD, overlap


def same(value: object) -> object:
    return value


def test_order_and_steps() -> None:
    results = overlap(
        range(20), decode=lambda n: n * 10, compute=lambda n: n + 1, encode=lambda item, result: (item, result)
    )
    assert list(results) == [(n, (n, n * 10 + 1)) for n in range(20)]


@pytest.mark.parametrize("step", ["decode", "compute", "encode"])
def test_errors_of_ours_are_results_and_the_others_go_on(step: str) -> None:
    def fail_at_three(value: int, *_: object) -> int:
        if value == 3:
            raise ImageError("three")
        return value

    steps = {"decode": same, "compute": same, "encode": lambda item, result: result} | {step: fail_at_three}
    results = list(overlap(range(6), **steps))
    assert [item for item, _ in results] == list(range(6))
    assert [type(result) for _, result in results] == [int, int, int, ImageError, int, int]


@pytest.mark.parametrize("step", ["decode", "compute", "encode"])
def test_other_errors_end_the_iteration(step: str) -> None:
    def fail(value: int, *_: object) -> int:
        raise ZeroDivisionError

    steps = {"decode": same, "compute": same, "encode": lambda item, result: result} | {step: fail}
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(overlap(range(6), **steps))
    assert threading.active_count() == before


def test_few_items_are_taken_ahead_and_few_results_wait() -> None:
    taken, encoded = [], []

    def source() -> Iterator[int]:
        for n in range(1000):
            taken.append(n)
            yield n

    results = overlap(source(), decode=same, compute=same, encode=lambda item, result: encoded.append(item))
    for count in range(1, 30):
        next(results)
        assert len(taken) <= count + AHEAD  # this one, and those after it
        assert len(encoded) <= count + AHEAD
    results.close()


def test_a_finished_result_does_not_wait_for_the_next_item() -> None:
    """A source that waits for the result of each item, as an interactive one does, must not hang for good."""
    given = threading.Semaphore(1)

    def source() -> Iterator[int]:
        for n in range(12):
            assert given.acquire(timeout=30), "the source waited for a result that was held back"
            yield n

    for _ in overlap(source(), decode=same, compute=same):
        given.release()


def test_a_consumer_that_stops_leaves_no_thread_and_no_half_work() -> None:
    started, finished = [], []

    def encode(item: int, result: int) -> int:
        started.append(item)
        finished.append(item)
        return result

    before = threading.active_count()
    results = overlap(range(100), decode=same, compute=same, encode=encode)
    assert next(results) == (0, 0)
    results.close()
    assert threading.active_count() == before
    assert started == finished and len(finished) < 10


def test_a_source_that_blocks_does_not_hold_a_consumer_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PATIENCE_S", 0.01)
    released = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        released.wait()

    results = overlap(source(), decode=same, compute=same)
    assert next(results) == (0, 0)
    results.close()
    (taker,) = (thread for thread in threading.enumerate() if thread.name == "sr-take")
    released.set()
    taker.join()


def test_an_error_of_the_source_comes_after_what_it_gave() -> None:
    def source() -> Iterator[int]:
        yield from range(10)
        raise ZeroDivisionError

    results, before = overlap(source(), decode=same, compute=same), threading.active_count()
    assert [next(results) for _ in range(10)] == [(n, n) for n in range(10)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_an_interrupt_ends_the_threads() -> None:
    def interrupted(value: int) -> int:
        if value == 2:
            raise KeyboardInterrupt
        return value

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(overlap(range(6), decode=same, compute=interrupted))
    assert threading.active_count() == before


def test_an_error_given_to_the_source_as_an_item_is_only_an_item() -> None:
    error = OutputError("an item")
    ((item, result),) = overlap([error], decode=lambda item: 1, compute=same)
    assert item is error and result == 1
