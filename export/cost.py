"""What a network costs: parameters, and multiplications for each pixel that it makes."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.models import Network

OUTPUT_SIDE = 256


def measure_cost(network: Network, scale: int) -> dict[str, float]:
    """Count a network's parameters, and its thousands of multiply-accumulates for each output pixel at 256x256.

    Counted are convolutions and matrix products, which PyTorch calls two operations each; the rest is less than 1 %.
    """
    stride = network.stride(scale)
    side = math.ceil(OUTPUT_SIDE / scale / stride) * stride
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, side, side), scale)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "kmac_per_pixel": round(counter.get_total_flops() / 2 / (side * scale) ** 2 / 1000, 2),
    }
