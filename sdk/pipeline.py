"""Overlap decoding, computing and encoding of many pictures, in order and with a bound on what is under way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import SRError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # items under way beyond those being encoded: one in each step, and one result that waits
PATIENCE_S = 1.0  # given to a source to come back when it is not needed any more


def overlap(
    items: Iterable[Any],
    *,
    decode: Callable[[Any], Any],
    compute: Callable[[Any], Any],
    encode: Callable[[Any, Any], Any] = lambda item, result: result,
    encoders: int = 1,
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, encode(item, compute(decode(item)))) in order; an SRError of any step is yielded as the result.

    decode and compute run in a thread each, encode in `encoders` of them; at most AHEAD + encoders items are taken
    before the first of them is yielded. Items are taken in a thread too, so that a source may wait for the results of
    earlier ones. Other exceptions, and those of `items` itself, end the iteration.
    """
    under_way: queue.SimpleQueue[tuple[Any, Future[Any]] | BaseException | None] = queue.SimpleQueue()
    slots = threading.Semaphore(AHEAD + encoders - 1)
    stopped = threading.Event()

    def take() -> None:
        try:
            for item in items:
                decoded = decoder.submit(_catch, decode, item)
                computed = computer.submit(_then, decoded, compute)
                under_way.put((item, encoder.submit(_then, computed, encode, item)))
                slots.acquire()
                if stopped.is_set():
                    return
            under_way.put(None)
        except BaseException as exc:  # of the source; or of a pool that is shut down, which nobody hears
            under_way.put(exc)

    with (
        ThreadPoolExecutor(1, "sr-decode") as decoder,
        ThreadPoolExecutor(1, "sr-compute") as computer,
        ThreadPoolExecutor(encoders, "sr-encode") as encoder,
    ):
        taker = threading.Thread(target=take, name="sr-take", daemon=True)  # not waited for in a source that blocks
        taker.start()
        try:
            while (entry := under_way.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry[0], entry[1].result()
                del entry  # and with it the result, before the next one comes
                slots.release()
        finally:  # also when the consumer stops early: what has not begun never does
            stopped.set()
            slots.release()
            for pool in (encoder, computer, decoder):
                pool.shutdown(wait=False, cancel_futures=True)
            taker.join(PATIENCE_S)


def in_order(
    items: Iterable[Item], function: Callable[[Item], Result], *, pool: Lanes | None
) -> Generator[tuple[Item, Result], None, None]:
    """Yield (item, function(item)) in order, worked ahead of in a pool; without one, in the caller's thread.

    At most one item more than the pool has threads is under way. Exceptions surface where their result would.
    """
    if pool is None:
        for item in items:
            yield item, function(item)
        return
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > pool.count:
                item, future = pending.popleft()
                yield item, future.result()
        while pending:
            item, future = pending.popleft()
            yield item, future.result()
    finally:  # also after an error: what has not begun never does
        for _, future in pending:
            future.cancel()


class Lanes(ThreadPoolExecutor):
    """Threads that keep an engine busy: while one of them computes, others bring data and take results away."""

    def __init__(self, count: int):
        super().__init__(count, "sr-lane")
        self.count = count


def _then(before: Future[Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """Go on with the result of the step before, unless that is an error of ours."""
    result = before.result()
    return result if isinstance(result, SRError) else _catch(function, *arguments, result)


def _catch(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SRError as exc:
        return exc
