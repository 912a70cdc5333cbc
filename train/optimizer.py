"""The optimisers of a phase: AdamW, and Muon, whose steps are made orthogonal, for hidden convolutions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RecipeError
from .models.network import Network
from .recipe import OptimizerConfig, PhaseConfig
from .schedule import group_rates

# Coefficients of the quintic iteration (Jordan et al., 2024): steep at zero, singular values end in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace each matrix by nearly the orthogonal factor of its polar decomposition.

    matrices: (N, rows, columns) float32. Returns: the same shape.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    # Each step is x <- polynomial(x x^T) x. All polynomials of one matrix commute: their product is gathered with
    # small square matrices, and the long ones are multiplied twice instead of ten times. In bfloat16 the squares of
    # small singular values would drown.
    gram = torch.bmm(x, x.mT)
    polynomial = product = _polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
        polynomial = _polynomial(gram)
        product = torch.bmm(polynomial, product)
    x = torch.bmm(product, x)
    return x.mT if tall else x


def _polynomial(gram: Tensor) -> Tensor:
    """Give a + b*gram + c*gram^2 of each matrix."""
    a, b, c = NEWTON_SCHULZ
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result


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
            # One call for all parameters of a shape: they are small, and a call for each costs more than its work.
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for parameters in by_shape.values():
                updates = self._nesterov(parameters, group["betas"][0])
                # Channels last, as they lie in memory; the order of a matrix's columns changes nothing.
                matrices = torch.stack([update.movedim(1, -1) for update in updates])
                flat = orthogonalise(matrices.flatten(2))
                rate = group["lr"] * max(1.0, flat.shape[1] / flat.shape[2]) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                steps = flat.view(matrices.shape).movedim(-1, 2).unbind()
                torch._foreach_add_(parameters, steps, alpha=-rate)

    def _nesterov(self, parameters: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, means, momentum)


def make_optimizers(network: nn.Module, config: OptimizerConfig, phase: PhaseConfig) -> list[torch.optim.Optimizer]:
    """Make the optimisers of what is trained in a phase: AdamW, and Muon for hidden convolutions where it is asked for.

    Each group of layers has its highest rate under "highest_rate".
    Raises: RecipeError if Muon is asked for and the network has nothing for it.
    """
    hidden: set[int] = set()
    modules: list[nn.Module] = [network]
    if isinstance(network, Network):  # else a critic: one group, AdamW
        hidden = {id(p) for p in network.hidden_weights()} if config.muon_rate else set()
        if config.muon_rate and not hidden:
            raise RecipeError(f"optimizer.muon_rate: {type(network).__name__} has no weights for Muon; leave it 0")
        modules = network.layer_groups()
    rates = group_rates(phase.encoder_learning_rate, phase.learning_rate, len(modules))
    adam: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for module, rate in zip(modules, rates, strict=True):
        trained = [p for p in module.parameters() if p.requires_grad]
        adam.append({"params": [p for p in trained if id(p) not in hidden], "highest_rate": rate})
        muon.append({"params": [p for p in trained if id(p) in hidden], "highest_rate": rate * config.muon_rate})
    betas = (config.beta1_high, config.beta2)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam, betas=betas, weight_decay=config.weight_decay, fused=True)
    ]
    return [*made, Muon(muon, betas=betas, weight_decay=config.weight_decay)] if hidden else made


def states_by_name(network: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Give what optimisers remember of a network's parameters, as "parameter.key"."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
        for key, value in state.items()
    }


def load_states(network: nn.Module, optimizers: Iterable[torch.optim.Optimizer], states: dict[str, Tensor]) -> None:
    """Give optimisers back what `states_by_name` took.

    Raises: KeyError for a parameter that is not the network's, ValueError for a state that is not the parameter's.
    """
    parameters = dict(network.named_parameters())
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in states.items():
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        if tensor.dtype != torch.float32 or tensor.shape not in ((), parameter.shape):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} is no state of {tuple(parameter.shape)}")
        # Device and memory format of the parameter, as a fresh optimiser makes them; step counts have no format.
        like = torch.empty_like(parameter) if tensor.ndim else torch.empty_like(tensor, device=parameter.device)
        owners[id(parameter)].state[parameter][key] = like.copy_(tensor)
