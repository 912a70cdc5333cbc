"""The convolutional auto-encoder of "image-superres" (SEEDS F)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .convolutions import ConvolutionPair, kaiming_convolution
from .interpolated import InterpolatedNetwork


class AutoEncoder(InterpolatedNetwork):
    """Encode to a quarter of the size and decode, with additive skips; 1,110,403 parameters, same size in and out.

    Nearest-neighbour upsampling; above scale 1 it is given the interpolated picture.
    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 4.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, system F.
    """

    def __init__(self, scales: tuple[int, ...] = (2,), *, channels: int = 64):
        super().__init__(scales, grid=4)
        c = channels
        self.encoder1 = ConvolutionPair(3, c)
        self.encoder2 = ConvolutionPair(c, c * 2)
        self.bottom = kaiming_convolution(c * 2, c * 4, 3)
        self.decoder2 = ConvolutionPair(c * 4, c * 2)
        self.decoder1 = ConvolutionPair(c * 2, c)
        self.last = kaiming_convolution(c, 3, 3)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        level1 = self.encoder1(self.interpolate(lr, scale))
        level2 = self.encoder2(F.max_pool2d(level1, 2))
        x = F.relu(self.bottom(F.max_pool2d(level2, 2)))  # (N, 256, H/4, W/4)
        x = self.decoder2(F.interpolate(x, scale_factor=2.0, mode="nearest")) + level2
        x = self.decoder1(F.interpolate(x, scale_factor=2.0, mode="nearest")) + level1
        return self.last(x)


def build_autoencoder(*, scales: tuple[int, ...], weights: object, channels: int = 64) -> AutoEncoder:
    """Build an AutoEncoder; it starts from no pretrained weights."""
    return AutoEncoder(scales, channels=channels)
