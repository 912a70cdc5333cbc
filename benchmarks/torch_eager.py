"""The bundle's network in PyTorch, eager or compiled, as a contestant. Needs the `train` extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdk import Bundle
from sdk.errors import BackendUnavailable, OptionError

from .result import first_line

MAX_SHAPES = 64
RANDOM = "random (the bundle's architecture; timing does not depend on the values)"


def describe_weights(run: Path | None) -> str:
    """Say which weights the PyTorch contestants run."""
    return RANDOM if run is None else f"run {run.resolve().name}"


def open_network(
    bundle: Bundle, *, run: Path | None, device: str, precision: str, compiled: bool = False, stage: str = "auto"
) -> Callable[[np.ndarray], np.ndarray]:
    """Build a function (h, w, 3) or (N, h, w, 3) uint8 -> the same, enlarged, that does what the deployed graph does.

    run: folder of sr-train that holds the weights of the bundle's stage; None: random weights.
    precision: "fp32", "fp16": half throughout, or "bf16": autocast; on channels-last tensors.
    compiled: by torch.compile, for each shape that comes; on a CPU with weights laid out for it once (freezing).
    Raises: BackendUnavailable without PyTorch, the device, a usable recipe or what compiles; OptionError if the run
    does not fit.
    """
    try:
        import torch
        import torch.nn.functional as F
    except ImportError as exc:
        raise BackendUnavailable("PyTorch is not installed; install sr-sdk[train] to compare with it") from exc
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailable(f"PyTorch sees no CUDA device for {device}")
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    scale = bundle.manifest.scale
    layout = torch.channels_last
    dtype = torch.float16 if precision == "fp16" else torch.float32
    network = load_network(bundle, run, stage=stage).to(device, dtype, memory_format=layout).eval()
    stride = network.stride(scale)
    forward: Any = network
    if compiled:
        torch._dynamo.config.recompile_limit = MAX_SHAPES  # beyond it would run uncompiled, and not say so
        forward = torch.compile(network, dynamic=False, options={"freezing": device == "cpu"})

    @torch.inference_mode()
    def upscale(lr: np.ndarray) -> np.ndarray:
        batch = lr[None] if lr.ndim == 3 else lr
        height, width = batch.shape[1:3]
        x = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).to(dtype) / 255
        x = F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")
        x = x.contiguous(memory_format=layout)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            x = forward(x, scale)
        x = (x.float().clamp(0, 1) * 255).round().to(torch.uint8)
        # (N, 3, H, W) -> (N, H, W, 3), without the padding
        large = np.ascontiguousarray(x.permute(0, 2, 3, 1).cpu().numpy()[:, : height * scale, : width * scale])
        return large[0] if lr.ndim == 3 else large

    if compiled:
        try:
            upscale(np.zeros((stride, stride, 3), np.uint8))
        except Exception as exc:  # of the compiler: there may be none, or it may not know the network
            raise BackendUnavailable(f"torch.compile failed: {first_line(exc)}") from exc
    return upscale


def load_network(bundle: Bundle, run: Path | None, *, stage: str = "auto") -> Any:
    """Give the folded network, as it was exported; run and stage as for open_network. Raises: as that."""
    try:
        from train.checkpoint import load_checkpoint, stage_folder
        from train.errors import TrainError
        from train.models import build_model
        from train.recipe import recipe_from_dict
    except ImportError as exc:
        raise BackendUnavailable(f"{exc.name} is not installed; install sr-sdk[train]") from exc
    checkpoint = None
    try:
        if run is not None:
            checkpoint = load_checkpoint(stage_folder(run, bundle.stage(stage).name))
        facts = bundle.manifest.training if checkpoint is None else checkpoint.facts
        if "recipe" not in facts:
            raise BackendUnavailable("the bundle does not say which network it holds (training.recipe); give --run")
        network = build_model(recipe_from_dict(facts["recipe"]).model, weights="random")
        if checkpoint is not None:
            network.load_state_dict(checkpoint.group("model"))
        network.eval().fold()
        return network
    except (TrainError, RuntimeError) as exc:
        reason = first_line(exc)
        if run is not None:
            raise OptionError(f"--run {run}: does not fit this model ({reason})") from exc
        raise BackendUnavailable(f"PyTorch cannot run this model's network: {reason}") from exc
