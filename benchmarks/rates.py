"""What a processor can do at best: products of large matrices, copies of large buffers. Needs PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sdk.errors import BackendUnavailable

ROUNDS = 15
MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}
COPY_MIB = 256


def matrix_rate(device: str, precision: str) -> float:
    """Give the operations a second, two for each multiplication, of the best of ROUNDS products of square matrices.

    precision: "fp32" (not TF32), "fp16" or "bf16".
    Raises: BackendUnavailable without PyTorch or the device.
    """
    torch = _torch(device)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    side = MATRIX_SIDES[torch.device(device).type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    result = torch.empty_like(left)
    return 2 * side**3 / _best_s(torch, device, lambda: torch.mm(left, right, out=result))


def copy_rate(device: str) -> float:
    """Give the bytes a second, read and written, of the best of ROUNDS copies.

    Raises: as matrix_rate.
    """
    torch = _torch(device)
    source = torch.zeros(COPY_MIB << 20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.numel() / _best_s(torch, device, lambda: target.copy_(source))


def _torch(device: str) -> Any:
    try:
        import torch
    except ImportError as exc:
        raise BackendUnavailable("PyTorch is not installed; install sr-sdk[train] to measure rates with it") from exc
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailable(f"PyTorch sees no CUDA device for {device}")
    return torch


def _best_s(torch: Any, device: str, work: Callable[[], object]) -> float:
    def finish() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(ROUNDS):
        finish()
        started = time.perf_counter()
        work()
        finish()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
