"""Jobs in an SQLite database: what has been accepted is there after a restart, and after a crash.

Sources and results stand in pieces, so that neither is ever in memory as a whole.
"""

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
    bytes INTEGER NOT NULL      -- of its pieces: the source's, then the result's
);
CREATE INDEX jobs_by_state ON jobs (state, created);
CREATE TABLE pieces (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job, number)
);
"""
PIECE_BYTES = 1 << 20
ROW_BYTES = 4096  # that a job counts besides its pieces
LOG_BYTES = 64 << 20  # that SQLite's log keeps on the disk
BUSY_S = 30
MAX_ATTEMPTS = 3  # a picture that ends the server is not tried for ever


@dataclass(frozen=True)
class Job:
    """What is known of a job. state: queued, running, done or failed; times in seconds since 1970.

    bytes: of its source, or of its result once it is done.
    """

    id: str
    state: str
    order: str
    created: float
    expires: float | None
    status: int | None
    error: str | None
    bytes: int


class NoRoom(Exception):
    """The store holds as many bytes as it may."""


class Store:
    """The jobs of one server.

    folder: made if missing, for the owner alone. keep_s: how long a finished job is kept. max_bytes: of all jobs.
    Raises: OutputError if the folder cannot be written, another server uses it, or another version made it.
    Thread-safe: a connection for each thread.
    """

    def __init__(self, folder: Path, *, keep_s: float, max_bytes: int):
        self._path, self._keep_s, self._max_bytes = folder / "jobs.sqlite", keep_s, max_bytes
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._hold = _hold(folder / "lock.sqlite")
            with self._transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version not in (0, SCHEMA_VERSION):
                    raise OutputError(f"{self._path}: of another version of sr-serve; choose another folder")
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
        guilty = "state = 'running' AND attempts >= ?"
        db.execute(f"DELETE FROM pieces WHERE job IN (SELECT id FROM jobs WHERE {guilty})", (MAX_ATTEMPTS,))
        db.execute(
            f"UPDATE jobs SET state = 'failed', status = 500, expires = ?, error = ?, bytes = 0 WHERE {guilty}",
            (
                time.time() + self._keep_s,
                f"the server ended {MAX_ATTEMPTS} times while it was at work on it",
                MAX_ATTEMPTS,
            ),
        )
        db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")

    def add(self, order: str, source: Path) -> str:
        """Accept a job, for good when this returns; give its name. Raises: NoRoom, OSError, sqlite3.Error."""
        name = secrets.token_urlsafe(16)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO jobs (id, state, job_order, created, bytes) VALUES (?, 'queued', ?, ?, ?)",
                (name, order, time.time(), source.stat().st_size),
            )
            self._put(db, name, source)
        return name

    def _put(self, db: sqlite3.Connection, name: str, file: Path) -> None:
        """Make a file the pieces of a job. Raises: NoRoom."""
        (total,) = db.execute(f"SELECT SUM(bytes + {ROW_BYTES}) FROM jobs").fetchone()
        if total > self._max_bytes:
            raise NoRoom
        with file.open("rb") as stream:
            number = 0
            while data := stream.read(PIECE_BYTES):
                db.execute("INSERT INTO pieces (job, number, data) VALUES (?, ?, ?)", (name, number, data))
                number += 1

    def take(self) -> tuple[str, str] | None:
        """Take the oldest job that waits: its name and order."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT id, job_order FROM jobs WHERE state = 'queued' ORDER BY created, rowid LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            db.execute("UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE id = ?", (row[0],))
            return row[0], row[1]

    def pieces(self, name: str) -> Iterator[bytes]:
        """Give the source of a job, or its result once it is done, piece by piece; nothing if it is not known."""
        number = 0
        while row := self._db.execute(
            "SELECT data FROM pieces WHERE job = ? AND number = ?", (name, number)
        ).fetchone():
            yield row[0]
            number += 1

    def finish(self, name: str, result: Path) -> None:
        """Keep a job's result; one that was removed meanwhile stays so. Raises: NoRoom, OSError, sqlite3.Error."""
        with self._transaction() as db:
            db.execute("DELETE FROM pieces WHERE job = ?", (name,))
            changed = db.execute(
                "UPDATE jobs SET state = 'done', expires = ?, bytes = ? WHERE id = ?",
                (time.time() + self._keep_s, result.stat().st_size, name),
            )
            if changed.rowcount:
                self._put(db, name, result)

    def fail(self, name: str, status: int, error: str) -> None:
        """Keep why a job failed."""
        with self._transaction() as db:
            db.execute("DELETE FROM pieces WHERE job = ?", (name,))
            db.execute(
                "UPDATE jobs SET state = 'failed', status = ?, error = ?, expires = ?, bytes = 0 WHERE id = ?",
                (status, error, time.time() + self._keep_s, name),
            )

    def spare(self) -> None:
        """Do not count the attempts that are under way: the server is about to end, and they are not to blame."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET attempts = 0 WHERE state = 'running'")

    def release(self, name: str) -> None:
        """Let a job that was begun wait again."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET state = 'queued' WHERE id = ? AND state = 'running'", (name,))

    def remove(self, name: str) -> bool:
        """Forget a job; False if it is not known."""
        with self._transaction() as db:
            return db.execute("DELETE FROM jobs WHERE id = ?", (name,)).rowcount > 0

    def get(self, name: str) -> Job | None:
        """Tell what is known of a job."""
        row = self._db.execute(
            "SELECT id, state, job_order, created, expires, status, error, bytes FROM jobs "
            "WHERE id = ? AND (expires IS NULL OR expires > ?)",
            (name, time.time()),
        ).fetchone()
        return Job(*row) if row else None

    def counts(self) -> dict[str, int]:
        """Count the jobs in each state."""
        found = dict(self._db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in ("queued", "running", "done", "failed")}

    def sweep(self) -> int:
        """Forget the jobs whose time is over, and give their room on the disk back; tell how many."""
        with self._transaction() as db:
            count = db.execute("DELETE FROM jobs WHERE expires < ?", (time.time(),)).rowcount
        self._db.executescript("PRAGMA incremental_vacuum")  # execute() would give a single page back
        return count

    def close(self) -> None:
        """Close the database, and let another server have it."""
        with self._lock:
            for connection in (*self._connections, self._hold):
                connection.close()

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection of this thread."""
        if not hasattr(self._local, "db"):
            # check_same_thread: all are closed by the thread that closes the store.
            db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            with self._lock:
                self._connections.append(db)
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded when the file is made
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # accepted is accepted, even if the power fails
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
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
