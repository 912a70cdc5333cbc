"""What PyTorch makes of a network on a GPU: the contestants of gpu_acceptance that are not the SDK's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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

    From uint8 to uint8, as the SDK's engines are timed.
    Raises: BackendUnavailable without PyTorch, a GPU for it, or the network's recipe.
    """
    torch = _torch()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    place = torch.device("cuda", device)
    scale = bundle.manifest.scale
    for count, height, width in shapes:
        picture = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, device=place)
        shape = [count, height, width]

        def interpolate(picture: Any = picture) -> Any:
            large = torch.nn.functional.interpolate(picture.half(), scale_factor=scale, mode="bilinear")
            return large.round().to(torch.uint8)

        yield {"variant": "bilinear gpu", "shape": shape, "device_ms": _median_ms(torch, interpolate, repeats)}
        for name, (half, channels_last, compiled) in VARIANTS.items():
            dtype = torch.float16 if half else torch.float32
            layout = torch.channels_last if channels_last else torch.contiguous_format
            network = load_network(bundle, None).to(place, dtype, memory_format=layout).eval()
            torch._dynamo.reset()  # else the second shape would be compiled for any
            run: Any = torch.compile(network, dynamic=False) if compiled else network

            def enlarge(picture: Any = picture, run: Any = run, dtype: Any = dtype, layout: Any = layout) -> Any:
                large = run((picture.to(dtype) / 255).contiguous(memory_format=layout), scale)
                return (large.float().clamp(0, 1) * 255).round().to(torch.uint8)

            with torch.inference_mode():
                milliseconds = _median_ms(torch, enlarge, repeats)
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
