"""The hidden folder of a clip's segments: ours alone, used by one call at a time, safe to open files in.

Its name can be foretold, so that in a shared folder another user could make it first, with links inside.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError
from . import ffmpeg

LOG = logging.getLogger(__name__)
# No link is followed, and no pipe is waited for; Windows has neither flag.
SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
TARGET = "target"  # the file that names the result


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Make a folder, or go on with it, for one call at a time.

    Raises: OutputError if it is not a folder of this user alone, if another call works in it, or if it cannot be made.
    """
    with ffmpeg.writing(folder):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not _is_ours(folder):
            raise OutputError(f"{folder}: not a folder of this user alone; remove it, or write into another folder")
    with _locked(folder):
        yield


def open_file(path: Path, mode: str = "rb") -> BinaryIO:
    """Open a regular file, and neither what a link leads to nor a pipe or device. Raises: OSError."""
    stream = open(path, mode, opener=lambda name, flags: os.open(name, flags | SAFELY, 0o600))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stream  # type: ignore[return-value]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Make a file anew, whatever had its name. Raises: OSError."""
    path.unlink(missing_ok=True)
    stream = open_file(path, "xb")
    try:
        yield stream
    except BaseException:
        with contextlib.suppress(OSError):  # closing tries again to write what did not fit
            stream.close()
        raise
    stream.close()


def name_target(folder: Path, target: Path) -> None:
    """Note for which result, in the folder around it, a folder is. Raises: OutputError."""
    with ffmpeg.writing(folder), new_file(folder / TARGET) as stream:
        stream.write(os.fsencode(target.name))


def remove_others(folder: Path, target: Path) -> None:
    """Remove the folders that interrupted calls with other settings left for a result, now that it stands.

    Those of other users stay, those in use, and all where the system has no locks to tell.
    """
    if os.name != "posix":
        return
    for other in folder.parent.glob(".sr-*.parts"):
        with contextlib.suppress(OSError, OutputError):
            if other == folder or not _is_ours(other):
                continue
            with open_file(other / TARGET) as stream:
                if stream.read(4096) != os.fsencode(target.name):
                    continue
            with _locked(other, must_know=True):
                shutil.rmtree(other)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder, itself and no link to one, has the owner and rights of one made now.

    Compared with one made now, because some file systems keep neither.
    """
    example = folder.with_name(f".sr-{secrets.token_hex(8)}.part")
    example.mkdir(mode=0o700)
    try:
        expected, found = example.lstat(), folder.lstat()
    finally:
        example.rmdir()
    more = found.st_mode & ~expected.st_mode & WRITABLE_BY_OTHERS
    return stat.S_ISDIR(found.st_mode) and found.st_uid == expected.st_uid and not more


@contextlib.contextmanager
def _locked(folder: Path, *, must_know: bool = False) -> Iterator[None]:
    """Refuse a folder that another call works in. The system lifts the lock when its process ends, however it does.

    Without flock, on Windows and on some network drives, nothing is refused, or with must_know all on such drives.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    path = folder / "lock"
    with contextlib.ExitStack() as stack:
        with ffmpeg.writing(path):
            stream = stack.enter_context(open_file(path, "ab"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = path.exists()  # else the other call has just ended, and removed the folder
        except BlockingIOError:
            is_free = False
        except OSError as exc:
            LOG.debug("%s: cannot be locked (%s)", path, exc)
            is_free = not must_know
        if not is_free:
            raise OutputError(f"{folder}: another call is enlarging the same clip; wait until it has ended")
        yield
