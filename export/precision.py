"""Number formats: weights rounded to fp16 for the file, and a network that computes in fp16, all of it or in part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from train.models import Network

from .errors import ExportError

MAX_ISLAND_SHARE = 0.5  # of the weights: with more of them in fp32 the fp16 graph is not worth its name


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


def in_half(network: Network, islands: Sequence[str] = ()) -> Network:
    """Copy a network with fp16 weights and arithmetic.

    islands: names of modules that stay in fp32, with casts before and behind them.
    """
    return _half_inside(network, "", islands)


def find_islands(network: Network, quality: Callable[[Network], float], *, limit: float) -> tuple[str, ...]:
    """Find the modules that must stay in fp32 for the rest to compute in fp16.

    What a module costs is measured: it alone in fp16, all others in fp32. One that costs too much is searched for the
    parts inside it that are to blame; it is an island itself where they do not explain it, as when a value between
    two of them is beyond 65504. What is left beyond the limit then is small costs together: the largest go first.
    quality: of a network, in dB, higher is better; what is not finite must come out low. limit: what it must reach.
    Raises: ExportError if the islands would hold more than MAX_ISLAND_SHARE of the weights.
    """
    search = _Search(network, quality, limit)
    islands = search.islands_inside("")
    held = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if any(_is_inside(name, island) for island in islands)
    )
    if "" in islands or held > MAX_ISLAND_SHARE * sum(parameter.numel() for parameter in network.parameters()):
        where = ", ".join(islands) if "" not in islands else "the whole network"
        raise ExportError(f"fp16: {where} would have to stay in fp32 to reach {limit} dB; export without --fp16")
    return tuple(islands)


class _Search:
    """Measures parts of a network in fp16; a part is the name of a module that is called, "" the whole network."""

    def __init__(self, network: Network, quality: Callable[[Network], float], limit: float):
        self._network, self._quality, self._limit = network, quality, limit
        self._called = self._find_called()

    def islands_inside(self, part: str) -> list[str]:
        """Choose islands inside a part that costs too much in fp16; itself where nothing less helps."""
        costs = sorted((self._measure(child), child) for child in self._children(part))
        islands: list[str] = []
        for value, child in costs:
            if not value >= self._limit:
                islands += self.islands_inside(child)
        if islands and self._measure(part, islands) >= self._limit:
            return islands
        for _, child in costs:
            islands = [island for island in islands if not _is_inside(island, child)] + [child]
            if self._measure(part, islands) >= self._limit:
                return islands
        return [part]

    def _measure(self, part: str, islands: Sequence[str] = ()) -> float:
        return self._quality(_half_inside(self._network, part, islands))

    def _find_called(self) -> list[str]:
        """List the modules that are called: a ModuleList is not, and has nothing to cast."""
        called: dict[str, None] = {}
        network = copy.deepcopy(self._network)
        for name, module in network.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.setdefault(name))
        self._quality(network)
        return [name for name in called if name]

    def _children(self, part: str) -> list[str]:
        """List the called modules inside a part with none between."""
        inside = [name for name in self._called if name != part and _is_inside(name, part)]
        return [name for name in inside if not any(name != other and _is_inside(name, other) for other in inside)]


def _is_inside(name: str, part: str) -> bool:
    return part == "" or name == part or name.startswith(f"{part}.")


def _half_inside(network: Network, part: str, islands: Sequence[str]) -> Network:
    """Copy a network that computes in fp16 inside a part but for the islands, in fp32 outside.

    Hooks cast at the borders, so that parameters keep their names.
    """
    result = copy.deepcopy(network)
    for name, module in result.named_modules():
        if _is_inside(name, part) and not any(_is_inside(name, island) for island in islands):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.half()
    if part:  # whoever looks at the first weight alone may bring a picture in fp16
        _cast_around(result, inside=torch.float32, outside=torch.float32)
    _cast_around(result.get_submodule(part), inside=torch.float16, outside=torch.float32)
    for island in islands:
        _cast_around(result.get_submodule(island), inside=torch.float32, outside=torch.float16)
    return result


def _cast_around(module: nn.Module, *, inside: torch.dtype, outside: torch.dtype) -> None:
    """Cast what goes into a module to one type and what comes out to another."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, inside), _cast(kwargs, inside)), with_kwargs=True
    )
    module.register_forward_hook(lambda _, args, output: _cast(output, outside))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating tensors, also inside tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
