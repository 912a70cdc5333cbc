"""The learning-rate finder: raise the rate until the loss explodes, suggest the steepest descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import plots
from .errors import DivergedError, RecipeError
from .loading import Steps
from .schedule import suggest_rate

if TYPE_CHECKING:
    from .loop import Trainer

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.98
STOP_AT = 4.0  # times the best smoothed loss
# The average of the first steps is noise, not descent; fastai leaves as many out.
SKIPPED = 10
MIN_DESCENT = 0.05  # of the smoothed loss; less is noise, and its steepest place says nothing


def find_rate(
    trainer: Trainer, plot: Path, *, report: Callable[[int, int], None] = lambda done, total: None
) -> float | None:
    """Run up to 100 steps of the recipe's first phase at rates from 1e-7 to 10, then undo them.

    The rate is the phase's `learning_rate`; groups with another one keep their ratio to it. report: told the steps
    done and their number after each.
    Returns: the suggested learning rate; None if the loss hardly falls at any, as that of a network which starts as
    its own interpolated skip.
    Raises: DivergedError if the loss stops being finite within the first steps; RecipeError for a phase that trains a
    critic, whose loss says nothing about the network's rate, and under several processes.
    Source: Smith, arXiv 1506.01186, as in fastai's lr_find.
    """
    stage = trainer.recipe.stages[0]
    phase = stage.phases[0]
    if phase.kind != "generator" or trainer.processes.count > 1:
        raise RecipeError("the learning-rate finder is for phases that train the network alone, in one process")
    before = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    source = trainer.samples(0, 0, Steps(0, STEPS, batch=stage.batch))
    trainer.prepare_optimizers(phase)
    try:
        for step, (lr, hr) in enumerate(source):
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
            for group in trainer.parameter_groups():
                group["lr"] = rate * group["highest_rate"] / phase.learning_rate
            terms = trainer.step(lr, hr, stage)
            trainer.done_steps += 1
            if not terms:  # skipped, because the loss or its gradient was not finite
                break
            average = SMOOTHING * average + (1 - SMOOTHING) * sum(float(term) for term in terms.values())
            smoothed = average / (1 - SMOOTHING ** (step + 1))
            if not math.isfinite(smoothed) or (losses and smoothed > STOP_AT * min(losses)):
                break
            rates.append(rate)
            losses.append(smoothed)
            report(step + 1, STEPS)
    finally:
        source.close()  # ends the workers
        trainer.reset(before)
    if len(rates) < SKIPPED + 3:
        raise DivergedError(
            f"the learning-rate finder met a non-finite loss after {len(rates)} steps; check the data and the recipe"
        )
    falls = min(losses[SKIPPED:]) < (1 - MIN_DESCENT) * losses[SKIPPED]
    suggestion = suggest_rate(rates[SKIPPED:], losses[SKIPPED:]) if falls else None
    plots.write_rate_plot(rates, losses, suggestion, plot)
    return suggestion
