"""A small residual network on the frozen stem of a ResNet-18 (SEEDS E)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_nets import Normalise, load_weights
from .convolutions import kaiming_convolution
from .encoders import BACKBONES
from .folding import merged
from .icnr import zero_bias_
from .interpolated import InterpolatedNetwork, enlarge

STEM_CHANNELS = 64


class LeakyBlock(nn.Module):
    """Two 3x3 convolutions with a leaky ReLU between, added to their input; no normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = kaiming_convolution(channels, channels, 3)
        self.conv2 = kaiming_convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(x)))


class ResNetResidual(InterpolatedNetwork):
    """Add to the interpolated picture what 538,243 trainable parameters make of a ResNet-18's stem.

    The stem (conv1 and bn1) is frozen for good: in eval mode always, and without a gradient whatever
    `requires_grad` says. Its activations before and behind the ReLU are both used.
    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale even.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped; at the start the interpolated picture.
    Source: SEEDS, system E; the residual is learned as in Dong et al., arXiv 1501.00092, and after.
    """

    def __init__(self, scales: tuple[int, ...] = (2,)):
        super().__init__(scales, grid=2)
        import torchvision

        resnet = torchvision.models.resnet18(weights=None)
        c = STEM_CHANNELS
        self.normalise = Normalise()
        self.stem: nn.Module = nn.Sequential(OrderedDict(conv1=resnet.conv1, bn1=resnet.bn1))
        self.stem.requires_grad_(False)
        self.reduce1 = kaiming_convolution(c, c, 1)
        self.block1 = LeakyBlock(c)
        self.reduce2 = kaiming_convolution(c * 2, c, 1)
        self.block2 = LeakyBlock(c)
        self.block3 = LeakyBlock(c)
        self.widen = kaiming_convolution(c + 3, c * 2, 1)
        self.block4 = LeakyBlock(c * 2)
        self.last = nn.Conv2d(c * 2, 3, 1)
        nn.init.zeros_(self.last.weight)  # training starts from plain interpolation
        zero_bias_(self.last)
        self.stem.eval()

    def train(self, mode: bool = True) -> ResNetResidual:
        """Keep the stem in eval mode, so that its batch norm never moves."""
        super().train(mode)
        self.stem.eval()
        return self

    def load_stem(self, weights: Path | str | None) -> None:
        """Start the stem from ImageNet weights.

        Raises: WeightsError if there are none, or they do not fit.
        """
        name, state = BACKBONES["resnet18"].fetch(weights)
        if state is not None:
            load_weights(self.stem, state, name=name)

    def fold(self) -> None:
        """Merge the stem's batch norm into its convolution."""
        super().fold()
        self.stem = merged(self.stem.get_submodule("conv1"), self.stem.get_submodule("bn1"))

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        picture = self.interpolate(lr, scale)
        normalised = self.normalise(picture)
        stem = self.stem(normalised).detach()  # (N, 64, H/2, W/2)
        x = self.block1(self.reduce1(F.relu(stem)))
        x = self.block3(self.block2(self.reduce2(torch.cat((x, stem), dim=1))))
        x = torch.cat((enlarge(x, 2), normalised), dim=1)  # (N, 67, H, W)
        return picture + self.last(self.block4(F.leaky_relu(self.widen(x))))


def build_resnet_residual(*, scales: tuple[int, ...], weights: Path | str | None) -> ResNetResidual:
    """Build the network with its stem pretrained, or at random where `weights` says so."""
    model = ResNetResidual(scales)
    model.load_stem(weights)
    return model
