"""The readable files of a run: recipe.json, run.json and log.jsonl."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .atomic import read_json, replacing, write_json
from .errors import CheckpointError, RecipeError, ResourceError
from .recipe import Recipe, recipe_from_dict

LOGGER = logging.getLogger(__name__)
RECIPE = "recipe.json"
FACTS = "run.json"
LOG = "log.jsonl"


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep a run's folder, made if it is missing and removed if it stays empty, for this process alone.

    Without flock, on Windows and on some network drives, nothing is refused.
    Raises: ResourceError if another process holds it, or it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ResourceError(f"{run}: cannot be written ({exc.strerror or exc}); choose another --out") from exc
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, run)
        try:
            import fcntl

            handle = os.open(run, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ResourceError(f"{run}: another sr-train writes here; wait for it, or choose another --out") from exc
        except (ImportError, OSError) as exc:
            LOGGER.warning("%s: cannot be locked (%s): nothing else must write there", run, exc)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, as a rule
        folder.rmdir()


def load_run(run: Path) -> Recipe:
    """Read the effective recipe of a run folder.

    Raises: CheckpointError if the folder is not a run.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; give a run of sr-train")
    try:
        return recipe_from_dict(read_json(run / RECIPE))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{run}: not a run of sr-train, whose folder holds {RECIPE}") from exc
    except (OSError, ValueError, RecipeError) as exc:
        raise CheckpointError(f"{run}: not a run of sr-train ({exc})") from exc


def write_run(run: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write the effective recipe and the facts of a run into its folder.

    Raises: ResourceError if the folder cannot be written.
    """
    write_json(asdict(recipe), run / RECIPE)
    write_json(facts, run / FACTS)


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read the log; lines that a killed process or a full disk cut short are left out."""
    path = run / LOG
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("done_steps")) is int:
            entries.append(entry)
    return entries


def append_log(run: Path, entry: dict[str, Any]) -> None:
    """Add one line to the log.

    Raises: ResourceError if the disk is full or cannot be written.
    """
    path = run / LOG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as exc:
        raise ResourceError(f"{path}: cannot be written ({exc.strerror or exc}); free space or choose --out") from exc


def cut_log(run: Path, done_steps: int) -> None:
    """Drop what was logged after a step: the part of a killed run that is about to be done again.

    Raises: ResourceError if the disk is full or cannot be written.
    """
    if not (run / LOG).is_file():
        return
    entries = [entry for entry in read_log(run) if entry["done_steps"] <= done_steps]
    with replacing(run / LOG) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
