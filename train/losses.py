"""Loss terms. Pictures are (N, 3, H, W) float RGB in [0, 1]; every term is a mean, so sizes do not weigh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RecipeError
from .feature_nets import IMAGENET_STD, FeatureNet, build_feature_net
from .recipe import LossConfig


def charbonnier(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-6): L1 that is smooth at zero. Source: Lai et al., arXiv 1704.03915."""
    return ((sr - hr).square() + 1e-6).sqrt().mean()


def l1_normalised(sr: Tensor, hr: Tensor) -> Tensor:
    """L1 between ImageNet-normalised pictures (the mean cancels): the base term of SEEDS A."""
    std = torch.tensor(IMAGENET_STD, device=sr.device).view(1, 3, 1, 1)
    return ((sr - hr).abs() / std).mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "l1_normalised": l1_normalised,
    "mse": F.mse_loss,
    "charbonnier": charbonnier,
}


def luma(picture: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W): BT.601 limited-range Y without its offset, in units of 255."""
    weights = torch.tensor((65.481, 128.553, 24.966), device=picture.device).view(1, 3, 1, 1) / 255
    return (picture * weights).sum(dim=1, keepdim=True)


def block_colour(sr: Tensor, hr: Tensor) -> Tensor:
    """L1 between the means of 16x16 blocks: brightness and hue, without detail."""
    return F.l1_loss(F.avg_pool2d(sr, 16), F.avg_pool2d(hr, 16))


def gram_matrix(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, C): F F^T / (C H W), as in fastai's style term."""
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


class CombinedLoss(nn.Module):
    """Weighted sum of the terms that a LossConfig switches on.

    sum_i w_i L1(f_i) + sum_i w_i^2 * style * L1(G_i) is the perceptual part of SEEDS A.
    forward returns the total and each weighted term by name.
    """

    def __init__(self, config: LossConfig, *, weights: Path | str | None = None):
        super().__init__()
        if config.pixel not in PIXEL_LOSSES:
            raise RecipeError(f"loss.pixel: one of {', '.join(PIXEL_LOSSES)}, not {config.pixel!r}")
        if not (config.pixel_weight or config.luma_weight or config.colour_weight or config.feature_net):
            raise RecipeError("loss: every term is switched off")
        self.config = config
        self.features: FeatureNet | None = None
        if config.feature_net:
            self.features = build_feature_net(config.feature_net, layers=config.feature_layers, weights=weights)
            if len(self.features.taps) != len(config.feature_weights):
                raise RecipeError(
                    f"loss.feature_weights: {len(self.features.taps)} layers need as many weights, "
                    f"got {len(config.feature_weights)}"
                )

    def forward(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.pixel_weight:
            terms["pixel"] = config.pixel_weight * PIXEL_LOSSES[config.pixel](sr, hr)
        if config.luma_weight:
            terms["luma"] = config.luma_weight * PIXEL_LOSSES[config.pixel](luma(sr), luma(hr))
        if config.colour_weight:
            terms["colour"] = config.colour_weight * block_colour(sr, hr)
        if self.features is not None:
            with torch.no_grad():
                targets = self.features(hr)
            triples = list(zip(config.feature_weights, self.features(sr), targets, strict=True))
            distances = [w * F.l1_loss(a.float(), b.float()) for w, a, b in triples]
            terms["features"] = config.feature_weight * torch.stack(distances).sum()
            if config.style_weight:
                with torch.autocast(sr.device.type, enabled=False):  # it would round the products again
                    grams = [w**2 * F.l1_loss(gram_matrix(a.float()), gram_matrix(b.float())) for w, a, b in triples]
                terms["style"] = config.feature_weight * config.style_weight * torch.stack(grams).sum()
        return torch.stack(list(terms.values())).sum(), terms
