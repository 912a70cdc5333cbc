"""Write the files of a run whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ResourceError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, made its content when the block ends well, removed when it does not.

    Raises: ResourceError if the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as exc:
        raise ResourceError(f"{path}: cannot be written ({exc.strerror or exc}); free space or choose --out") from exc
    finally:
        with suppress(OSError):  # there is nothing left as a rule, and on a read-only disk there never was
            temporary.unlink()


def read_json(path: Path) -> Any:
    """Read plain values from a regular file.

    Raises: OSError if it is missing or cannot be read; ValueError for what is not JSON, or nested too deeply.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def write_json(value: Any, path: Path) -> None:
    """Write plain values as indented JSON.

    Raises: ResourceError if the disk is full or cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
