"""Write the files of a run whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
        if temporary.exists():  # on a disk that is read-only, unlink raises even without it
            temporary.unlink()


def write_json(value: Any, path: Path) -> None:
    """Write plain values as indented JSON.

    Raises: ResourceError if the disk is full or cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
