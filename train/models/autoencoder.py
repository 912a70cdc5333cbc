"""The convolutional auto-encoder of "image-superres" (SEEDS F)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .icnr import zero_bias_
from .interpolated import InterpolatedNetwork


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight)
    zero_bias_(conv)
    return conv


class ConvolutionPair(nn.Module):
    """Two 3x3 convolutions with ReLU: (N, inputs, h, w) -> (N, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = _convolution(inputs, outputs)
        self.conv2 = _convolution(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


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
        self.bottom = _convolution(c * 2, c * 4)
        self.decoder2 = ConvolutionPair(c * 4, c * 2)
        self.decoder1 = ConvolutionPair(c * 2, c)
        self.last = _convolution(c, 3)

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
