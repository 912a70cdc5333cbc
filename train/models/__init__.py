"""Networks by name; each is a `Network`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..recipe import ModelConfig
from .autoencoder import build_autoencoder
from .critics import CRITICS, build_critic
from .fast_unet import build_fast_unet
from .named import build_named
from .network import Network
from .perceptual_unet import build_perceptual_unet
from .resnet_residual import build_resnet_residual
from .srgan import build_srgan
from .unet_transpose import build_unet_transpose
from .vae import build_vae

__all__ = ["BUILDERS", "CRITICS", "Network", "build_critic", "build_model"]

BUILDERS: dict[str, Callable[..., Network]] = {
    "fast": build_fast_unet,
    "perceptual-unet": build_perceptual_unet,
    "unet-transpose": build_unet_transpose,
    "srgan": build_srgan,
    "resnet18-residual": build_resnet_residual,
    "autoencoder": build_autoencoder,
    "vae": build_vae,
}


def build_model(config: ModelConfig, *, weights: Path | str | None) -> Network:
    """Build the network that a recipe names.

    weights: where pretrained encoders come from (see train.feature_nets.find_weights).
    Raises: RecipeError for an unknown name or option, WeightsError for missing weights.
    """
    return build_named(BUILDERS, config.name, config.options, what="model", scales=config.scales, weights=weights)
