"""Critics: networks that tell results from photographs, (N, 3, H, W) RGB in [0, 1] -> logits, high for real.

The logits are (N,), or (N, places) where each place is judged on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..feature_nets import build_feature_net
from .decoder import SelfAttention
from .icnr import zero_bias_
from .named import build_named

SLOPE = 0.2  # of the leaky ReLUs in both critics
POOLED = 6  # side of the last map at the 96-pixel crops of SRGAN's paper


def _spectral(inputs: int, outputs: int, size: int, *, stride: int = 1) -> nn.Module:
    """Make a convolution with spectral norm that halves the size (4x4, stride 2) or keeps it (3x3)."""
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=1)
    nn.init.kaiming_normal_(conv.weight)
    zero_bias_(conv)
    return spectral_norm(conv)


class UNetCritic(nn.Module):
    """Fully convolutional critic: each place gives a logit, a picture their mean.

    channels: of the first convolution; concatenation and each of the `blocks` double them. dropout: of channels.
    With 3 blocks sides are at least 64 pixels.
    Source: fastai v1's gan_critic (`vision/gan.py`), with spectral norm and self-attention as there; SEEDS, system C.
    """

    def __init__(self, *, channels: int = 128, blocks: int = 3, dropout: float = 0.15):
        super().__init__()
        self.smallest = 4 * 2 ** (blocks + 1)
        self.first = _spectral(3, channels, 4, stride=2)
        self.first_dropout = nn.Dropout2d(dropout / 2)
        self.dense = nn.Sequential(
            _spectral(channels, channels, 3), nn.LeakyReLU(SLOPE), _spectral(channels, channels, 3), nn.LeakyReLU(SLOPE)
        )
        layers: list[nn.Module] = []
        width = channels * 2
        for index in range(blocks):
            layers += [nn.Dropout2d(dropout), _spectral(width, width * 2, 4, stride=2), nn.LeakyReLU(SLOPE)]
            width *= 2
            if index == 0:
                attention = SelfAttention(width)
                for conv in (attention.query, attention.key, attention.value):
                    spectral_norm(conv)
                layers.append(attention)
        self.blocks = nn.Sequential(*layers)
        self.last = spectral_norm(nn.Conv2d(width, 1, 4, bias=False))

    def forward(self, pictures: Tensor) -> Tensor:
        if min(pictures.shape[2:]) < self.smallest:
            raise ValueError(f"the critic needs {self.smallest} pixels a side, got {tuple(pictures.shape[2:])}")
        # Centred on 0, as the normalised pictures that fastai's critic sees.
        x = self.first_dropout(F.leaky_relu(self.first(pictures * 2 - 1), SLOPE))
        x = torch.cat((x, self.dense(x)), dim=1)
        return self.last(self.blocks(x)).mean(dim=(1, 2, 3))


class SRGANCritic(nn.Module):
    """Eight 3x3 convolutions, every second of stride 2, and two dense layers.

    The paper's dense layer belongs to crops of 96 pixels; here adaptive average pooling to 6x6 stands before it, which
    at 96 pixels is the identity, so that crops of any size from 16 on are judged.
    Source: Ledig et al., arXiv 1609.04802; SEEDS, system D.
    """

    def __init__(self, *, channels: int = 64, dense: int = 1024):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.LeakyReLU(SLOPE)]
        widths = [channels * factor for factor in (1, 1, 2, 2, 4, 4, 8, 8)]
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 1 if index % 2 else 2
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers.append(nn.LeakyReLU(SLOPE))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(POOLED)
        self.dense = nn.Linear(widths[-1] * POOLED**2, dense)
        self.last = nn.Linear(dense, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.pool(self.features(pictures * 2 - 1)).flatten(1)  # (N, 512 * 6 * 6)
        return self.last(F.leaky_relu(self.dense(x), SLOPE)).squeeze(1)


class FeatureCritic(nn.Module):
    """Judges the features of a frozen, pretrained network: each layer's with two convolutions of its own.

    It need not learn first what photographs are made of, and is of use within some hundred steps.
    features, layers: a network and its layers, as a recipe's loss.feature_net and loss.feature_layers.
    channels: of the hidden convolution.
    Source: Sauer et al., "Projected GANs converge faster", arXiv 2111.01007, without its random projections.
    """

    def __init__(
        self,
        *,
        weights: Path | str | None,
        features: str = "resnet18",
        layers: tuple[str, ...] = ("relu", "layer1", "layer2"),
        channels: int = 64,
    ):
        super().__init__()
        self.features = build_feature_net(features, layers=layers, weights=weights)
        with torch.no_grad():
            widths = [each.shape[1] for each in self.features(torch.zeros(1, 3, 64, 64))]
        self.heads = nn.ModuleList(
            nn.Sequential(_spectral(width, channels, 3), nn.LeakyReLU(SLOPE), _spectral(channels, 1, 3))
            for width in widths
        )

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.features(pictures)
        # Vectors of length 1, as the loss compares them, times sqrt(C): a mean square of 1.
        scaled = [F.normalize(each.float(), dim=1, eps=1e-6) * each.shape[1] ** 0.5 for each in maps]
        return torch.cat([head(each).flatten(1) for head, each in zip(self.heads, scaled, strict=True)], dim=1)


CRITICS: dict[str, Callable[..., nn.Module]] = {
    "unet-critic": UNetCritic, "srgan": SRGANCritic, "features": FeatureCritic,
}  # fmt: skip


def build_critic(name: str, options: Mapping[str, Any], *, weights: Path | str | None = None) -> nn.Module:
    """Build the critic that a recipe names, at random weights.

    weights: of the feature network that a critic may stand on, as in feature_nets.load_pretrained.
    Raises: RecipeError for an unknown name or option; WeightsError if pretrained weights cannot be had.
    """
    given = {"weights": weights} if name == "features" else {}
    return build_named(CRITICS, name, options, what="critic", **given)
