"""What a run has made: the weights of each finished stage, and networks with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import BEST, latest_checkpoint, load_checkpoint, stage_folder
from .errors import CheckpointError, RecipeError
from .feature_nets import RANDOM_WEIGHTS
from .models import Network, build_model
from .recipe import Recipe, StageConfig, recipe_from_dict


def last_stage(run: Path, recipe: Recipe) -> str:
    """Name the last stage that a run has written.

    Raises: CheckpointError if it has written none.
    """
    written = [stage.name for stage in recipe.stages if stage_folder(run, stage.name).exists()]
    if not written:
        raise CheckpointError(f"{run}: no stage of this run is finished{checkpoint_to_take(run)}")
    return written[-1]


def load_network(run: Path, recipe: Recipe, stage: str) -> tuple[Network, dict[str, Any]]:
    """Build a run's network with the weights of a stage, in eval mode; and the stage's facts.

    Raises: CheckpointError if they cannot be read, or do not fit the recipe.
    """
    checkpoint = load_checkpoint(stage_folder(run, stage))
    return _network(recipe, checkpoint.group("model"), where=f"{run}, stage {stage}"), checkpoint.facts


def load_averaged(folder: Path) -> tuple[Network, StageConfig, dict[str, Any]]:
    """Build a network with the averaged weights of a checkpoint, in eval mode; the stage it was in; and its facts.

    Raises: CheckpointError if it cannot be read.
    """
    checkpoint = load_checkpoint(folder)
    try:
        recipe = recipe_from_dict(checkpoint.facts["recipe"])
        stage = recipe.stages[min(int(checkpoint.facts["position"][0]), len(recipe.stages) - 1)]
        facts = checkpoint.facts | {"stage": stage.name, "steps": checkpoint.facts["done_steps"]}
    except (KeyError, IndexError, TypeError, ValueError, RecipeError) as exc:
        raise CheckpointError(f"{folder}: not a checkpoint of sr-train ({exc})") from exc
    return _network(recipe, checkpoint.group("ema"), where=str(folder)), stage, facts


def checkpoint_to_take(run: Path) -> str:
    """Word the way out for whoever wants the weights of a run that has finished no stage.

    Raises: CheckpointError if its checkpoints cannot be listed.
    """
    for folder in (run / "checkpoints" / BEST, latest_checkpoint(run)):
        if folder is not None and folder.is_dir():
            return f"; take {folder}"
    return "; let sr-train complete one"


def _network(recipe: Recipe, weights: dict[str, Tensor], *, where: str) -> Network:
    network = build_model(recipe.model, weights=RANDOM_WEIGHTS)
    try:
        network.load_state_dict(weights)
    except RuntimeError as exc:
        raise CheckpointError(f"{where}: the weights do not fit the recipe's network {recipe.model.name}") from exc
    return network.eval()
