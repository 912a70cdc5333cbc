"""The learning-rate finder: raise the rate until the loss explodes, suggest the steepest descent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots
from .data import CropPairs, batches
from .errors import DivergedError
from .schedule import suggest_rate

if TYPE_CHECKING:
    from .loop import Trainer

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.98
STOP_AT = 4.0  # times the best smoothed loss


def find_rate(trainer: Trainer, plot: Path) -> float:
    """Run up to 100 steps of the recipe's first phase at rates from 1e-7 to 10, then restore the weights.

    Returns: the suggested learning rate.
    Raises: DivergedError if the loss is not finite from the start.
    Source: Smith, arXiv 1506.01186, as in fastai's lr_find.
    """
    stage = trainer.recipe.stages[0]
    before = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    dataset = CropPairs(
        trainer.train_set,
        stage=stage,
        config=trainer.recipe.degrade,
        scales=trainer.recipe.model.scales,
        entropy=(trainer.recipe.seed, 0, 0),
    )
    trainer.prepare_optimizers(stage.phases[0])
    trainer.model.train()
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    source = batches(dataset, batch=stage.batch, first_step=0, last_step=STEPS, workers=trainer.settings.workers)
    for step, (lr, hr) in enumerate(source):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group in trainer.parameter_groups():
            group["lr"] = rate
        loss = sum(float(term) for term in trainer.step(lr, hr, stage).values())
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed = average / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > STOP_AT * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
    trainer.reset(before)
    if len(rates) < 3:
        raise DivergedError("the learning-rate finder met a non-finite loss at once; check the data and the recipe")
    suggestion = suggest_rate(rates, losses)
    plots.write_rate_plot(rates, losses, suggestion, plot)
    return suggestion
