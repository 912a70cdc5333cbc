"""Checkpoints: a folder with state.safetensors and state.json, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .atomic import read_json
from .errors import CheckpointError, ResourceError

TENSORS = "state.safetensors"
FACTS = "state.json"
MANIFEST = "manifest.json"  # of a bundle
BEST = "best"  # the one of the highest validation PSNR-Y, beside those of steps
STEP = re.compile(r"step-\d+")
PUT_ASIDE = re.compile(r"\.(step-\d+)\.old")  # by `save_checkpoint`, between its two renames


@dataclass(frozen=True)
class Checkpoint:
    """tensors: flat names such as "model.head.weight"; facts: JSON values (position, recipe, versions)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors below a prefix, without it."""
        return {key[len(prefix) + 1 :]: value for key, value in self.tensors.items() if key.startswith(prefix + ".")}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write beside the target, then rename, so that a killed process leaves the old checkpoint or the new one.

    Raises: ResourceError if the disk is full or cannot be written; an older checkpoint of that name then remains.
    """
    temporary, replaced = folder.with_name(f".{folder.name}.tmp"), _replaced(folder)
    try:
        if temporary.is_dir():
            shutil.rmtree(temporary)  # what a killed process left
        temporary.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in checkpoint.tensors.items()}, temporary / TENSORS)
        (temporary / FACTS).write_text(json.dumps(checkpoint.facts, indent=2) + "\n", encoding="utf-8")
        for name in (TENSORS, FACTS):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError(
            f"{folder}: the checkpoint could not be written ({exc}); free space or choose --out"
        ) from exc


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is ever unpickled.

    Raises: CheckpointError if it is missing, truncated or not of this format.
    """
    if not folder.exists() and _replaced(folder).exists():
        folder = _replaced(folder)  # killed between the two renames of save_checkpoint
    try:
        facts = read_json(folder / FACTS)
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as exc:
        others = [other for other in folder.parent.glob("step-*") if other != folder]
        cure = "; delete it to go on from the one before" if folder.name.startswith("step-") and others else ""
        raise CheckpointError(f"{folder}: not a readable checkpoint ({exc}){cure}") from exc
    if not isinstance(facts, dict):
        raise CheckpointError(f"{folder}: {FACTS} holds no table")
    return Checkpoint(tensors, facts)


def load_bundle(folder: Path) -> Checkpoint:
    """Read the weights of a bundle's last stage, as sr-export has written them: folded, fp16.

    Returns: group "model" in float32; facts that say which bundle it was.
    Raises: CheckpointError if they cannot be read.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        stage = manifest["stages"][-1]
        file = Path(stage["weights"]["name"]).name
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder}: holds no safetensors; start from the run that it was made of")
        tensors = {f"model.{key}": value.float() for key, value in load_file(folder / file).items()}
        facts = {"bundle": manifest["name"], "stage": stage["name"], "sha256": stage["weights"]["sha256"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError) as exc:
        raise CheckpointError(f"{folder}: not a readable bundle ({exc})") from exc
    return Checkpoint(tensors, facts)


def latest_checkpoint(run: Path) -> Path | None:
    """Find the newest resumable checkpoint of a run, or None.

    Raises: CheckpointError if the folder cannot be read.
    """
    found = _resumable(run)
    return found[-1] if found else None


def _resumable(run: Path) -> list[Path]:
    """List the checkpoints of steps, oldest first; one whose replacement was killed half-way counts."""
    folder = run / "checkpoints"
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise CheckpointError(f"{folder}: cannot be read ({exc.strerror})") from exc
    steps = {name for name in names if STEP.fullmatch(name)}
    steps |= {match[1] for name in names if (match := PUT_ASIDE.fullmatch(name))}
    return [folder / name for name in sorted(steps, key=lambda name: int(name.removeprefix("step-")))]


def keep_latest(run: Path, count: int) -> None:
    """Delete all but the newest `count` resumable checkpoints, and what killed processes left half-written.

    Raises: ResourceError if they cannot be deleted.
    """
    folders = run / "checkpoints"
    try:
        found = _resumable(run)
        for folder in found[:-count]:
            if folder.exists():
                shutil.rmtree(folder)
        kept = {_replaced(folder) for folder in found[-count:] if not folder.exists()}
        for folder in set(folders.glob(".step-*")) - kept:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    except OSError as exc:
        raise ResourceError(f"{folders}: an old checkpoint could not be deleted ({exc})") from exc


def stage_folder(run: Path, stage: str) -> Path:
    """Give the place of a stage's weights, what `sr-export` reads; its facts say whether it is "complete"."""
    return run / "stages" / stage
