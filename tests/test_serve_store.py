"""The store of jobs: what has been accepted is kept, in order, within bounds, and by one server."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdk import OutputError
from sdk.serve import store as stores
from sdk.serve.store import MAX_ATTEMPTS, Store

ROOT = Path(__file__).parent.parent


def open_store(folder: Path, *, keep_s: float = 1000, max_bytes: int = 1000) -> Store:
    return Store(folder, keep_s=keep_s, max_bytes=max_bytes)


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path)
    yield made
    made.close()


def test_jobs_come_out_in_the_order_they_came_in(store):
    names = [store.add(f"order {number}", bytes([number])) for number in range(3)]
    assert len(set(names)) == 3
    assert [store.take() for _ in range(4)] == [
        (name, f"order {number}", bytes([number])) for number, name in enumerate(names)
    ] + [None]
    assert store.counts() == {"queued": 0, "running": 3, "done": 0, "failed": 0}


def test_a_job_goes_from_queued_to_done(store):
    name = store.add("order", b"source")
    assert store.get(name).state == "queued"
    assert store.result(name) is None
    store.take()
    assert store.get(name).state == "running"
    before = time.time()
    store.finish(name, b"result")
    job = store.get(name)
    assert (job.state, job.order, job.error) == ("done", "order", None)
    assert before + 1000 <= job.expires <= time.time() + 1000
    assert store.result(name) == b"result"


def test_a_failed_job_tells_why(store):
    name = store.add("order", b"source")
    store.take()
    store.fail(name, 422, "not a picture")
    job = store.get(name)
    assert (job.state, job.status, job.error) == ("failed", 422, "not a picture")
    assert store.result(name) is None


def test_what_is_removed_stays_removed(store):
    name = store.add("order", b"source")
    store.take()
    assert store.remove(name)
    assert not store.remove(name)
    store.finish(name, b"result")
    store.release(name)
    assert store.get(name) is None
    assert store.take() is None


def test_a_store_has_bounds_and_room_again(store):
    first = store.add("order", bytes(600))
    assert store.add("order", bytes(401)) is None
    second = store.add("order", bytes(400))
    assert store.add("order", b"1") is None
    store.take()
    store.finish(first, bytes(10))  # which takes the place of the source
    assert store.add("order", bytes(500))
    store.remove(second)
    assert store.add("order", bytes(490))


def test_results_are_forgotten_when_their_time_is_over(tmp_path):
    store = open_store(tmp_path, keep_s=0.01)
    done, waiting = store.add("order", b"1"), store.add("order", b"2")
    store.take()
    store.finish(done, b"result")
    time.sleep(0.02)
    assert store.sweep() == 1
    assert store.get(done) is None
    assert store.get(waiting).state == "queued"
    store.close()


def test_jobs_under_way_at_a_crash_are_done_again_but_not_for_ever(tmp_path):
    store = open_store(tmp_path)
    name, later = store.add("order", b"source"), None
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert store.take() == (name, "order", b"source")
        store.close()  # as if the process were gone: nothing is told of the job
        store = open_store(tmp_path)
        assert store.get(name).state == ("queued" if attempt < MAX_ATTEMPTS else "failed")
        later = later or store.add("later", b"source")
    assert "3 times" in store.get(name).error
    assert store.take()[0] == later
    store.close()


def test_a_job_given_back_was_not_tried(tmp_path):
    store = open_store(tmp_path)
    name = store.add("order", b"source")
    for _ in range(MAX_ATTEMPTS + 1):
        store.take()
        store.release(name)
        store.close()
        store = open_store(tmp_path)
    assert store.get(name).state == "queued"
    store.close()


def test_one_server_at_a_time(tmp_path):
    store = open_store(tmp_path)
    code = f"import pathlib, sdk.serve.store as s; s.Store(pathlib.Path({str(tmp_path)!r}), keep_s=1, max_bytes=1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"{tmp_path}: another sr-serve keeps its jobs there; choose another folder" in done.stderr
    store.close()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: folder.write_bytes(b""), "jobs cannot be kept there"),
        (lambda folder: (folder.mkdir(), (folder / "jobs.sqlite").write_bytes(b"rubbish" * 100)), "not a database"),
        (lambda folder: (folder.mkdir(), (folder / "jobs.sqlite").mkdir()), "jobs cannot be kept there"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(tmp_path, spoil, told):
    spoil(tmp_path / "state")
    with pytest.raises(OutputError, match=told):
        open_store(tmp_path / "state")


def test_a_store_of_another_version_is_left_alone(tmp_path):
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(OutputError, match="of another version of sr-serve"):
        open_store(tmp_path)
    open_store(tmp_path / "other").close()


def test_a_full_disk_loses_nothing(store):
    name = store.add("order", b"source")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.finish(name, bytes(100_000))
    assert store.get(name).state == "queued"
    assert store.take() == (name, "order", b"source")


def test_many_threads_take_each_job_once(store, monkeypatch):
    monkeypatch.setattr(store, "_max_bytes", 1 << 20)
    names = {store.add("order", b"source") for _ in range(40)}
    taken: list[str] = []

    def work() -> None:
        while job := store.take():
            store.finish(job[0], b"result")
            taken.append(job[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(names)
    assert stores.SCHEMA_VERSION == 1
