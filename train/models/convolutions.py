"""Convolutions without normalisation, as several networks start them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .icnr import zero_bias_


def kaiming_convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Make a convolution that keeps the size, with Kaiming values and a bias of zero."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight)
    zero_bias_(conv)
    return conv


class ConvolutionPair(nn.Module):
    """Two 3x3 convolutions with ReLU: (N, inputs, h, w) -> (N, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = kaiming_convolution(inputs, outputs, 3)
        self.conv2 = kaiming_convolution(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))
