"""Muon: momentum whose steps are made orthogonal, for the hidden convolutions of a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration (Jordan et al., 2024): steep at zero, singular values end in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace each matrix by nearly the orthogonal factor of its polar decomposition.

    matrices: (N, rows, columns). Returns: the same shape, float32; computed in bfloat16.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT.contiguous())
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum (betas[0]), orthogonalised, scaled by sqrt(max(1, rows/columns)).

    A convolution's weight is taken as a (out, in*kh*kw) matrix; torch.optim.Muon takes no convolutions.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Take one step with the gradients at hand."""
        for group in self.param_groups:
            momentum = group["betas"][0]
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(state["momentum"], momentum)
                rows = parameter.shape[0]
                by_shape[rows, parameter.numel() // rows].append((parameter, update.reshape(rows, -1)))
            # One batched product for each shape: the matrices are small, and a call for each costs more than its work.
            for (rows, columns), members in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in members]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape), alpha=-rate)
