"""What every request passes through: limits on its body, where it comes from, headers of the answer, and a count."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The page runs its own script, shows pictures that it has fetched, and speaks to nobody else. The documentation's page
# has a script inside.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = PAGE_POLICY.replace("-src 'self';", "-src 'self' 'unsafe-inline';", 2)
DOCS = ("/docs", "/redoc")
# (route, method, status, seconds) -> None
Count = Callable[[str, str, int, float], None]


class Guard:
    """ASGI middleware around the application.

    max_body: bytes. count: told of each answer.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, count: Count):
        self._app, self._max_body, self._count = app, max_body, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that may come in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # what is counted if the client leaves before an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = DOCS_POLICY if scope["path"] in DOCS else PAGE_POLICY
            await send(message)

        try:
            if refusal := self._refuse(scope):
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, self._counted(receive), answer)
        except Exception:  # a mistake of ours, which is answered outside
            status = 500
            raise
        finally:
            # Not the path: whoever asks for many would fill the memory with names.
            route = getattr(scope.get("route"), "path", "other")
            self._count(route, scope["method"], status, time.monotonic() - started)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_of_another_site(headers):
            return JSONResponse({"detail": "requests from the pages of other sites are not taken"}, 403)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        return JSONResponse({"detail": f"the body has more than {self._max_body} bytes"}, 413)

    def _counted(self, receive: Receive) -> Receive:
        """Count the bytes of a body as they come: a client need not tell how many there will be."""
        left = self._max_body

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body has more than {self._max_body} bytes")
            return message

        return counted


def _is_of_another_site(headers: Headers) -> bool:
    """Tell whether a browser sends a request for a page that is not ours; other clients send neither header."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")  # over plain http browsers tell no more
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def key_check(keys: Iterable[str]) -> Callable[[Request], None]:
    """Give a dependency that lets only requests with one of the keys pass, or all if there are none.

    The dependency raises HTTPException 401.
    """
    known = [key.encode() for key in keys]

    def check(request: Request) -> None:
        if not known:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in known):
            raise HTTPException(401, "an API key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    return check
