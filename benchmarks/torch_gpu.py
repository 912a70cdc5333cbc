"""What PyTorch makes of a network on a GPU: the contestants of gpu_acceptance that are not the SDK's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from sdk import Bundle
from sdk.errors import BackendUnavailable

from .torch_eager import load_network

# name -> (half precision, channels last, compiled)
VARIANTS = {
    "eager fp32": (False, False, False),
    "eager fp16": (True, False, False),
    "eager fp16 channels-last": (True, True, False),
    "compiled fp16 channels-last": (True, True, True),
}
MATRIX_SIDE = 8192


def time_network(
    bundle: Bundle, shapes: Sequence[tuple[int, int, int]], device: int, *, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time the bundle's network with random weights, and bilinear interpolation, on tensors that are on the GPU.

    Raises: BackendUnavailable without PyTorch, a GPU for it, or the network's recipe.
    """
    torch = _torch()
    place = torch.device("cuda", device)
    scale = bundle.manifest.scale
    for count, height, width in shapes:
        picture = torch.zeros(count, 3, height, width, dtype=torch.uint8, device=place)
        shape = [count, height, width]

        def interpolate(picture: Any = picture) -> Any:
            return torch.nn.functional.interpolate(picture.half(), scale_factor=scale, mode="bilinear")

        yield {"variant": "bilinear gpu", "shape": shape, "device_ms": _median_ms(torch, interpolate, repeats)}
        for name, (half, channels_last, compiled) in VARIANTS.items():
            network = load_network(bundle, None).to(place, torch.float16 if half else torch.float32).eval()
            x = picture.to(torch.float16 if half else torch.float32) / 255
            if channels_last:
                network, x = (item.to(memory_format=torch.channels_last) for item in (network, x))
            torch._dynamo.reset()  # else the second shape would be compiled for any
            run: Any = torch.compile(network, dynamic=False) if compiled else network
            with torch.inference_mode():
                milliseconds = _median_ms(torch, partial(run, x, scale), repeats)
            yield {"variant": name, "shape": shape, "device_ms": milliseconds}


def matrix_tflops(device: int) -> float:
    """Measure products of large half-precision matrices, in 1e12 operations a second."""
    torch = _torch()
    left, right = (
        torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=torch.float16, device=torch.device("cuda", device)) for _ in "ab"
    )
    return 2 * MATRIX_SIDE**3 / (_median_ms(torch, lambda: left @ right, 20) * 1e-3) / 1e12


def _torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        raise BackendUnavailable("PyTorch is not installed") from exc
    if not torch.cuda.is_available():
        raise BackendUnavailable("PyTorch sees no GPU")
    return torch


def _median_ms(torch: Any, work: Callable[[], object], repeats: int) -> float:
    samples = []
    for number in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        work()
        torch.cuda.synchronize()
        if number >= 3:
            samples.append((time.perf_counter_ns() - start) / 1e6)
    return round(float(np.median(samples)), 4)
