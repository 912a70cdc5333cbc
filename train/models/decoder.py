"""Parts of the perceptual U-Net's decoder: weight-normed convolutions, three ways to enlarge, attention, growth.

Their layout follows fastai's DynamicUnet (fastai v1, `models/unet.py`) as the super-resolution lesson uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .convolutions import kaiming_convolution
from .icnr import icnr_, nearest_, zero_bias_
from .interpolated import enlarge


def convolution(inputs: int, outputs: int, size: int) -> nn.Module:
    """Make a weight-normed convolution with Kaiming init; g holds one gain for each output channel."""
    return weight_norm(kaiming_convolution(inputs, outputs, size))


def blurred(x: Tensor) -> Tensor:
    """Average each pixel with its neighbours above and left: evens out the sub-pixel phases that training parts.

    A replication pad and a 2x2 mean; (N, C, H, W) to the same shape. The pad is written as concatenation: ONNX's
    Pad of opset 18 has no way back to the 17 that is exported.
    Source: Sugawara et al., arXiv 1806.02658.
    """
    x = torch.cat((x[:, :, :1], x), dim=2)
    return F.avg_pool2d(torch.cat((x[:, :, :, :1], x), dim=3), 2, stride=1)


class Up(nn.Module, ABC):
    """Enlarge by two, ReLU, and blur where asked: (N, inputs, h, w) -> (N, outputs, 2h, 2w)."""

    def __init__(self, *, blur: bool):
        super().__init__()
        self.blur = blur

    @abstractmethod
    def enlarge(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, 2h, 2w)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enlarge(x))
        return blurred(x) if self.blur else x


class ShuffleUp(Up):
    """Enlarge by a 1x1 convolution and PixelShuffle(2) that start as nearest-neighbour interpolation (ICNR)."""

    def __init__(self, inputs: int, outputs: int, *, blur: bool = True):
        super().__init__(blur=blur)
        conv = nn.Conv2d(inputs, outputs * 4, 1)
        # ICNR goes on the plain weight: set after weight norm, the first forward would replace it.
        icnr_(conv.weight, factor=2)
        zero_bias_(conv)
        self.conv = weight_norm(conv)
        self.shuffle = nn.PixelShuffle(2)

    def enlarge(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


class TransposeUp(Up):
    """Enlarge by a 2x2 transposed convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, *, blur: bool = True):
        super().__init__(blur=blur)
        conv = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        # Its weight is (inputs, outputs, 2, 2), and no two taps meet: each output sees `inputs` values, as in a 1x1.
        nn.init.normal_(conv.weight, std=(2 / inputs) ** 0.5)
        zero_bias_(conv)
        self.conv = weight_norm(conv, dim=1)

    def enlarge(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResizeUp(Up):
    """Enlarge by bilinear interpolation and a 3x3 convolution. Source: Odena et al., distill.pub 2016."""

    def __init__(self, inputs: int, outputs: int, *, blur: bool = True):
        super().__init__(blur=blur)
        self.conv = convolution(inputs, outputs, 3)

    def enlarge(self, x: Tensor) -> Tensor:
        return self.conv(enlarge(x, 2))


UPSAMPLINGS: dict[str, Callable[..., Up]] = {"shuffle": ShuffleUp, "transpose": TransposeUp, "resize": ResizeUp}


class SelfAttention(nn.Module):
    """Attention over all positions, weighted in from zero. Source: Zhang et al., arXiv 1805.08318 (SAGAN)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv1d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv1d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv1d(channels, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (N, C, H*W)
        weights = torch.softmax(self.query(flat).transpose(1, 2) @ self.key(flat), dim=1)
        return x + self.gamma * (self.value(flat) @ weights).view_as(x)


class UpBlock(nn.Module):
    """Enlarge to half of the channels, join the normalised skip, two 3x3 convolutions."""

    def __init__(self, inputs: int, skip: int, *, outputs: int, up: Callable[[int, int], Up], attention: bool = False):
        super().__init__()
        self.up = up(inputs, inputs // 2)
        self.norm: nn.Module = nn.BatchNorm2d(skip)
        self.conv1 = convolution(inputs // 2 + skip, outputs, 3)
        self.conv2 = convolution(outputs, outputs, 3)
        self.attention: nn.Module = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.relu(torch.cat((self.up(x), self.norm(skip)), dim=1))
        return self.attention(F.relu(self.conv2(F.relu(self.conv1(x)))))


class LastCross(nn.Module):
    """Residual block of two 3x3 convolutions over the decoder's output and the input picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = convolution(channels, channels, 3)
        self.conv2 = convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv2(F.relu(self.conv1(x))))


class Growth(nn.Module):
    """A 3x3 convolution and PixelShuffle(2) that start as nearest-neighbour repetition: (h, w) -> (2h, 2w).

    It stands before the final 1x1 convolution, which repetition commutes with: a network that grows by it computes
    at first the smaller one's output with every pixel repeated. It therefore has neither ReLU nor blur.
    """

    def __init__(self, channels: int):
        super().__init__()
        conv = nn.Conv2d(channels, channels * 4, 3, padding=1)
        nearest_(conv.weight, factor=2)
        zero_bias_(conv)
        self.conv = weight_norm(conv)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))
