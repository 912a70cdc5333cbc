"""What training and export ask of a network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Network(nn.Module, ABC):
    """Base of every network; a plain one defines `forward` and `stride` and sets `scales`.

    is_trained: whether all weights come from a run, so that a frozen phase holds good ones still.
    """

    scales: tuple[int, ...]
    is_trained = False

    @abstractmethod
    def forward(self, lr: Tensor, scale: int) -> Tensor:
        """Enlarge (N, 3, h, w) float RGB in [0, 1] to (N, 3, h*scale, w*scale), not clamped."""

    @abstractmethod
    def stride(self, scale: int) -> int:
        """Give the grid, in LR pixels, that heights and widths must lie on."""

    def output_grid(self) -> int:
        """Give the grid of HR sides on which every scale can work."""
        return math.lcm(*(self.stride(scale) * scale for scale in self.scales))

    def layer_groups(self) -> list[nn.Module]:
        """Give the parts with a learning rate of their own, input end first."""
        return [self]

    def freezable_parameters(self) -> list[Tensor]:
        """Give the parameters that a frozen phase holds still, which are pretrained."""
        return []

    def hidden_weights(self) -> list[Tensor]:
        """Give the weights that Muon may take: matrices between hidden activations."""
        return []

    def grow(self, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Widen and deepen the weights of a smaller network to this one's, which then computes what that one did.

        Returns: a state dict of this network, or None if it cannot be made of those weights.
        """
        return None

    def grown_parameters(self) -> list[Tensor]:
        """Give the parameters of the newest growth layer, which a phase may train alone."""
        return []

    def extra_terms(self) -> dict[str, Tensor]:
        """Give the network's own, weighted loss terms by name, of its last forward pass in train mode."""
        return {}

    def fold(self) -> None:
        """Turn training-time parametrisations (weight norm, batch norm) into plain weights, in place, in eval mode."""
        for module in list(self.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
                # Without gradients PyTorch leaves a plain tensor, which no export would find among the parameters.
                assert isinstance(module.weight, Tensor)
                module.weight = nn.Parameter(module.weight.detach())
