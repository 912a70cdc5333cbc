"""What a run has made: the weights of each finished stage, and networks with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import load_checkpoint, stage_folder
from .errors import CheckpointError
from .feature_nets import RANDOM_WEIGHTS
from .models import Network, build_model
from .recipe import Recipe


def last_stage(run: Path, recipe: Recipe) -> str:
    """Name the last stage that a run has written.

    Raises: CheckpointError if it has written none.
    """
    written = [stage.name for stage in recipe.stages if stage_folder(run, stage.name).exists()]
    if not written:
        raise CheckpointError(f"{run}: no stage of this run is finished, so there are no weights to take")
    return written[-1]


def load_network(run: Path, recipe: Recipe, stage: str) -> tuple[Network, dict[str, Any]]:
    """Build a run's network with the weights of a stage, in eval mode; and the stage's facts.

    Raises: CheckpointError if they cannot be read, or do not fit the recipe.
    """
    checkpoint = load_checkpoint(stage_folder(run, stage))
    network = build_model(recipe.model, weights=RANDOM_WEIGHTS)
    try:
        network.load_state_dict(checkpoint.group("model"))
    except RuntimeError as exc:
        name = recipe.model.name
        raise CheckpointError(f"{run}, stage {stage}: the weights do not fit the recipe's network {name}") from exc
    return network.eval(), checkpoint.facts
