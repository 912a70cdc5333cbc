"""The perceptual U-Net: a ResNet-34 encoder under a PixelShuffle decoder, at output resolution (SEEDS A).

Its layout follows fastai's DynamicUnet (fastai v1, `models/unet.py`) as the super-resolution lesson uses it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize
from torch.nn.utils.parametrizations import weight_norm

from ..errors import WeightsError
from ..feature_nets import Normalise, load_pretrained
from .icnr import icnr_

STRIDE = 32  # five halvings, in output pixels
WEIGHT_FILES = {
    "resnet34": "resnet34.safetensors",
    "resnet34 from resnet18": "resnet18_imagenet_stem_to_layer3.fp16.safetensors",
}
# Blocks that a ResNet-34 has and a ResNet-18 has not: with a zero last norm each is the identity.
INSERTED_BLOCKS = ("layer1.2", "layer2.2", "layer2.3", "layer3.2", "layer3.3", "layer3.4", "layer3.5")


def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Make a weight-normed convolution with Kaiming init; g holds one gain for each output channel."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.zeros_(conv.bias)
    return weight_norm(conv)


class ShuffleUp(nn.Module):
    """1x1 convolution, PixelShuffle(2), ReLU and blur: (N, inputs, h, w) -> (N, outputs, 2h, 2w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs * 4, 1)
        # ICNR goes on the plain weight: set after weight norm, the first forward would replace it.
        icnr_(conv.weight, factor=2)
        nn.init.zeros_(conv.bias)
        self.conv = weight_norm(conv)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shuffle(self.conv(x)))
        # Replication pad and a 2x2 mean: evens out the sub-pixel phases that training brings apart.
        return F.avg_pool2d(F.pad(x, (1, 0, 1, 0), mode="replicate"), 2, stride=1)


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

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.scale = nn.Parameter(scale.view(1, -1, 1, 1))
        self.shift = nn.Parameter((norm.bias.detach() - norm.running_mean * scale).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class UpBlock(nn.Module):
    """Enlarge, join the normalised skip, two 3x3 convolutions."""

    def __init__(self, inputs: int, skip: int, *, outputs: int, attention: bool = False):
        super().__init__()
        up = inputs // 2
        self.up = ShuffleUp(inputs, up)
        self.norm = nn.BatchNorm2d(skip)
        self.conv1 = convolution(up + skip, outputs, 3)
        self.conv2 = convolution(outputs, outputs, 3)
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

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


class PerceptualUNet(nn.Module):
    """U-Net of 41,229,213 parameters on the interpolated picture; one network serves x1, x2 and x4.

    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 32.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, system A.
    """

    def __init__(self, scales: tuple[int, ...] = (2,), *, attention: bool = False):
        super().__init__()
        import torchvision

        if any(scale not in (1, 2, 4) for scale in scales):
            raise ValueError(f"scales are 1, 2 or 4, not {list(scales)}")
        self.scales = scales
        self.pretrained: frozenset[str] = frozenset()  # names of the encoder's tensors that were loaded
        self.normalise = Normalise()
        resnet = torchvision.models.resnet34(weights=None)
        self.encoder = nn.ModuleDict(
            {name: getattr(resnet, name) for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")}
        )
        self.middle_norm = nn.BatchNorm2d(512)
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
        stem = nn.ModuleList([encoder["conv1"], encoder["bn1"], encoder["layer1"], encoder["layer2"]])
        deep = nn.ModuleList([encoder["layer3"], encoder["layer4"]])
        ours = (self.middle_norm, self.middle, self.up1, self.up2, self.up3, self.up4)
        return [stem, deep, nn.ModuleList([*ours, self.last_up, self.last_cross, self.last])]

    def freezable_parameters(self) -> list[nn.Parameter]:
        """Give the convolutions that came with pretrained weights; BatchNorm stays trainable."""
        convolutions = {f"{name}.weight" for name, m in self.encoder.named_modules() if isinstance(m, nn.Conv2d)}
        parameters = dict(self.encoder.named_parameters())
        return [parameters[name] for name in sorted(convolutions & self.pretrained)]

    def hidden_weights(self) -> list[nn.Parameter]:
        """None: weight norm already separates length from direction."""
        return []

    def fold(self) -> None:
        """Merge weight norm and batch norm into the convolutions, the other batch norms into a scale and a shift."""
        for module in self.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
        encoder = self.encoder
        encoder["conv1"] = fuse_conv_bn_eval(encoder["conv1"], encoder["bn1"])
        encoder["bn1"] = nn.Identity()
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            for block in encoder[layer]:
                block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
                block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
                if block.downsample is not None:
                    block.downsample = fuse_conv_bn_eval(block.downsample[0], block.downsample[1])
        self.middle_norm = Affine(self.middle_norm)
        for up in (self.up1, self.up2, self.up3, self.up4):
            up.norm = Affine(up.norm)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        if scale > 1:
            lr = F.interpolate(lr, scale_factor=float(scale), mode="bilinear", align_corners=False)
        picture = self.normalise(lr)
        encoder = self.encoder
        half = F.relu(encoder["bn1"](encoder["conv1"](picture)))  # (N, 64, H/2, W/2)
        quarter = encoder["layer1"](F.max_pool2d(half, 3, stride=2, padding=1))  # (N, 64, H/4, W/4)
        eighth = encoder["layer2"](quarter)  # (N, 128, H/8, W/8)
        sixteenth = encoder["layer3"](eighth)  # (N, 256, H/16, W/16)
        x = F.relu(self.middle_norm(encoder["layer4"](sixteenth)))  # (N, 512, H/32, W/32)
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

        Raises: WeightsError if there are none.
        """
        import torchvision

        name = "resnet34"
        if isinstance(weights, Path) and not (weights / WEIGHT_FILES["resnet34"]).is_file():
            name = "resnet34 from resnet18"
        state = load_pretrained(
            name,
            weights,
            files=WEIGHT_FILES,
            download=lambda: torchvision.models.ResNet34_Weights.IMAGENET1K_V1.get_state_dict(progress=True),
        )
        if state is None:
            return
        if name != "resnet34":
            for block in INSERTED_BLOCKS:
                layer, index = block.split(".")
                norm = self.encoder[layer][int(index)].bn2
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)
        wanted = self.encoder.state_dict()
        result = self.encoder.load_state_dict({key: v for key, v in state.items() if key in wanted}, strict=False)
        self.pretrained = frozenset(state) & frozenset(wanted)
        allowed = () if name == "resnet34" else (*INSERTED_BLOCKS, "layer4")
        lacking = [k for k in result.missing_keys if not k.startswith(allowed) and "num_batches" not in k]
        if lacking:
            raise WeightsError(f"the weights of {name} lack {', '.join(lacking[:4])}")


def build_perceptual_unet(
    *, scales: tuple[int, ...], weights: Path | str | None, attention: bool = False
) -> PerceptualUNet:
    """Build the U-Net with its encoder pretrained, or at random where `weights` says so."""
    model = PerceptualUNet(scales, attention=attention)
    model.load_encoder(weights)
    return model
