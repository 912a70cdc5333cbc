"""Networks by name. Each is an nn.Module with the members of `Network`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import RecipeError
from ..recipe import ModelConfig
from .fast_unet import build_fast_unet
from .perceptual_unet import build_perceptual_unet


class Network(Protocol):
    """What training and export ask of a network."""

    scales: tuple[int, ...]

    def __call__(self, lr: Tensor, scale: int) -> Tensor:
        """(N, 3, h, w) float RGB in [0, 1] -> (N, 3, h*scale, w*scale), not clamped."""
        ...

    def stride(self, scale: int) -> int:
        """Give the grid, in LR pixels, that heights and widths must lie on."""
        ...

    def layer_groups(self) -> list[nn.Module]:
        """Give the parts with a learning rate of their own, input end first."""
        ...

    def freezable_parameters(self) -> list[nn.Parameter]:
        """Give the pretrained parameters that a frozen phase holds still."""
        ...

    def hidden_weights(self) -> list[nn.Parameter]:
        """Give the weights that Muon may take: matrices between hidden activations."""
        ...

    def fold(self) -> None:
        """Turn training-time parametrisations (weight norm, batch norm) into plain weights, in place."""
        ...


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "fast": build_fast_unet,
    "perceptual-unet": build_perceptual_unet,
}


def build_model(config: ModelConfig, *, weights: Path | str | None) -> nn.Module:
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
