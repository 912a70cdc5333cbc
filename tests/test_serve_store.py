"""The store of jobs: what has been accepted is kept, in order, within bounds, and by one server."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from sdk import OutputError
from sdk.serve.store import MAX_ATTEMPTS, PIECE_BYTES, ROW_BYTES, NoRoom, Store

ROOT = Path(__file__).parent.parent


def open_store(folder: Path, *, keep_s: float = 1000, max_bytes: int = 1 << 30) -> Store:
    return Store(folder, keep_s=keep_s, max_bytes=max_bytes)


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path / "state")
    yield made
    made.close()


def as_file(data: bytes) -> Path:
    with tempfile.NamedTemporaryFile(delete=False) as stream:
        stream.write(data)
    return Path(stream.name)


def add(store: Store, data: bytes = b"source", order: str = "order") -> str:
    path = as_file(data)
    try:
        return store.add(order, path)
    finally:
        path.unlink()


def finish(store: Store, name: str, data: bytes = b"result") -> None:
    path = as_file(data)
    try:
        store.finish(name, path)
    finally:
        path.unlink()


def content(store: Store, name: str) -> bytes:
    return b"".join(store.pieces(name))


def test_jobs_come_out_in_the_order_they_came_in(store):
    names = [add(store, bytes([number]), f"order {number}") for number in range(3)]
    assert len(set(names)) == 3
    assert [store.take() for _ in range(4)] == [(name, f"order {n}") for n, name in enumerate(names)] + [None]
    assert [content(store, name) for name in names] == [b"\0", b"\1", b"\2"]
    assert store.counts() == {"queued": 0, "running": 3, "done": 0, "failed": 0}


def test_a_job_goes_from_queued_to_done(store):
    name = add(store)
    assert store.get(name).state == "queued"
    store.take()
    assert store.get(name).state == "running"
    before = time.time()
    finish(store, name)
    job = store.get(name)
    assert (job.state, job.order, job.error, job.bytes) == ("done", "order", None, 6)
    assert before + 1000 <= job.expires <= time.time() + 1000
    assert content(store, name) == b"result"


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 1])
def test_sources_and_results_stand_in_pieces(store, size):
    data = os.urandom(size)
    name = add(store, data)
    assert content(store, name) == data
    finish(store, name, data[::-1])
    assert content(store, name) == data[::-1]
    assert max([len(piece) for piece in store.pieces(name)], default=0) <= PIECE_BYTES


def test_a_failed_job_tells_why(store):
    name = add(store)
    store.take()
    store.fail(name, 422, "not a picture")
    job = store.get(name)
    assert (job.state, job.status, job.error, job.bytes) == ("failed", 422, "not a picture", 0)
    assert content(store, name) == b""


def test_what_is_removed_stays_removed(store):
    name = add(store)
    store.take()
    assert store.remove(name)
    assert not store.remove(name)
    finish(store, name)
    store.release(name)
    store.fail(name, 500, "late")
    assert store.get(name) is None
    assert content(store, name) == b""
    assert store.take() is None


def test_what_is_removed_is_gone_from_the_disk(tmp_path):
    secret = b"a picture that nobody else should see" * 100
    store = open_store(tmp_path / "state")
    name = add(store, secret)
    finish(store, name, secret)
    store.remove(name)
    store.close()
    for path in (tmp_path / "state").iterdir():
        assert secret[:37] not in path.read_bytes(), path.name
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_store_has_bounds_and_room_again(tmp_path):
    store = open_store(tmp_path, max_bytes=1000 + 2 * ROW_BYTES)
    first = add(store, bytes(600))
    with pytest.raises(NoRoom):
        add(store, bytes(401))
    second = add(store, bytes(400))
    with pytest.raises(NoRoom):
        add(store, b"")  # a job counts by itself
    store.take()
    with pytest.raises(NoRoom):
        finish(store, first, bytes(601))
    assert store.get(first).state == "running"
    assert content(store, first) == bytes(600)
    finish(store, first, bytes(10))  # which takes the place of the source
    store.remove(second)
    add(store, bytes(990))
    store.close()


def test_results_are_forgotten_when_their_time_is_over(tmp_path):
    store = open_store(tmp_path, keep_s=0.01)
    done, waiting = add(store, b"1"), add(store, b"2")
    store.take()
    finish(store, done, bytes(1 << 20))
    size = (tmp_path / "jobs.sqlite").stat().st_size + (tmp_path / "jobs.sqlite-wal").stat().st_size
    time.sleep(0.02)
    assert store.get(done) is None  # also before it is swept
    assert store.sweep() == 1
    assert content(store, done) == b""
    assert store.get(waiting).state == "queued"
    store.close()
    assert (tmp_path / "jobs.sqlite").stat().st_size < size / 2


def test_jobs_under_way_at_a_crash_are_done_again_but_not_for_ever(tmp_path):
    store = open_store(tmp_path)
    name, later = add(store), None
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert store.take() == (name, "order")
        assert content(store, name) == b"source"
        store.close()  # as if the process were gone: nothing is told of the job
        store = open_store(tmp_path)
        assert store.get(name).state == ("queued" if attempt < MAX_ATTEMPTS else "failed")
        later = later or add(store, b"source", "later")
    assert "3 times" in store.get(name).error
    assert content(store, name) == b""
    assert store.take()[0] == later
    store.close()


@pytest.mark.parametrize("is_released", [True, False])
def test_a_job_is_not_to_blame_for_a_server_that_was_told_to_end(tmp_path, is_released):
    store = open_store(tmp_path)
    name = add(store)
    for _ in range(MAX_ATTEMPTS + 1):
        store.take()
        store.spare()
        if is_released:
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
    name = add(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        finish(store, name, bytes(100_000))
    assert store.get(name).state == "queued"
    assert store.take() == (name, "order")
    assert content(store, name) == b"source"


def test_many_threads_take_each_job_once(store):
    names = {add(store) for _ in range(40)}
    taken: list[str] = []

    def work() -> None:
        while job := store.take():
            finish(store, job[0])
            taken.append(job[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(names)
