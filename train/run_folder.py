"""The readable files of a run: recipe.json, run.json and log.jsonl."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .atomic import replacing, write_json
from .errors import CheckpointError, RecipeError, ResourceError
from .recipe import Recipe, recipe_from_dict

RECIPE = "recipe.json"
FACTS = "run.json"
LOG = "log.jsonl"


def load_run(run: Path) -> Recipe:
    """Read the effective recipe of a run folder.

    Raises: CheckpointError if the folder is not a run.
    """
    try:
        return recipe_from_dict(json.loads((run / RECIPE).read_text(encoding="utf-8")))
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
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "done_steps" in entry:
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
