"""The routes of the server."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel

from ..version import __version__
from . import metrics
from .described import BODY, EVENTS, METRICS, PICTURE, TOO_MUCH, UNFINISHED, Responses, name_models, told
from .guard import Guard, key_check
from .options import MIB
from .orders import Failure, Order, Watch
from .receiving import CLOSED, ResultResponse, receive, wait
from .server import Server
from .store import Job, NoRoom

PAGE = Path(__file__).parent / "page"
HEARTBEAT_S = 15.0
POLL_S = 0.2  # how often a job's events are looked for
JOBS_ADVICE = "send a smaller picture, or post it to /v1/jobs"


class JobState(BaseModel):
    """A job: queued, running, done or failed; then with the status that the answer would have had."""

    id: str
    state: str
    progress: float
    created: float
    expires: float | None = None
    status: int | None = None
    error: str | None = None
    result: str | None = None


class ModelFacts(BaseModel):
    """A model of the server."""

    name: str
    scale: int
    summary: str
    default: bool
    licence: str
    notice: str


def build_app(server: Server) -> FastAPI:
    """Make the application of a server; it begins and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await asyncio.to_thread(server.close)

    app: FastAPI = FastAPIOffline(
        title="sr-serve",
        summary="Super-resolution of pictures.",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={401: told("No API key, or another one."), 422: told("What was sent cannot be used.")},
    )
    app.add_middleware(Guard, max_body=server.options.max_body_mib * MIB, count=server.metrics.count)
    app.add_exception_handler(Failure, _answer_failure)
    app.add_exception_handler(sqlite3.Error, _answer_full_store)
    app.add_exception_handler(Exception, _answer_mistake)
    keyed = [Depends(key_check(server.options.keys))]
    if server.options.keys:  # so that the documentation knows
        keyed.append(Depends(HTTPBearer(auto_error=False)))
    app.include_router(_pictures(server), dependencies=keyed)
    app.include_router(_jobs(server), dependencies=keyed)
    app.include_router(_health(server, keyed))
    app.include_router(_page())
    name_models(app.openapi(), [facts["name"] for facts in server.models.describe()])  # it keeps what it gives
    return app


