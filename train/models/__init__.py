"""Networks by name; each is a `Network`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import ModelConfig
from .fast_unet import build_fast_unet
from .network import Network
from .perceptual_unet import build_perceptual_unet

__all__ = ["BUILDERS", "Network", "build_model"]

BUILDERS: dict[str, Callable[..., Network]] = {
    "fast": build_fast_unet,
    "perceptual-unet": build_perceptual_unet,
}


def build_model(config: ModelConfig, *, weights: Path | str | None) -> Network:
    """Build the network that a recipe names.

    weights: where pretrained encoders come from (see train.feature_nets.find_weights).
    Raises: RecipeError for an unknown name or option, WeightsError for missing weights.
    """
    if config.name not in BUILDERS:
        raise RecipeError(f"unknown model {config.name!r}: one of {', '.join(BUILDERS)}")
    builder = BUILDERS[config.name]
    known = set(inspect.signature(builder).parameters) - {"scales", "weights"}
    unknown = sorted(set(config.options) - known)
    if unknown:
        raise RecipeError(f"model.options: {config.name} knows {', '.join(sorted(known))}, not {', '.join(unknown)}")
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.options.items()}
    try:
        return builder(scales=config.scales, weights=weights, **options)
    except (TypeError, ValueError) as exc:
        raise RecipeError(f"model {config.name}: {exc}") from exc
