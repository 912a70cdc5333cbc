"""Where a run computes: device, precision, and the processes that share its work."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ResourceError

LOG = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device.

    Of several processes on a machine each takes the GPU of its number, unless told one.
    Raises: ResourceError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ResourceError(f"--device {name}: expected auto, cpu or cuda:N") from exc
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"--device {name}: expected auto, cpu or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu, or fewer processes"
        )
    return device


def choose_autocast(precision: str, device: torch.device) -> bool:
    """Tell whether the forward pass runs in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))


def memory_bytes() -> int | None:
    """Tell how much memory is free on the host; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class Processes:
    """The processes of `torchrun` that train one network together; alone without it.

    Each takes its part of every batch, so that the batch is the recipe's whatever their number.
    """

    rank: int = 0
    count: int = 1
    control: Any = None  # the group in which the first one tells the others what to do, on the host

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes, validates and reports for all."""
        return self.rank == 0

    def decide(self, *flags: bool) -> tuple[bool, ...]:
        """Give all processes the first one's answers: they must save, look and stop at the same step."""
        if self.count == 1:
            return flags
        told = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.broadcast(told, src=0, group=self.control)
        return tuple(bool(flag) for flag in told)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes, in place and in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, fact: object) -> bool:
        """Tell whether a fact is the same in all processes."""
        if self.count == 1:
            return True
        facts: list[object] = [None] * self.count
        torch.distributed.all_gather_object(facts, fact, group=self.control)
        return all(each == fact for each in facts)

    def share_batch_norm(self, network: Any, device: torch.device) -> Any:
        """Let every BatchNorm of a network see the whole batch; on CPUs it sees its process's part, which is told."""
        has_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        if self.count == 1 or not has_norm:
            return network
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if self.is_first:
            LOG.warning(
                "%s has BatchNorm, which on CPUs sees each process's part of the batch alone: "
                "the result is not that of one process",
                type(network).__name__,
            )
        return network


def join_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun has started; alone where it has not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Processes(torch.distributed.get_rank(), count, torch.distributed.new_group(backend="gloo"))
