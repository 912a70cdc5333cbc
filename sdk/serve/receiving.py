"""How a picture comes in from a client, how its result is waited for, and how it goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from .orders import Failure, Stopped, Watch
from .requests import discard

POLL_S = 0.25  # how often it is looked whether the work has been stopped
AGAIN_S = 10  # when a client may ask the next server
CLOSED = 499  # what is counted when the client has gone


async def receive(request: Request, source: Path, *, limit_s: float) -> None:
    """Write what a client sends, as a form's field `file` or as the body itself, to a new file.

    limit_s: for all of it. Raises: Failure, and leaves no file.
    """
    try:
        with source.open("xb") as stream:
            async for part in _in_time(_parts(request), limit_s):
                stream.write(part)
        if source.stat().st_size == 0:
            raise Failure(422, "nothing was sent: post the picture's bytes, or a form with a field 'file'")
    except BaseException as exc:
        source.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise Failure(507, f"the picture cannot be kept ({exc.strerror})") from exc
        if isinstance(exc, ClientDisconnect):
            raise Failure(CLOSED, "the client has left") from exc
        raise


async def _parts(request: Request) -> AsyncIterator[bytes]:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        async for part in request.stream():
            yield part
        return
    # Starlette answers 400 to what is no form.
    async with request.form(max_files=1, max_fields=10) as form:
        sent = form.get("file")
        if not isinstance(sent, UploadFile):
            raise Failure(422, "the form has no field 'file' with a file")
        while part := await sent.read(1 << 20):
            yield part


async def _in_time(parts: AsyncIterator[bytes], limit_s: float) -> AsyncIterator[bytes]:
    """Pass parts on. Raises: Failure if they take longer altogether."""
    clock = asyncio.get_running_loop().time
    ends = clock() + limit_s
    while True:
        try:
            yield await asyncio.wait_for(anext(parts), ends - clock())
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as exc:
            raise Failure(408, f"the picture did not come within {limit_s:g} s") from exc


async def wait(request: Request, future: Future[Path], watch: Watch) -> Path | None:
    """Wait for a result; None if the client has left, upon which the work stops.

    Raises: Failure.
    """
    done = asyncio.wrap_future(future)
    left: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
    either: set[asyncio.Future[Any]] = {done, left}
    try:
        while not (done.done() or left.done()):
            if watch.is_stopped:
                raise Failure(503, "the server is about to end", retry_after_s=AGAIN_S)
            if watch.is_over:
                raise watch.too_late()
            await asyncio.wait(either, timeout=min(POLL_S, watch.left_s), return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    except Stopped as exc:
        raise Failure(503, "the server is about to end", retry_after_s=AGAIN_S) from exc
    finally:
        left.cancel()
        if not done.done():
            watch.stop()
            done.cancel()
            discard(future)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ResultResponse(FileResponse):
    """A result that is sent once; then, or if it cannot be within a time, its file is removed.

    limit_s: to send it. before_end: called once, before the last piece is sent or when none more is: a client that has
    all of it may find what is freed.
    """

    def __init__(self, path: Path, *, media_type: str, limit_s: float, before_end: Callable[[], None]):
        super().__init__(path, media_type=media_type)
        self._limit_s, self._before_end = limit_s, before_end
        self._is_at_end = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def send_piece(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._end()
            await send(message)

        try:
            await asyncio.wait_for(super().__call__(scope, receive, send_piece), self._limit_s)
        except asyncio.TimeoutError:
            pass  # the client reads too slowly; the connection is closed with what is missing
        finally:
            Path(self.path).unlink(missing_ok=True)
            self._end()

    def _end(self) -> None:
        if not self._is_at_end:
            self._is_at_end = True
            self._before_end()
