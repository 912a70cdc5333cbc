"""The JSON that every benchmark writes: what each holds, and how it reaches the disk."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from sdk import Bundle
from sdk.errors import OutputError

from .machine import machine_facts

SCHEMA = 1


def result_head(kind: str, *, protocol: str, command: str = "sr-bench") -> dict[str, Any]:
    """Give the fields that every result starts with. kind: of TITLES in page.py."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": f"{command} " + shlex.join(map(_without_folder, sys.argv[1:])),
        "machine": machine_facts(),
        "protocol": protocol,
    }


def model_facts(bundle: Bundle, *, stage: str = "auto") -> dict[str, Any]:
    """Say which model was measured; the hash tells apart weights of one name.

    What it costs is what the exporter found, None in bundles that were made before it looked.
    """
    chosen = bundle.stage(stage)
    return {
        "name": bundle.manifest.name,
        "scale": bundle.manifest.scale,
        "stage": chosen.name,
        "weights_sha256": chosen.weights.sha256,
        "parameters": bundle.manifest.training.get("parameters"),
        "kmac_per_pixel": bundle.manifest.training.get("kmac_per_pixel"),
    }


def check_writable(path: Path) -> None:
    """Find out before the work whether its result has a place.

    Raises: OutputError if it has none.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: cannot be written; name a file in an existing folder that you may write to")


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write beside the target, then rename: the file is whole or not there.

    Raises: OutputError if the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as exc:
        raise OutputError(f"{path}: could not be written ({exc.strerror})") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _without_folder(argument: str) -> str:
    """Shorten a path out of the working directory to its last part: results are published, home folders are not."""
    option, equals, path = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + equals + (Path(path).name if os.path.isabs(path) or path.startswith("..") else path)


def first_line(exc: BaseException) -> str:
    """Shorten what an engine says to a line; its kind if it says nothing."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
