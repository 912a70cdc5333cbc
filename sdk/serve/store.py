"""Jobs in an SQLite database: what has been accepted is there after a restart, and after a crash."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed')),
    job_order TEXT NOT NULL,    -- JSON of orders.Order
    created REAL NOT NULL,      -- seconds since 1970
    expires REAL,               -- when a finished job is forgotten
    attempts INTEGER NOT NULL DEFAULT 0,
    status INTEGER,             -- of a failed job, as HTTP has it
    error TEXT,
    source BLOB,                -- until the job is finished
    result BLOB
);
CREATE INDEX jobs_by_state ON jobs (state, created);
"""
BUSY_S = 30
MAX_ATTEMPTS = 3  # a picture that ends the server is not tried for ever


@dataclass(frozen=True)
class Job:
    """What is known of a job. state: queued, running, done or failed; times in seconds since 1970."""

    id: str
    state: str
    order: str
    created: float
    expires: float | None
    status: int | None
    error: str | None


class Store:
    """The jobs of one server.

    folder: made if missing. keep_s: how long a finished job is kept. max_bytes: of all sources and results.
    Raises: OutputError if the folder cannot be written, another server uses it, or another version made it.
    Thread-safe: a connection for each thread.
    """

    def __init__(self, folder: Path, *, keep_s: float, max_bytes: int):
        self._path, self._keep_s, self._max_bytes = folder / "jobs.sqlite", keep_s, max_bytes
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._hold = _hold(folder / "lock.sqlite")
            with self._transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version not in (0, SCHEMA_VERSION):
                    raise OutputError(
                        f"{self._path}: of another version of sr-serve; move it away, or use that version"
                    )
                if version == 0:
                    for statement in SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                self._recover(db)
        except (OSError, sqlite3.Error) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise OutputError(f"{folder}: jobs cannot be kept there ({reason}); choose another folder") from exc

    def _recover(self, db: sqlite3.Connection) -> None:
        """Have jobs that were under way when the server ended done again, but not for ever."""
        db.execute(
            "UPDATE jobs SET state = 'failed', status = 500, source = NULL, expires = ?, error = ? "
            "WHERE state = 'running' AND attempts >= ?",
            (time.time() + self._keep_s, f"the server ended {MAX_ATTEMPTS} times while it was at work", MAX_ATTEMPTS),
        )
        db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")

    def add(self, order: str, source: bytes) -> str | None:
        """Accept a job, for good when this returns; give its name, or None if there is no room for it."""
        name = secrets.token_urlsafe(16)
        with self._transaction() as db:
            if self._bytes(db) + len(source) > self._max_bytes:
                return None
            db.execute(
                "INSERT INTO jobs (id, state, job_order, created, source) VALUES (?, 'queued', ?, ?, ?)",
                (name, order, time.time(), source),
            )
        return name

    def take(self) -> tuple[str, str, bytes] | None:
        """Take the oldest job that waits: its name, order and source."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, job_order, source FROM jobs WHERE state = 'queued' ORDER BY created, rowid LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE id = ?", (row[0],))
            return row[0], row[1], row[2]

    def finish(self, name: str, result: bytes) -> None:
        """Keep a job's result; one that was removed meanwhile stays so."""
        self._end(name, "done", result=result)

    def fail(self, name: str, status: int, error: str) -> None:
        """Keep why a job failed."""
        self._end(name, "failed", status=status, error=error)

    def _end(
        self, name: str, state: str, *, result: bytes | None = None, status: int | None = None, error: str | None = None
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = ?, result = ?, status = ?, error = ?, source = NULL, expires = ? WHERE id = ?",
                (state, result, status, error, time.time() + self._keep_s, name),
            )

    def release(self, name: str) -> None:
        """Let a job that was begun wait again; it is not to blame."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE id = ?", (name,))

    def remove(self, name: str) -> bool:
        """Forget a job; False if it is not known."""
        with self._transaction() as db:
            return db.execute("DELETE FROM jobs WHERE id = ?", (name,)).rowcount > 0

    def get(self, name: str) -> Job | None:
        """Tell what is known of a job."""
        row = self._db.execute(
            "SELECT id, state, job_order, created, expires, status, error FROM jobs WHERE id = ?", (name,)
        ).fetchone()
        return Job(*row) if row else None

    def result(self, name: str) -> bytes | None:
        """Give the result of a job; None if it is not done, or not known."""
        row = self._db.execute("SELECT result FROM jobs WHERE id = ?", (name,)).fetchone()
        return row[0] if row else None

    def counts(self) -> dict[str, int]:
        """Count the jobs in each state."""
        found = dict(self._db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in ("queued", "running", "done", "failed")}

    def sweep(self) -> int:
        """Forget the jobs whose time is over; tell how many."""
        with self._transaction() as db:
            return db.execute("DELETE FROM jobs WHERE expires < ?", (time.time(),)).rowcount

    def close(self) -> None:
        """Close the database, and let another server have it."""
        with self._lock:
            for connection in (*self._connections, self._hold):
                connection.close()

    @staticmethod
    def _bytes(db: sqlite3.Connection) -> int:
        (total,) = db.execute("SELECT TOTAL(LENGTH(source)) + TOTAL(LENGTH(result)) FROM jobs").fetchone()
        return int(total)

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection of this thread."""
        if not hasattr(self._local, "db"):
            # check_same_thread: all are closed by the thread that closes the store.
            db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            with self._lock:
                self._connections.append(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # accepted is accepted, even if the power fails
            self._local.db = db
        connection: sqlite3.Connection = self._local.db
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back already after some errors
                db.execute("ROLLBACK")
            raise


def _hold(path: Path) -> sqlite3.Connection:
    """Hold a lock that ends with this process, however it ends. Raises: OutputError if another process has it."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as exc:
        connection.close()
        if "locked" not in str(exc):
            raise
        raise OutputError(f"{path.parent}: another sr-serve keeps its jobs there; choose another folder") from exc
    return connection
