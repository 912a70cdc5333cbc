"""Batches shared by calls in several threads: who runs with whom, and what happens when a batch fails."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import bundles
import numpy as np
import pytest

from sdk import BackendError, OutOfMemory, Upscaler
from sdk.sharing import SharedBatches

WAIT_S = 30


def windows(count: int, value: int, side: int = 4) -> np.ndarray:
    return np.full((count, side, side, 3), value, np.uint8)


class Engine:
    """Doubles values; holds its first batch until it is let go, so that others gather behind it."""

    def __init__(self, fails=lambda inputs: None):
        self.shapes: list[tuple[int, ...]] = []
        self.fails = fails
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        self.shapes.append(inputs.shape)
        if not self.begun.is_set():
            self.begun.set()
            assert self.go.wait(WAIT_S)
        self.fails(inputs)
        return inputs * 2


def run_behind_a_busy_engine(engine: Engine, inputs: list[np.ndarray], *, most: int) -> list:
    """Start one call that keeps the engine busy, then the others; give their results or errors."""
    shared = SharedBatches(engine, lanes=1, most=lambda: most)

    def run(picture: np.ndarray) -> object:
        try:
            return shared.run(picture)
        except BackendError as exc:
            return exc

    with ThreadPoolExecutor(len(inputs) + 1) as pool:
        first = pool.submit(run, windows(1, 1))
        assert engine.begun.wait(WAIT_S)
        others = []
        for number, picture in enumerate(inputs, 1):
            others.append(pool.submit(run, picture))
            while len(shared._waiting) < number:  # one after the other, in this order
                pass
        engine.go.set()
        results = [future.result(WAIT_S) for future in others]
        np.testing.assert_array_equal(first.result(WAIT_S), windows(1, 2))
        return results


def test_what_waits_goes_into_one_batch():
    engine = Engine()
    results = run_behind_a_busy_engine(engine, [windows(1, n) for n in (10, 20, 30)], most=8)
    assert engine.shapes == [(1, 4, 4, 3), (3, 4, 4, 3)]
    for result, value in zip(results, (20, 40, 60), strict=True):
        np.testing.assert_array_equal(result, windows(1, value))


def test_a_batch_is_as_large_as_it_may_be_and_of_one_shape():
    engine = Engine()
    inputs = [windows(2, 10), windows(1, 20, side=8), windows(1, 30), windows(2, 40), windows(3, 50)]
    results = run_behind_a_busy_engine(engine, inputs, most=4)
    for picture, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, picture * 2)
    counts = sorted(shape[0] for shape in engine.shapes[1:] if shape[1] == 4)
    assert sum(counts) == 8
    assert max(counts) <= 4
    assert len(counts) < 4  # some were together
    assert (1, 8, 8, 3) in engine.shapes


def test_a_call_larger_than_a_batch_runs_alone():
    engine = Engine()
    run_behind_a_busy_engine(engine, [windows(5, 10), windows(1, 20)], most=4)
    assert sorted(shape[0] for shape in engine.shapes) == [1, 1, 5]


def test_a_failed_batch_hurts_only_the_call_whose_windows_fail():
    def fails(inputs: np.ndarray) -> None:
        if (inputs == 20).any():
            raise BackendError("20 is bad")

    engine = Engine(fails)
    first, second, third = run_behind_a_busy_engine(engine, [windows(1, n) for n in (10, 20, 30)], most=8)
    np.testing.assert_array_equal(first, windows(1, 20))
    np.testing.assert_array_equal(third, windows(1, 60))
    assert isinstance(second, BackendError)
    assert "20 is bad" in str(second)


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_whatever_ends_a_batch_is_not_every_callers(error):
    def fails(inputs: np.ndarray) -> None:
        if len(inputs) > 1:
            raise error("together")

    results = run_behind_a_busy_engine(Engine(fails), [windows(1, n) for n in (10, 20, 30)], most=8)
    for result, value in zip(results, (20, 40, 60), strict=True):
        np.testing.assert_array_equal(result, windows(1, value))


def test_nobody_waits_for_a_lane_whose_windows_have_been_run():
    """Two kinds wait behind a busy engine; those of the first kind are back before the second has begun."""
    engine, second = Engine(), threading.Event()
    shared = SharedBatches(engine, lanes=1, most=lambda: 8)

    def hold(inputs: np.ndarray) -> None:
        if inputs.shape[1] == 8:
            assert second.wait(WAIT_S)

    engine.fails = hold
    with ThreadPoolExecutor(8) as pool:
        busy = pool.submit(shared.run, windows(1, 1))
        assert engine.begun.wait(WAIT_S)
        first = [pool.submit(shared.run, windows(1, 10)) for _ in range(3)]
        while len(shared._waiting) < 3:
            pass
        last = pool.submit(shared.run, windows(1, 20, side=8))
        while len(shared._waiting) < 4:
            pass
        engine.go.set()
        for future in first:
            future.result(WAIT_S)
        second.set()
        last.result(WAIT_S)
        busy.result(WAIT_S)


def test_out_of_memory_together_makes_later_batches_smaller():
    def fails(inputs: np.ndarray) -> None:
        if len(inputs) > 2:
            raise OutOfMemory("too much")

    engine = Engine(fails)
    results = run_behind_a_busy_engine(engine, [windows(1, n) for n in (10, 20, 30, 40)], most=8)
    for result, value in zip(results, (20, 40, 60, 80), strict=True):
        np.testing.assert_array_equal(result, windows(1, value))
    assert [shape[0] for shape in engine.shapes] == [1, 4, 1, 1, 1, 1]
    shared = SharedBatches(engine, lanes=1, most=lambda: 8)
    shared._shrink(4)
    assert shared._most() == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_pictures_of_many_threads_are_those_of_one(backend):
    pytest.importorskip(backend)
    images = [np.random.default_rng(n).integers(0, 256, (48, 48, 3), dtype=np.uint8) for n in range(8)]
    options = {"backend": backend, "device": "cpu", "precision": "fp32"}
    with Upscaler(bundles.shared("unet"), **options) as alone:
        expected = [alone.upscale(image) for image in images]
    with (
        Upscaler(bundles.shared("unet"), batch=4, share_batches=True, **options) as sharing,
        ThreadPoolExecutor(8) as pool,
    ):
        for _ in range(5):
            for result, right in zip(pool.map(sharing.upscale, images), expected, strict=True):
                np.testing.assert_array_equal(result, right)
