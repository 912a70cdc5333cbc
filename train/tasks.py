"""Tasks: what is wrong with the pictures that a network learns to better. They combine with any recipe."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TASK_DIR = Path(__file__).parent / "tasks"
DAMAGES = ("blur", "grey", "jpeg", "noise", "holes", "text")
# A task says all that is wrong with a picture: what it does not name, the recipe shall not add.
UNDAMAGED: dict[str, Any] = {"rounds": 1} | {f"{damage}_probability": 0.0 for damage in DAMAGES}


def task_names() -> list[str]:
    """List the tasks that come with the package."""
    return sorted(path.stem for path in TASK_DIR.glob("*.toml"))


def load_task(name: str) -> dict[str, Any]:
    """Read a task as plain values, to be merged over a recipe's with `merge` before its overrides are applied.

    Damages that the task does not name are switched off. Filter and crop_scale stay the recipe's, unless it sets them,
    and so do the scales.
    Raises: RecipeError for an unknown task, with the nearest name.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown task {name!r}: one of {', '.join(names)}{hint}")
    values = tomllib.loads((TASK_DIR / f"{name}.toml").read_text(encoding="utf-8"))
    return values | {"degrade": UNDAMAGED | values.get("degrade", {})}


def merge(values: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Lay plain values over others: tables are merged, all else is replaced. Neither is modified."""
    merged = dict(values)
    for key, value in overlay.items():
        old = merged.get(key)
        merged[key] = merge(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return merged
