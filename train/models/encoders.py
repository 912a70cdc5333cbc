"""ResNets without their heads, as encoders of the perceptual U-Net, and their pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_nets import RESNET18_FILE, SAFE_DOWNLOAD, load_pretrained, load_weights
from .folding import Affine, merged
from .icnr import zero_bias_

RESNET34_FILE = "resnet34.safetensors"
# Blocks that a ResNet-34 has and a ResNet-18 has not: with a zero last norm each is the identity.
INSERTED_BLOCKS = ("layer1.2", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "layer3.4", "layer3.5")


@dataclass(frozen=True)
class Backbone:
    """A residual network of torchvision.

    weights_name: torchvision's enum entry. files: names in a weights folder, the best first; of RESNET18_FILE, which
    ends at layer3, a deeper network is begun.
    inception: the 7x7 convolution is replaced by an InceptionStem, which has no pretrained weights.
    """

    builder: str
    weights_name: str
    files: tuple[str, ...]
    inception: bool = False

    def fetch(self, weights: Path | str | None) -> tuple[str, dict[str, Tensor] | None]:
        """Fetch pretrained weights: the name of the network that they belong to, and its state (None: random).

        Raises: WeightsError if there are none.
        """
        import torchvision

        name = self.builder
        if isinstance(weights, Path) and RESNET18_FILE in self.files and not (weights / self.files[0]).is_file():
            name = "resnet18"
        entry = torchvision.models.get_weight(self.weights_name)
        state = load_pretrained(
            name, weights, files=self.files, download=lambda: entry.get_state_dict(**SAFE_DOWNLOAD)
        )  # fmt: skip
        return name, state


RESNET34 = Backbone("resnet34", "ResNet34_Weights.IMAGENET1K_V1", (RESNET34_FILE, RESNET18_FILE))
BACKBONES = {
    "resnet18": Backbone("resnet18", "ResNet18_Weights.IMAGENET1K_V1", ("resnet18.safetensors", RESNET18_FILE)),
    "resnet34": RESNET34,
    "resnet50": Backbone("resnet50", "ResNet50_Weights.IMAGENET1K_V1", ("resnet50.safetensors",)),
    "inception": replace(RESNET34, inception=True),
}


class InceptionStem(nn.Module):
    """Parallel 1x1, 3x3, 5x5 (as two 3x3) and pooled branches: (N, 3, H, W) -> (N, 64, H/2, W/2), 16 channels each.

    Source: Szegedy et al., arXiv 1409.4842; the two 3x3: arXiv 1512.00567.
    """

    def __init__(self, inputs: int = 3, outputs: int = 64):
        super().__init__()
        width = outputs // 4
        self.point = nn.Conv2d(inputs, width, 1, stride=2)
        self.three = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
        self.five_first = nn.Conv2d(inputs, width, 3, padding=1)
        self.five_second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.pooled = nn.Conv2d(inputs, width, 1)
        for conv in (self.point, self.three, self.five_first, self.five_second, self.pooled):
            nn.init.kaiming_normal_(conv.weight)
            zero_bias_(conv)

    def forward(self, x: Tensor) -> Tensor:
        five = self.five_second(F.relu(self.five_first(x)))
        pooled = self.pooled(F.max_pool2d(x, 3, stride=2, padding=1))
        return torch.cat((self.point(x), self.three(x), five, pooled), dim=1)


class Encoder(nn.Module):
    """A ResNet without its head: (N, 3, H, W) normalised RGB -> activations at 1/2, 1/4, 1/8, 1/16 and 1/32.

    The first has passed bn1 and ReLU; the others are the outputs of layer1 to layer4.
    channels: of the five activations.
    """

    def __init__(self, backbone: str = "resnet34") -> None:
        super().__init__()
        import torchvision

        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}: one of {', '.join(BACKBONES)}")
        self.backbone = BACKBONES[backbone]
        resnet = getattr(torchvision.models, self.backbone.builder)(weights=None)
        self.conv1: nn.Module = InceptionStem() if self.backbone.inception else resnet.conv1
        self.bn1: nn.Module = resnet.bn1
        self.layer1: nn.Sequential = resnet.layer1
        self.layer2: nn.Sequential = resnet.layer2
        self.layer3: nn.Sequential = resnet.layer3
        self.layer4: nn.Sequential = resnet.layer4
        self.channels: tuple[int, ...] = (resnet.bn1.num_features, *(_width(layer) for layer in self.layers()))

    def layers(self) -> tuple[nn.Sequential, ...]:
        """Give the four residual layers."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        half = F.relu(self.bn1(self.conv1(picture)))
        quarter = self.layer1(F.max_pool2d(half, 3, stride=2, padding=1))
        eighth = self.layer2(quarter)
        sixteenth = self.layer3(eighth)
        return half, quarter, eighth, sixteenth, self.layer4(sixteenth)

    def fold(self) -> None:
        """Merge every batch norm into the convolution before it, in place; behind a stem of branches into a scale."""
        if isinstance(self.conv1, InceptionStem):
            self.bn1 = Affine(self.bn1)
        else:
            self.conv1, self.bn1 = merged(self.conv1, self.bn1), nn.Identity()
        block: Any
        for layer in self.layers():
            for block in layer:
                for conv, norm in _convolutions(block):
                    setattr(block, conv, merged(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())
                if block.downsample is not None:
                    block.downsample = merged(block.downsample[0], block.downsample[1])

    def load(self, weights: Path | str | None) -> frozenset[str]:
        """Start from ImageNet weights: the backbone's own, or a ResNet-18's up to layer3.

        Returns: the names of the tensors that were loaded.
        Raises: WeightsError if there are none, or they do not fit.
        """
        name, state = self.backbone.fetch(weights)
        if state is None:
            return frozenset()
        stem = ("conv1.", "bn1.") if self.backbone.inception else ()
        # The head is left out, and where another stem stands, what belongs to the 7x7 convolution.
        known = {key for key in self.state_dict() if not key.startswith(stem)}
        state = {key: value for key, value in state.items() if key in known}
        partial = name != self.backbone.builder or (name == "resnet18" and "layer4.0.conv1.weight" not in state)
        lacking = (*INSERTED_BLOCKS, "layer4") if partial else ()
        load_weights(self, state, name=name, optional=(*stem, *lacking))
        if partial:
            modules = dict(self.named_modules())
            for block in INSERTED_BLOCKS:
                if block in modules:
                    nn.init.zeros_(self.get_parameter(f"{block}.bn2.weight"))
                    nn.init.zeros_(self.get_parameter(f"{block}.bn2.bias"))
        return frozenset(state)


def _convolutions(block: nn.Module) -> list[tuple[str, str]]:
    """Name the convolutions of a residual block with their norms: two in a basic block, three in a bottleneck."""
    return [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(block, f"conv{i}")]


def _width(layer: nn.Sequential) -> int:
    norm = layer[-1].get_submodule(_convolutions(layer[-1])[-1][1])
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.num_features
