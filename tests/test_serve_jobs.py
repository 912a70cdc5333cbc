"""/v1/jobs: accepted work is done, told of, stopped, and survives the end of the server."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
from pathlib import Path

import bundles
import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("fastapi")

import serving
from serving import Slow, decoded, encoded, left_files, photo, until

from sdk import ImageError, Upscaler
from sdk.serve import jobs, models
from sdk.serve import server as servers
from sdk.serve.server import WORK
from sdk.serve.store import Store


@pytest.fixture(scope="module")
def upscaler():
    with Upscaler(bundles.shared("blur"), backend="onnxruntime", device="cpu") as made:
        yield made


def follow(client: httpx.Client, name: str) -> list[tuple[str, dict]]:
    """Read a job's events to their end."""
    with client.stream("GET", f"/v1/jobs/{name}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = "".join(answer.iter_text()).split("\n\n")
    events = []
    for part in parts[:-1]:
        event, data = part.split("\n")
        events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def add(client: httpx.Client, image: np.ndarray, **params: object) -> str:
    answer = client.post("/v1/jobs", params=params, content=encoded(image))
    assert answer.status_code == 202, answer.text
    name = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/jobs/{name}"
    return name


def state(client: httpx.Client, name: str) -> str:
    return client.get(f"/v1/jobs/{name}").json()["state"]


def test_a_job_is_accepted_done_fetched_and_removed(tmp_path, upscaler):
    with serving.client(serving.make_server(tmp_path / "state")) as client:
        image = photo()
        name = add(client, image, format="webp", quality=100)
        events = follow(client, name)
        assert events[-1][0] == "done"
        assert events[-1][1] == client.get(f"/v1/jobs/{name}").json()
        assert events[-1][1]["progress"] == 1
        assert events[-1][1]["expires"] > events[-1][1]["created"]
        answer = client.get(events[-1][1]["result"])
        assert answer.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
        assert client.delete(f"/v1/jobs/{name}").status_code == 204
        for path in (f"/v1/jobs/{name}", f"/v1/jobs/{name}/result", f"/v1/jobs/{name}/events"):
            assert client.get(path).status_code == 404
        assert client.delete(f"/v1/jobs/{name}").status_code == 404
        plain = add(client, image)
        follow(client, plain)
        np.testing.assert_array_equal(decoded(client.get(f"/v1/jobs/{plain}/result").content), upscaler.upscale(image))


def test_a_job_that_fails_says_why(tmp_path):
    server = serving.make_server(tmp_path / "state")
    with serving.client(server) as client:
        name = client.post("/v1/jobs", content=b"hello").json()["id"]
        event, told = follow(client, name)[-1]
        assert event == "failed"
        assert told["error"] == "the picture: not a picture in a known format"
        answer = client.get(f"/v1/jobs/{name}/result")
        assert (answer.status_code, answer.json()["detail"]) == (409, told["error"])
        assert state(client, add(client, photo())) in ("queued", "running", "done")  # others go on
        assert client.post("/v1/jobs", params={"model": "no"}, content=b"x").status_code == 422
    until(lambda: not left_files(server))


def test_progress_is_told_and_a_removed_job_stops(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    server = serving.make_server(tmp_path / "state", job_workers=1)
    with serving.client(server) as client:
        name, waiting = add(client, photo()), add(client, photo())
        assert slow.begun.acquire(timeout=serving.WAIT_S)
        until(lambda: client.get(f"/v1/jobs/{name}").json()["progress"] == 0.5)
        assert state(client, name) == "running"
        assert state(client, waiting) == "queued"
        assert client.get(f"/v1/jobs/{name}/result").status_code == 409
        client.delete(f"/v1/jobs/{name}")
        assert slow.ended.wait(serving.WAIT_S)
        slow.go.set()
        assert follow(client, waiting)[-1][0] == "done"
    until(lambda: not left_files(server))


def test_events_of_a_job_that_is_removed_end(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with serving.client(serving.make_server(tmp_path / "state")) as client:
        name = add(client, photo())
        assert slow.begun.acquire(timeout=serving.WAIT_S)
        with client.stream("GET", f"/v1/jobs/{name}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: running"
            client.delete(f"/v1/jobs/{name}")
            rest = list(lines)
        assert "event: removed" in rest
        slow.go.set()


def test_a_job_that_takes_too_long_fails(tmp_path, monkeypatch):
    Slow(monkeypatch)
    with serving.client(serving.make_server(tmp_path / "state", job_s=0.2)) as client:
        assert follow(client, add(client, photo()))[-1][1]["error"] == "not done within 0.2 s: send a smaller picture"


def test_a_full_store_takes_no_more(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with serving.client(serving.make_server(tmp_path / "state", max_state_mib=1)) as client:
        large = np.zeros((800, 800, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(large).save(stream, "BMP")  # 1.9 MB
        answer = client.post("/v1/jobs", content=stream.getvalue())
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        add(client, photo())
        slow.go.set()


def test_a_store_that_fails_is_told_and_recovered_from(tmp_path, monkeypatch):
    server = serving.make_server(tmp_path / "state")
    with serving.client(server) as client:
        finish, failures = server.store.finish, iter([1])

        def full(name: str, result: Path) -> None:
            if next(failures, None):
                raise sqlite3.OperationalError("database or disk is full")
            finish(name, result)

        monkeypatch.setattr(server.store, "finish", full)
        lost = follow(client, add(client, photo()))[-1]
        assert lost[0] == "failed"
        assert lost[1]["error"] == "the server has no room for it (database or disk is full)"
        assert follow(client, add(client, photo()))[-1][0] == "done"

        def refuse(order: str, source: Path) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(server.store, "add", refuse)
        answer = client.post("/v1/jobs", content=encoded(photo()))
        assert answer.status_code == 507
        assert "disk is full" in answer.json()["detail"]
    until(lambda: not left_files(server))


def test_an_end_that_could_not_be_kept_is_kept_later(tmp_path, monkeypatch):
    server = serving.make_server(tmp_path / "state")
    fail, failures = server.store.fail, iter([1, 1])

    def full(name: str, status: int, error: str) -> None:
        if next(failures, None):
            raise sqlite3.OperationalError("database or disk is full")
        fail(name, status, error)

    monkeypatch.setattr(server.store, "fail", full)
    with serving.client(server) as client:
        assert follow(client, client.post("/v1/jobs", content=b"hello").json()["id"])[-1][0] == "failed"


def test_threads_outlive_whatever_happens_to_the_store(tmp_path, monkeypatch):
    server = serving.make_server(tmp_path / "state", job_workers=1)
    take, failures = server.store.take, iter([MemoryError(), sqlite3.OperationalError("locked"), OSError()])

    def spoilt():
        if error := next(failures, None):
            raise error
        return take()

    monkeypatch.setattr(server.store, "take", spoilt)
    monkeypatch.setattr(jobs, "IDLE_S", 0.01)
    with serving.client(server) as client:
        assert follow(client, add(client, photo()))[-1][0] == "done"


def test_an_order_that_cannot_be_read_fails(tmp_path):
    server = serving.make_server(tmp_path / "state")
    (tmp_path / "picture").write_bytes(encoded(photo()))
    with serving.client(server) as client:
        name = server.store.add("no order", tmp_path / "picture")
        server.runner.wake()
        event, told = follow(client, name)[-1]
        assert (event, told["status"]) == ("failed", 500)


def test_a_job_whose_model_is_gone_says_so(tmp_path):
    with serving.client(serving.make_server(tmp_path / "state", grace_s=0)) as client:
        add(client, photo(), model="blur")
        name = add(client, photo(), model="blur")
    with serving.client(serving.make_server(tmp_path / "state", models=(str(bundles.shared("unet")),))) as client:
        state = follow(client, name)[-1][1]
        assert state["state"] == "done" or state["error"] == "model 'blur': this server has unet"


def test_a_result_without_room_fails(tmp_path, monkeypatch):
    server = serving.make_server(tmp_path / "state")
    monkeypatch.setattr(server.store, "_max_bytes", 20_000)
    with serving.client(server) as client:
        name = add(client, np.zeros((100, 100, 3), np.uint8), format="bmp")  # 120 kB
        assert "no room for the result" in follow(client, name)[-1][1]["error"]


def test_work_that_cannot_be_stopped_does_not_keep_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STOP_S", 0.2)
    begun, go = threading.Semaphore(0), threading.Event()

    def stuck(*arguments: object, **options: object) -> None:
        begun.release()
        go.wait(serving.WAIT_S)
        raise ImageError("at last")

    monkeypatch.setattr(models.jobs, "run_file", stuck)
    server = serving.make_server(tmp_path / "state", workers=1, request_s=0.1, grace_s=0)
    with serving.client(server) as client:
        name = add(client, photo())
        assert begun.acquire(timeout=serving.WAIT_S)
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/upscale", content=encoded(photo())).status_code == 504
        assert client.get("/readyz").status_code == 503  # the only worker is stuck
    assert not server.is_still
    go.set()
    store = Store(tmp_path / "state", keep_s=1, max_bytes=1)
    assert store.get(name).state == "queued"
    store.close()


def test_jobs_left_at_the_end_are_done_by_the_next_server(tmp_path, monkeypatch, upscaler):
    with monkeypatch.context() as patched:
        slow = Slow(patched)
        server = serving.make_server(tmp_path / "state", job_workers=1, grace_s=0)
        with serving.client(server) as client:
            begun, waiting = add(client, photo()), add(client, photo(seed=1))
            assert slow.begun.acquire(timeout=serving.WAIT_S)
        assert slow.ended.is_set()
    with serving.client(serving.make_server(tmp_path / "state")) as client:
        for name, seed in ((begun, 0), (waiting, 1)):
            assert follow(client, name)[-1][0] == "done"
            result = decoded(client.get(f"/v1/jobs/{name}/result").content)
            np.testing.assert_array_equal(result, upscaler.upscale(photo(seed=seed)))


def test_a_server_that_is_killed_loses_no_job(tmp_path, upscaler):
    image = photo(1500, 1500)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=0)
    with serving.Command(tmp_path / "state", "--memory", "1") as command:  # many windows, so that it takes a while
        client = httpx.Client(base_url=command.address, timeout=serving.WAIT_S)
        names = [client.post("/v1/jobs", content=stream.getvalue()).json()["id"] for _ in range(3)]
        until(lambda: 0 < client.get(f"/v1/jobs/{names[0]}").json()["progress"] < 1)
        command.kill()
        client.close()
    assert list((tmp_path / "state" / WORK).iterdir())  # what a killed process leaves
    with (
        serving.Command(tmp_path / "state", "--memory", "1") as command,
        httpx.Client(base_url=command.address, timeout=serving.WAIT_S) as client,
    ):
        for name in names:
            until(lambda name=name: state(client, name) in ("done", "failed"))
            result = decoded(client.get(f"/v1/jobs/{name}/result").content)
            np.testing.assert_array_equal(result, upscaler.upscale(image))
        until(lambda: not list((tmp_path / "state" / WORK).iterdir()))
        assert command.end() == 0


def test_a_server_that_is_told_to_end_finishes_what_is_under_way(tmp_path):
    image = encoded(photo(700, 700))
    with serving.Command(tmp_path / "state", "--memory", "1") as command:
        with httpx.Client(base_url=command.address, timeout=serving.WAIT_S) as client:
            until(lambda: client.get("/readyz").status_code == 200)
            name = client.post("/v1/jobs", content=image).json()["id"]
            until(lambda: state(client, name) != "queued")
        assert command.end() == 0
        assert "Traceback" not in command.log
    with (
        serving.Command(tmp_path / "state") as command,
        httpx.Client(base_url=command.address, timeout=serving.WAIT_S) as client,
    ):
        assert state(client, name) == "done"
