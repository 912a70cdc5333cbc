"""Small trainers on the CPU, for the tests of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.loop import Settings, Trainer
from train.recipe import Recipe, recipe_from_dict

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"options": {"channels": 8, "blocks": [1, 1, 1]}},
    "optimizer": {"muon_rate": 10.0},
    "degrade": {"noise_probability": 0.5, "jpeg_probability": 0.5},
    "samples_per_epoch": 8,
    "stages": [
        {"name": "32", "size": 32, "batch": 2, "phases": [{"epochs": 2.0}]},
        {"name": "48", "size": 48, "batch": 2, "phases": [{"epochs": 1.0, "learning_rate": 1e-4}]},
    ],
}


def make_trainer(
    photographs: Path, out: Path, *, recipe: Recipe | None = None, weights: Path | str | None = None, **settings: Any
) -> Trainer:
    """Make a trainer of TINY, or of another recipe, with the photographs loaded."""
    chosen: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 0} | settings
    trainer = Trainer(recipe or recipe_from_dict(TINY), out, weights=weights, settings=Settings(**chosen))
    trainer.load_photographs(photographs, lambda done, total: None)
    return trainer


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two networks' weights are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def bad_loss(value: float) -> Any:
    """Give a loss of that value, which may not be finite, with a gradient."""

    def loss(sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = (sr - hr).abs().mean() * value
        return total, {"pixel": total}

    return loss
