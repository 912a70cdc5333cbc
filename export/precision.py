"""Number formats: weights rounded to fp16 for the file, and a network that computes in fp16."""

from __future__ import annotations

import copy

import torch
from torch import nn

from train.models import Network

from .errors import ExportError


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round every parameter to the nearest fp16 value, in place and kept as fp32.

    Bundles store fp16 weights; with this the PyTorch reference uses the very values that the graphs read.
    Raises: ExportError if a value does not fit into fp16.
    """
    for name, parameter in network.named_parameters():
        rounded = parameter.to(torch.float16).to(torch.float32)
        if not torch.isfinite(rounded).all():
            raise ExportError(f"weight {name} holds values beyond fp16 ({parameter.abs().max().item():.3g})")
        parameter.copy_(rounded)


def in_half(network: Network) -> Network:
    """Copy a network with fp16 weights and arithmetic."""
    return copy.deepcopy(network).half()
