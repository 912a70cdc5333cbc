"""Learning rates: the one-cycle schedule, layer groups, and the learning-rate finder's suggestion."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .recipe import OptimizerConfig


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(step: int, total: int, config: OptimizerConfig) -> tuple[float, float]:
    """Give the learning rate, as a share of its maximum, and Adam's beta1 at a step.

    A pure function of the position, so that a resumed run needs no state of a scheduler.
    Source: Smith, arXiv 1803.09820; fastai's fit_one_cycle (cosine both ways).
    """
    warmup = max(1, round(total * config.warmup_share))
    if step < warmup:
        share = step / warmup
        return (
            _cosine(1 / config.div, 1.0, share),
            _cosine(config.beta1_high, config.beta1_low, share),
        )
    share = (step - warmup) / max(1, total - 1 - warmup)
    return (
        _cosine(1.0, 1 / config.final_div, min(share, 1.0)),
        _cosine(config.beta1_low, config.beta1_high, min(share, 1.0)),
    )


def schedule(step: int, total: int, config: OptimizerConfig) -> tuple[float, float]:
    """Give the learning rate, as a share of its maximum, and Adam's beta1 at a step of the recipe's schedule."""
    return (1.0, config.beta1_high) if config.schedule == "constant" else one_cycle(step, total, config)


def group_rates(lowest: float, highest: float, groups: int) -> list[float]:
    """Space `groups` learning rates geometrically, input end first; 0 for lowest means all alike."""
    if groups == 1 or lowest <= 0:
        return [highest] * groups
    ratio = (highest / lowest) ** (1 / (groups - 1))
    return [lowest * ratio**index for index in range(groups)]


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Give the rate at the steepest descent of the smoothed loss over log(rate).

    Raises: ValueError for fewer than three points.
    """
    if len(rates) < 3:
        raise ValueError(f"a suggestion needs at least 3 points, got {len(rates)}")
    slopes = [
        (losses[i + 1] - losses[i - 1]) / (math.log(rates[i + 1]) - math.log(rates[i - 1]))
        for i in range(1, len(rates) - 1)
    ]
    return rates[1 + min(range(len(slopes)), key=slopes.__getitem__)]
