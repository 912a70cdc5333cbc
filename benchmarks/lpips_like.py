"""LPIPS-like (SqueezeNet): a perceptual distance in the form of LPIPS v0.1. Needs torch and two weights files.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018. Whether the heads were
fitted on these very SqueezeNet weights is not known, so the figure is never called LPIPS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdk import SRError

if TYPE_CHECKING:
    from torch import Tensor

Distance = Callable[[np.ndarray, np.ndarray], float]

LABEL = "LPIPS-like (SqueezeNet)"
FEATURES_FILE = "squeezenet1_1_features.fp16.safetensors"
HEADS_FILE = "lpips_v0.1_linear.safetensors"
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
POOLS = (2, 5, 8)
FIRES = (3, 4, 6, 7, 9, 10, 11, 12)
TAPS = (1, 4, 7, 9, 10, 11, 12)
MIN_SIDE = 17  # of a picture: what is left of fewer pixels cannot be pooled a third time


class LpipsUnavailable(SRError):
    """PyTorch or the weights are missing."""


class LpipsLike:
    """Distance of two pictures.

    features: state of torchvision's squeezenet1_1().features. heads: (1, C, 1, 1), one for each of TAPS.
    """

    def __init__(self, features: Mapping[str, Tensor], heads: list[Tensor]):
        self.state = {key: value.float() for key, value in features.items()}
        self.heads = [head.float() for head in heads]

    @classmethod
    def load(cls, weights: str | None = None) -> LpipsLike:
        """Read the weights from a folder, by default SR_WEIGHTS_DIR.

        Raises: LpipsUnavailable that says what is missing.
        """
        source = weights or os.environ.get("SR_WEIGHTS_DIR")
        if not source:
            files = f"{FEATURES_FILE} and {HEADS_FILE}"
            raise LpipsUnavailable(f"no weights; name the folder of {files} with --weights or SR_WEIGHTS_DIR")
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as exc:
            raise LpipsUnavailable(f"{exc.name} is not installed; install sr-sdk[train]") from exc
        try:
            features = load_file(Path(source) / FEATURES_FILE)
            heads = load_file(Path(source) / HEADS_FILE)
            network = cls(features, [heads[f"squeeze.lin{i}.model.1.weight"] for i in range(len(TAPS))])
            blank = np.zeros((32, 32, 3), np.uint8)
            network(blank, blank)
            return network
        except (OSError, SafetensorError, KeyError, RuntimeError) as exc:
            raise LpipsUnavailable(f"{source}: {FEATURES_FILE} and {HEADS_FILE} are not both there and whole") from exc

    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """Measure two (H, W, 3) uint8 RGB pictures of one shape: 0 if equal, larger if less alike."""
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(np.stack((a, b))).permute(0, 3, 1, 2).float() / 255  # (2, 3, H, W)
            total = 0.0
            for activation, head in zip(self.activations(x), self.heads):
                unit = activation / (activation.square().sum(1, keepdim=True).sqrt() + 1e-10)
                total += float(((unit[:1] - unit[1:]).square() * head).sum(1).mean())
            return total

    def activations(self, x: Tensor) -> list[Tensor]:
        """Run (N, 3, H, W) RGB in [0, 1]; give the activations behind the modules TAPS."""
        import torch.nn.functional as F

        x = (x * 2 - 1 - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        x = F.relu(self._convolve(x, "0", stride=2))
        taken = [x]
        for index in range(2, max(TAPS) + 1):
            x = F.max_pool2d(x, 3, 2, ceil_mode=True) if index in POOLS else self._fire(x, index)
            if index in TAPS:
                taken.append(x)
        return taken

    def _fire(self, x: Tensor, index: int) -> Tensor:
        import torch
        import torch.nn.functional as F

        x = F.relu(self._convolve(x, f"{index}.squeeze"))
        wide = (self._convolve(x, f"{index}.expand1x1"), self._convolve(x, f"{index}.expand3x3", padding=1))
        return F.relu(torch.cat(wide, 1))

    def _convolve(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 0) -> Tensor:
        import torch.nn.functional as F

        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)


def load_distance(weights: str | None) -> tuple[Distance | None, str | None]:
    """Load the distance, or say why there is none.

    Raises: LpipsUnavailable if a folder given by name does not hold the weights.
    """
    try:
        return LpipsLike.load(weights), None
    except LpipsUnavailable as exc:
        if weights is not None:
            raise
        return None, str(exc)
