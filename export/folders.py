"""Folders that appear under their name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import ExportError

STALE_S = 24 * 3600  # an export takes hours at most


def refuse_existing(out: Path) -> None:
    """Raise ExportError if something would be overwritten, or the name will not do for a file."""
    if os.path.lexists(out):
        raise ExportError(f"{out}: exists already; choose another name or remove it")
    try:
        out.name.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ExportError(f"{out.name!r}: not a name in UTF-8") from exc
    if not out.name.isprintable():
        raise ExportError(f"{out.name!r}: not a printable name")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that gets the name `out` when the block ends well, and goes if it does not.

    What killed processes have left of it is removed.
    Raises: ExportError if there is something already, or the disk is full or cannot be written.
    """
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        for left in out.parent.glob(f".{out.name}.????????.tmp"):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as exc:
        raise ExportError(f"{out}: cannot be written ({exc.strerror or exc})") from exc
    try:
        yield temporary
        temporary.rename(out)
    except OSError as exc:
        place = exc.filename if exc.filename and str(temporary) not in str(exc.filename) else out
        raise ExportError(f"{place}: cannot be written ({exc.strerror or exc})") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
