"""The perceptual U-Net: a ResNet-34 encoder under a PixelShuffle decoder, at output resolution (SEEDS A).

Its layout follows fastai's DynamicUnet (fastai v1, `models/unet.py`) as the super-resolution lesson uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

from ..feature_nets import SAFE_DOWNLOAD, Normalise, load_pretrained, load_weights
from .icnr import icnr_, zero_bias_
from .network import Network

STRIDE = 32  # five halvings, in output pixels
RESNET34_FILE = "resnet34.safetensors"
RESNET18_FILE = "resnet18_imagenet_stem_to_layer3.fp16.safetensors"
# Blocks that a ResNet-34 has and a ResNet-18 has not: with a zero last norm each is the identity.
INSERTED_BLOCKS = ("layer1.2", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "layer3.4", "layer3.5")


def convolution(inputs: int, outputs: int, size: int) -> nn.Module:
    """Make a weight-normed convolution with Kaiming init; g holds one gain for each output channel."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight)
    zero_bias_(conv)
    return weight_norm(conv)


def merged(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """Merge a batch norm in eval mode into the convolution before it."""
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(conv, norm)


class ShuffleUp(nn.Module):
    """1x1 convolution, PixelShuffle(2), ReLU and blur: (N, inputs, h, w) -> (N, outputs, 2h, 2w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs * 4, 1)
        # ICNR goes on the plain weight: set after weight norm, the first forward would replace it.
        icnr_(conv.weight, factor=2)
        zero_bias_(conv)
        self.conv = weight_norm(conv)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shuffle(self.conv(x)))
        # Replication pad and a 2x2 mean: evens out the sub-pixel phases that training brings apart.
        # The pad is written as concatenation: ONNX's Pad of opset 18 has no way back to the 17 that is exported.
        x = torch.cat((x[:, :, :1], x), dim=2)
        return F.avg_pool2d(torch.cat((x[:, :, :, :1], x), dim=3), 2, stride=1)


class SelfAttention(nn.Module):
    """Attention over all positions, weighted in from zero. Source: Zhang et al., arXiv 1805.08318 (SAGAN)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv1d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv1d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv1d(channels, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (N, C, H*W)
        weights = torch.softmax(self.query(flat).transpose(1, 2) @ self.key(flat), dim=1)
        return x + self.gamma * (self.value(flat) @ weights).view_as(x)


class Affine(nn.Module):
    """A batch norm in eval mode as one scale and shift for each channel."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        self.scale = nn.Parameter(scale.view(1, -1, 1, 1))
        self.shift = nn.Parameter((norm.bias.detach() - norm.running_mean * scale).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Encoder(nn.Module):
    """ResNet-34 without its head: (N, 3, H, W) normalised RGB -> activations at 1/2, 1/4, 1/8, 1/16 and 1/32.

    The first has passed bn1 and ReLU; the others are the outputs of layer1 to layer4.
    """

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        resnet = torchvision.models.resnet34(weights=None)
        self.conv1: nn.Module = resnet.conv1
        self.bn1: nn.Module = resnet.bn1
        self.layer1: nn.Sequential = resnet.layer1
        self.layer2: nn.Sequential = resnet.layer2
        self.layer3: nn.Sequential = resnet.layer3
        self.layer4: nn.Sequential = resnet.layer4

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        half = F.relu(self.bn1(self.conv1(picture)))
        quarter = self.layer1(F.max_pool2d(half, 3, stride=2, padding=1))
        eighth = self.layer2(quarter)
        sixteenth = self.layer3(eighth)
        return half, quarter, eighth, sixteenth, self.layer4(sixteenth)

    def fold(self) -> None:
        """Merge every batch norm into the convolution before it, in place."""
        self.conv1, self.bn1 = merged(self.conv1, self.bn1), nn.Identity()
        block: Any
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                block.conv1, block.bn1 = merged(block.conv1, block.bn1), nn.Identity()
                block.conv2, block.bn2 = merged(block.conv2, block.bn2), nn.Identity()
                if block.downsample is not None:
                    block.downsample = merged(block.downsample[0], block.downsample[1])


class UpBlock(nn.Module):
    """Enlarge, join the normalised skip, two 3x3 convolutions."""

    def __init__(self, inputs: int, skip: int, *, outputs: int, attention: bool = False):
        super().__init__()
        up = inputs // 2
        self.up = ShuffleUp(inputs, up)
        self.norm: nn.Module = nn.BatchNorm2d(skip)
        self.conv1 = convolution(up + skip, outputs, 3)
        self.conv2 = convolution(outputs, outputs, 3)
        self.attention: nn.Module = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.relu(torch.cat((self.up(x), self.norm(skip)), dim=1))
        return self.attention(F.relu(self.conv2(F.relu(self.conv1(x)))))


class LastCross(nn.Module):
    """Residual block of two 3x3 convolutions over the decoder's output and the input picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = convolution(channels, channels, 3)
        self.conv2 = convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv2(F.relu(self.conv1(x))))


class PerceptualUNet(Network):
    """U-Net of 41,229,213 parameters on the interpolated picture; one network serves x1, x2 and x4.

    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 32.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, system A.
    """

    def __init__(self, scales: tuple[int, ...] = (2,), *, attention: bool = False):
        super().__init__()
        if any(scale not in (1, 2, 4) for scale in scales):
            raise ValueError(f"scales are 1, 2 or 4, not {list(scales)}")
        self.scales = scales
        self.pretrained: frozenset[str] = frozenset()  # names of the encoder's tensors that were loaded
        self.normalise = Normalise()
        self.encoder = Encoder()
        self.middle_norm: nn.Module = nn.BatchNorm2d(512)
        self.middle = nn.ModuleList([convolution(512, 1024, 3), convolution(1024, 512, 3)])
        self.up1 = UpBlock(512, 256, outputs=512)
        self.up2 = UpBlock(512, 128, outputs=384, attention=attention)
        self.up3 = UpBlock(384, 64, outputs=256)
        self.up4 = UpBlock(256, 64, outputs=96)
        self.last_up = ShuffleUp(96, 96)
        self.last_cross = LastCross(96 + 3)
        self.last = convolution(96 + 3, 3, 1)

    def stride(self, scale: int) -> int:
        """Give the grid in LR pixels."""
        return STRIDE // scale

    def layer_groups(self) -> list[nn.Module]:
        """Split the encoder in two and take the rest as the third, as the lesson does."""
        encoder = self.encoder
        stem = nn.ModuleList([encoder.conv1, encoder.bn1, encoder.layer1, encoder.layer2])
        deep = nn.ModuleList([encoder.layer3, encoder.layer4])
        ours = (self.middle_norm, self.middle, self.up1, self.up2, self.up3, self.up4)
        return [stem, deep, nn.ModuleList([*ours, self.last_up, self.last_cross, self.last])]

    def freezable_parameters(self) -> list[Tensor]:
        """Give the convolutions that came with pretrained weights; BatchNorm stays trainable."""
        convolutions = {f"{name}.weight" for name, m in self.encoder.named_modules() if isinstance(m, nn.Conv2d)}
        parameters = dict(self.encoder.named_parameters())
        return [parameters[name] for name in sorted(convolutions & self.pretrained)]

    def fold(self) -> None:
        """Merge weight norm and batch norm into the convolutions, the other batch norms into a scale and a shift."""
        super().fold()
        self.encoder.fold()
        self.middle_norm = Affine(self.middle_norm)
        for up in (self.up1, self.up2, self.up3, self.up4):
            up.norm = Affine(up.norm)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        if scale > 1:
            lr = F.interpolate(lr, scale_factor=float(scale), mode="bilinear", align_corners=False)
        picture = self.normalise(lr)
        half, quarter, eighth, sixteenth, deepest = self.encoder(picture)
        x = F.relu(self.middle_norm(deepest))  # (N, 512, H/32, W/32)
        for conv in self.middle:
            x = F.relu(conv(x))
        x = self.up1(x, sixteenth)
        x = self.up2(x, eighth)
        x = self.up3(x, quarter)
        x = self.up4(x, half)
        x = torch.cat((self.last_up(x), picture), dim=1)  # (N, 99, H, W)
        x = self.last(self.last_cross(x))
        return x * self.normalise.std + self.normalise.mean

    def load_encoder(self, weights: Path | str | None) -> None:
        """Start the encoder from ImageNet weights: a ResNet-34's, or a ResNet-18's up to layer3.

        Raises: WeightsError if there are none, or they do not fit.
        """
        import torchvision

        name = "resnet34"
        if isinstance(weights, Path) and not (weights / RESNET34_FILE).is_file():
            name = "resnet18"
        state = load_pretrained(
            name,
            weights,
            files=(RESNET34_FILE, RESNET18_FILE),
            download=lambda: torchvision.models.ResNet34_Weights.IMAGENET1K_V1.get_state_dict(**SAFE_DOWNLOAD),
        )
        if state is None:
            return
        # A ResNet-34's fc is left out.
        known = self.encoder.state_dict().keys()
        state = {key: value for key, value in state.items() if key in known}
        lacking = () if name == "resnet34" else (*INSERTED_BLOCKS, "layer4")
        load_weights(self.encoder, state, name=name, optional=lacking)
        self.pretrained = frozenset(state)
        if name == "resnet18":
            for block in INSERTED_BLOCKS:
                nn.init.zeros_(self.encoder.get_parameter(f"{block}.bn2.weight"))
                nn.init.zeros_(self.encoder.get_parameter(f"{block}.bn2.bias"))


def build_perceptual_unet(
    *, scales: tuple[int, ...], weights: Path | str | None, attention: bool = False
) -> PerceptualUNet:
    """Build the U-Net with its encoder pretrained, or at random where `weights` says so."""
    model = PerceptualUNet(scales, attention=attention)
    model.load_encoder(weights)
    return model
