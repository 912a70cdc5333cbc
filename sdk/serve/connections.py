"""Connections that do nothing: uvicorn waits for ever for the head of a request, and takes any number of them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0  # for the head of a request to come
MAX_CONNECTIONS = 4000
SPARE_FILES = 200  # that the process opens besides connections


def connection_limit() -> int:
    """Let this process open as many files as the system allows, and give how many of them connections may take."""
    if sys.platform == "win32":
        return 400
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, max(1, soft - SPARE_FILES))


def protocol(limit: int) -> type[H11Protocol]:
    """Give uvicorn's protocol with limits: on the number of connections, and on the time for a request's head."""

    class Limited(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limit:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            """Close the connection unless the head of a request has come, or comes in time."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(HEAD_S, self._close_idle)

        def _close_idle(self) -> None:
            self._waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _forget(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Limited
