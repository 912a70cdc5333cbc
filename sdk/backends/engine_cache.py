"""Compiled engines on disk: a header that says what they were built for, and the engine library's own bytes.

A file is: MAGIC, the length of the header (4 bytes, little endian), the header (JSON, UTF-8), the plan. What does not
fit its key to the letter, or is damaged, counts as missing, and the engine is built anew.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import stat
import sys
import time
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BackendError

LOG = logging.getLogger(__name__)
MAGIC = b"SR-SDK engine\n"
FORMAT = 1
MAX_HEADER_BYTES = 1 << 16
MAX_FILE_BYTES = 8 << 30
MAX_SIDE = 1 << 16  # of a window, in a header that is believed
LOCK_POLL_S = 0.2
STALE_S = 3600  # writing a file takes seconds


@dataclass(frozen=True)
class Key:
    """All that decides whether an engine is the right one.

    onnx, weights: SHA-256 of the stage's files. library: with its full version. gpu, capability: of the device, like
    "9.0". profile: smallest, best and largest shape. flags: of the builder, by name.
    """

    onnx: str
    weights: str
    library: str
    gpu: str
    capability: str
    precision: str
    ends: str
    profile: tuple[tuple[int, ...], ...]
    flags: tuple[str, ...]

    def digest(self) -> str:
        """Give a name for it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def cache_dir(name: str) -> Path:
    """Name a folder for what engines compile: below SR_CACHE_DIR, else ~/.cache/sr-sdk.

    Raises: RuntimeError for a user without a home folder.
    """
    return Path(os.environ.get("SR_CACHE_DIR") or Path.home() / ".cache" / "sr-sdk") / name


def engine_name(stage: str, key: Key) -> str:
    """Name the file of an engine. Stages may be called anything: only the tame part of the name goes into it."""
    tame = "".join(char for char in stage if char.isascii() and char.isalnum())[:20]
    return f"{tame or 'stage'}-{key.precision}-{key.digest()[:20]}.engine"


def read_engine(path: Path, key: Key, *, level: int = logging.WARNING) -> bytes | None:
    """Read the plan of an engine that was built for a key; None, and a line in the log, if it is not that."""
    try:
        with open(path, "rb", opener=_open_at_once) as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_FILE_BYTES:
                raise ValueError("not a file of an engine")
            found, plan = parse_engine(stream.read(facts.st_size))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, MemoryError) as exc:
        LOG.log(level, "%s: not used and built anew (%s)", path, str(exc) or type(exc).__name__)
        return None
    if found != key:
        LOG.log(level, "%s: built for something else, and built anew", path)
        return None
    return plan


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, without waiting for the other end of a pipe and without following a link."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def parse_engine(data: bytes) -> tuple[Key, bytes]:
    """Take the bytes of an engine's file apart: its key and its plan. Raises: ValueError for anything else."""
    if not data.startswith(MAGIC):
        raise ValueError("not an engine of sr-sdk")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError("damaged header")
    try:
        header = json.loads(data[start : start + length])
    except (ValueError, RecursionError) as exc:  # also bytes that are no text
        raise ValueError("damaged header") from exc
    plan = data[start + length :]
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("a header of another format")
    if header.get("sha256") != hashlib.sha256(plan).hexdigest():
        raise ValueError("damaged: its SHA-256 differs")
    try:
        key = Key(**header["key"])
        profile, flags = tuple(map(tuple, key.profile)), tuple(key.flags)
        texts = [key.onnx, key.weights, key.library, key.gpu, key.capability, key.precision, key.ends, *flags]
        is_text = all(isinstance(text, str) for text in texts)
        sides = [side for shape in profile for side in shape]
        is_profile = [len(shape) for shape in profile] == [4, 4, 4] and all(type(side) is int for side in sides)
        smallest, best, largest = profile
        if (
            not is_text
            or not is_profile
            or not all(
                1 <= low <= middle <= high <= MAX_SIDE
                for low, middle, high in zip(smallest, best, largest, strict=True)
            )
        ):
            raise ValueError(f"key {asdict(key)}")
        return replace(key, profile=profile, flags=flags), plan
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"a key of another format ({exc!r:.200})") from exc


def write_engine(path: Path, key: Key, plan: bytes, *, built: dict[str, Any]) -> None:
    """Write an engine under its name, whole or not at all. built: how, for who reads the header.

    Raises: BackendError if it cannot be written.
    """
    header = json.dumps(
        {"format": FORMAT, "key": asdict(key), "built": built, "sha256": hashlib.sha256(plan).hexdigest()}, indent=1
    ).encode()
    try:
        write_whole(path, MAGIC + len(header).to_bytes(4, "little") + header + plan)
    except OSError as exc:
        raise BackendError(f"{path}: the engine cannot be kept ({exc.strerror or exc})") from exc


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name complete and on the disk, or not at all. Raises: OSError.

    What a process that was killed has left of it earlier is removed.
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_S:
                part.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def lock(path: Path) -> AbstractContextManager[Any]:
    """Wait for a file's lock across processes and hold it; a process that ends lets go of it.

    Raises: OSError, at once, where files cannot be locked.
    """
    place = path.with_name(path.name + ".lock")
    if place.exists() and not place.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, f"{place} is not a file")
    stream = open(place, "ab")  # noqa: SIM115 -- closing() closes it, which lets go
    try:
        waits = False
        while not _try_lock(stream):
            if not waits:
                LOG.warning("%s: another process builds it; waiting", path)
            waits = True
            time.sleep(LOCK_POLL_S)
    except BaseException:
        stream.close()
        raise
    return closing(stream)


def _try_lock(stream: BinaryIO) -> bool:
    """Take a lock; False if another holds it. Raises: OSError where files cannot be locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
