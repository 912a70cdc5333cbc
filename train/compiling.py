"""A network's forward pass, compiled; one that cannot be compiled here runs as it is, and that is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

LOG = logging.getLogger(__name__)


def choose_forward(network: nn.Module, device: torch.device) -> Callable[[Tensor, int], Tensor]:
    """Give what runs a network on a device in a phase: on a GPU compiled."""
    return compiled(network) if device.type == "cuda" else network


def compiled(
    network: nn.Module, *, backend: str | Callable[..., object] = "inductor"
) -> Callable[[Tensor, int], Tensor]:
    """Compile the call of a network; the network itself, its parameters and their names stay as they are.

    What was compiled before is forgotten: a phase trains other parameters, with other sizes.
    backend: see torch.compile.
    """
    torch._dynamo.reset()
    run: Callable[[Tensor, int], Tensor] = torch.compile(network.__call__, dynamic=False, backend=backend)

    def forward(lr: Tensor, scale: int) -> Tensor:
        nonlocal run
        try:
            return run(lr, scale)
        except TorchDynamoException as exc:
            if run is network:
                raise
            reason = " ".join(str(exc).split())[:300]
            LOG.warning("the network cannot be compiled here and runs as it is, slower: %s", reason)
            run = network
            return network(lr, scale)

    return forward
