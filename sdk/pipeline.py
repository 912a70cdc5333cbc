"""Overlap decoding, computing and encoding of many pictures, in order and with bounded queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .errors import SRError

AHEAD = 2  # items decoded before they are needed, and items being encoded: bounds the memory


def overlap(
    items: Iterable[Any],
    *,
    decode: Callable[[Any], Any],
    compute: Callable[[Any], Any],
    encode: Callable[[Any, Any], Any] = lambda item, result: result,
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, encode(item, compute(decode(item)))) in order; an SRError of any step is yielded as the result.

    decode and encode run in a thread each, compute in the thread that iterates. Other exceptions, and those of
    `items` itself, end the iteration.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "sr-decode") as decoder, ThreadPoolExecutor(1, "sr-encode") as encoder:
        decoding: deque[tuple[Any, Future[Any]]] = deque()
        encoding: deque[tuple[Any, Future[Any]]] = deque()

        def read_ahead() -> None:
            while len(decoding) < AHEAD:
                try:
                    item = next(source)
                except StopIteration:
                    return
                decoding.append((item, decoder.submit(_catch, decode, item)))

        def finished() -> tuple[Any, Any]:
            item, future = encoding.popleft()
            return item, future.result()

        try:
            read_ahead()
            while decoding:
                item, future = decoding.popleft()
                read_ahead()
                decoded = future.result()
                result = decoded if isinstance(decoded, SRError) else _catch(compute, decoded)
                encoding.append((item, encoder.submit(_encode, encode, item, result)))
                while encoding and (len(encoding) > AHEAD or encoding[0][1].done()):
                    yield finished()
            while encoding:
                yield finished()
        finally:  # also when the consumer stops early
            for _, future in decoding:
                future.cancel()


def _catch(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SRError as exc:
        return exc


def _encode(encode: Callable[[Any, Any], Any], item: Any, result: Any) -> Any:
    return result if isinstance(result, SRError) else _catch(encode, item, result)