def _page() -> APIRouter:
    """Give out the files of the page, and nothing else."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        @router.api_route(path, methods=["GET", "HEAD"])
        async def give() -> FileResponse:
            return FileResponse(file)

    for file in PAGE.iterdir():
        add(f"/{file.name}", file)
    add("/", PAGE / "index.html")
    return router


def _pictures(server: Server) -> APIRouter:
    router = APIRouter(tags=["pictures"])
    failures: Responses = {500: told("The engine failed."), 503: told("Out of memory."), 504: told("Not done in time.")}
    at_once: Responses = {200: PICTURE, **failures, **TOO_MUCH}

    @router.post("/v1/upscale", response_class=Response, responses=at_once, openapi_extra=BODY)
    async def upscale(request: Request, order: Annotated[Order, Query()]) -> Response:
        """Enlarge a picture and answer with the result; the work stops if the client leaves."""
        server.models.check(order)
        source = await _received(request, server, needs_place=True)
        try:
            server.desk.take_place()
        except Failure:
            source.unlink()
            raise
        try:
            watch = Watch(server.options.request_s, advice=JOBS_ADVICE)
            target = await wait(request, server.desk.submit(order, source, watch), watch)
        except BaseException:
            server.desk.give_back()
            raise
        if target is None:
            server.desk.give_back()
            return Response(status_code=CLOSED)
        return ResultResponse(
            target, media_type=order.media_type, limit_s=server.options.transfer_s, before_end=server.desk.give_back
        )

    @router.get("/v1/models")
    async def models() -> list[ModelFacts]:
        """List the models, the default first."""
        return [ModelFacts(**facts) for facts in server.models.describe()]

    return router


async def _received(request: Request, server: Server, *, needs_place: bool) -> Path:
    """Let a picture come in, and give its file. Raises: Failure."""
    with server.desk.receive(needs_place=needs_place):
        source = server.models.new_file("source")
        await receive(request, source, limit_s=server.options.transfer_s)
        return source


def _jobs(server: Server) -> APIRouter:
    router = APIRouter(tags=["jobs"])
    unknown: Responses = {404: told("No such job, or one that has expired.")}

    @router.post("/v1/jobs", status_code=202, responses=TOO_MUCH, openapi_extra=BODY)
    async def add_job(request: Request, response: Response, order: Annotated[Order, Query()]) -> JobState:
        """Accept a picture to be enlarged later; it is done even if the server is restarted meanwhile."""
        server.models.check(order)
        source = await _received(request, server, needs_place=False)
        try:
            name = await asyncio.to_thread(server.store.add, order.model_dump_json(), source)
        except NoRoom as exc:
            full = "the store of jobs is full: fetch and remove some, or try again later"
            raise Failure(429, full, retry_after_s=60) from exc
        finally:
            source.unlink()
        server.runner.wake()
        response.headers["Location"] = f"/v1/jobs/{name}"
        return await find(name)

    @router.get("/v1/jobs/{name}", responses=unknown)
    async def job(name: str) -> JobState:
        """Tell how far a job is."""
        return await find(name)

    @router.get("/v1/jobs/{name}/events", response_class=StreamingResponse, responses={**unknown, 200: EVENTS})
    async def events(name: str) -> Response:
        """Tell how far a job is whenever that changes, until it is done or failed."""
        first = await find(name)

        async def follow() -> AsyncIterator[str]:
            state = first
            yield _event(state)
            silent = 0
            while state.state in ("queued", "running") and not server.draining.is_set():
                await asyncio.sleep(POLL_S)
                silent += 1
                if silent * POLL_S > HEARTBEAT_S:
                    silent = 0
                    yield ": still waiting\n\n"  # proxies cut what says nothing for a minute
                try:
                    now = await find(name)
                except Failure as exc:
                    yield f"event: removed\ndata: {json.dumps({'detail': exc.message})}\n\n"
                    return
                if now != state:
                    yield _event(now)
                    state = now

        return StreamingResponse(follow(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.get("/v1/jobs/{name}/result", response_class=Response, responses={**unknown, 200: PICTURE, 409: UNFINISHED})
    async def result(name: str) -> Response:
        """Give the result of a job that is done."""
        found = await asyncio.to_thread(server.store.get, name)
        if found is None or found.state != "done":
            state = await find(name)
            raise Failure(409, state.error or f"the job is {state.state}")
        media_type = Order.model_validate_json(found.order).media_type
        headers = {"Content-Length": str(found.bytes)}
        return StreamingResponse(server.store.pieces(name), media_type=media_type, headers=headers)

    @router.delete("/v1/jobs/{name}", status_code=204, responses=unknown)
    async def remove(name: str) -> None:
        """Forget a job and its result, and stop its work."""
        if not await asyncio.to_thread(server.runner.remove, name):
            raise _unknown_job()

    async def find(name: str) -> JobState:
        found = await asyncio.to_thread(server.store.get, name)
        if found is None:
            raise _unknown_job()
        return _state(found, server.runner.share(name))

    return router


def _unknown_job() -> Failure:
    return Failure(404, "no such job, or one that has expired")


def _state(job: Job, share: float | None) -> JobState:
    return JobState(
        id=job.id,
        state=job.state,
        progress=1.0 if job.state == "done" else round(share or 0.0, 3),
        created=job.created,
        expires=job.expires,
        status=job.status,
        error=job.error,
        result=f"/v1/jobs/{job.id}/result" if job.state == "done" else None,
    )


def _event(state: JobState) -> str:
    return f"event: {state.state}\ndata: {state.model_dump_json()}\n\n"


def _health(server: Server, keyed: Sequence[Any]) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answer while the process is alive."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: told("Not yet, or not any more.")})
    async def readyz() -> dict[str, str]:
        """Answer 200 while new work is welcome: the default model is warm, and the server is not about to end."""
        if server.draining.is_set():
            raise Failure(503, "the server is about to end")
        if not server.warmed.is_set():
            raise Failure(503, "the model is being opened")
        if server.desk.is_stuck:
            raise Failure(503, "every worker is at a picture that takes longer than it may, and cannot be stopped")
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response, responses={200: METRICS}, dependencies=[*keyed])
    async def tell_metrics() -> Response:
        """Tell what Prometheus collects."""
        return Response(await asyncio.to_thread(server.metrics.text), media_type=metrics.CONTENT_TYPE)

    return router


def _answer_failure(_: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, Failure)
    headers = {} if exc.retry_after_s is None else {"Retry-After": str(exc.retry_after_s)}
    return JSONResponse({"detail": exc.message}, exc.status, headers)


def _answer_full_store(_: Request, exc: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"the store of jobs cannot be written ({exc})"}, 507)


def _answer_mistake(_: Request, exc: Exception) -> JSONResponse:
    """Answer what we did not expect; Starlette raises it again, so that the log has it."""
    return JSONResponse({"detail": "the server made a mistake; its log tells more"}, 500)
