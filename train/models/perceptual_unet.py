"""The perceptual U-Net: a ResNet encoder under a PixelShuffle decoder, at output resolution (SEEDS A to C).

Its layout follows fastai's DynamicUnet (fastai v1, `models/unet.py`) as the super-resolution lesson uses it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feature_nets import RESNET18_FILE as RESNET18_FILE
from ..feature_nets import Normalise
from .decoder import UPSAMPLINGS, Growth, LastCross, UpBlock, convolution
from .encoders import Encoder
from .folding import Affine
from .interpolated import InterpolatedNetwork

STRIDE = 32  # five halvings, in pixels of the interpolated picture


class PerceptualUNet(InterpolatedNetwork):
    """U-Net of 41,229,213 parameters on the interpolated picture; one network serves x1, x2 and x4.

    backbone: a name in train.models.encoders.BACKBONES.
    attention: SAGAN's, behind the second enlargement; it makes the network see everything, so it cannot be tiled.
    blur: average neighbours behind each enlargement. upsampling: a name in train.models.decoder.UPSAMPLINGS.
    last_cross: join the picture once more before the last convolution.
    output_range: (lowest, highest) normalised value that a scaled sigmoid lets through, as fastai's y_range; None: any.
    growth: enlargements by two at the end; `scales` count them, so the picture is interpolated to output/2**growth.
    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 32 * 2**growth.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, systems A and C.
    """

    def __init__(
        self,
        scales: tuple[int, ...] = (2,),
        *,
        backbone: str = "resnet34",
        attention: bool = False,
        blur: bool = True,
        last_cross: bool = True,
        upsampling: str = "shuffle",
        output_range: tuple[float, float] | None = None,
        growth: int = 0,
    ):
        if growth < 0:
            raise ValueError(f"growth counts layers, got {growth}")
        super().__init__(scales, grid=STRIDE * 2**growth, own_factor=2**growth)
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"unknown upsampling {upsampling!r}: one of {', '.join(UPSAMPLINGS)}")
        if output_range is not None and not output_range[0] < output_range[1]:
            raise ValueError(f"output_range is (lowest, highest), got {output_range}")
        self.output_range = output_range
        self.pretrained: frozenset[str] = frozenset()  # names of the encoder's tensors that were loaded
        self.normalise = Normalise()
        self.encoder = Encoder(backbone)
        half, quarter, eighth, sixteenth, deepest = self.encoder.channels
        up = partial(UPSAMPLINGS[upsampling], blur=blur)
        self.middle_norm: nn.Module = nn.BatchNorm2d(deepest)
        self.middle = nn.ModuleList([convolution(deepest, deepest * 2, 3), convolution(deepest * 2, deepest, 3)])
        # Each block is as wide as what it joins, the last one half of that.
        width = deepest // 2 + sixteenth
        self.up1 = UpBlock(deepest, sixteenth, outputs=width, up=up)
        width, inputs = width // 2 + eighth, width
        self.up2 = UpBlock(inputs, eighth, outputs=width, up=up, attention=attention)
        width, inputs = width // 2 + quarter, width
        self.up3 = UpBlock(inputs, quarter, outputs=width, up=up)
        width, inputs = (width // 2 + half) // 2, width
        self.up4 = UpBlock(inputs, half, outputs=width, up=up)
        self.last_up = up(width, width)
        width += 3 if last_cross else 0
        self.last_cross = LastCross(width) if last_cross else None
        self.growth = nn.ModuleList(Growth(width) for _ in range(growth))
        self.last = convolution(width, 3, 1)

    def layer_groups(self) -> list[nn.Module]:
        """Split the encoder in two and take the rest as the third, as the lesson does."""
        encoder = self.encoder
        stem = nn.ModuleList([encoder.conv1, encoder.bn1, encoder.layer1, encoder.layer2])
        deep = nn.ModuleList([encoder.layer3, encoder.layer4])
        ours = nn.ModuleList(module for module in self.children() if module is not encoder)
        return [stem, deep, ours]

    def freezable_parameters(self) -> list[Tensor]:
        """Give the encoder's convolutions that have trained weights; BatchNorm stays trainable."""
        convolutions = {f"{name}.weight" for name, m in self.encoder.named_modules() if isinstance(m, nn.Conv2d)}
        parameters = dict(self.encoder.named_parameters())
        trained = convolutions if self.is_trained else convolutions & self.pretrained
        return [parameters[name] for name in sorted(trained)]

    def grown_parameters(self) -> list[Tensor]:
        """Give the parameters of the last growth layer."""
        return list(self.growth[-1].parameters()) if len(self.growth) else []

    def grow(self, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """See Network.grow: for fewer growth layers. At first every pixel of its output is repeated."""
        own = {key: value.clone() for key, value in self.state_dict().items()}
        if any(key not in own or own[key].shape != value.shape for key, value in weights.items()):
            return None
        new = own.keys() - weights.keys()
        # Layers are added at the end: none that is there may follow one that is not.
        layers = sorted({key.split(".")[1] for key in new if key.startswith("growth.")}, key=int)
        added = {key for key in own if key.startswith(tuple(f"growth.{layer}." for layer in layers))}
        known = [str(index) for index in range(len(self.growth))]
        if not layers or new != added or known[-len(layers) :] != layers:
            return None
        return own | weights

    def fold(self) -> None:
        """Merge weight norm and batch norm into the convolutions, the other batch norms into a scale and a shift."""
        super().fold()
        self.encoder.fold()
        self.middle_norm = Affine(self.middle_norm)
        for up in (self.up1, self.up2, self.up3, self.up4):
            up.norm = Affine(up.norm)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        picture = self.normalise(self.interpolate(lr, scale))
        half, quarter, eighth, sixteenth, deepest = self.encoder(picture)
        x = F.relu(self.middle_norm(deepest))  # (N, 512, H/32, W/32) with a ResNet-34
        for conv in self.middle:
            x = F.relu(conv(x))
        x = self.up1(x, sixteenth)
        x = self.up2(x, eighth)
        x = self.up3(x, quarter)
        x = self.up4(x, half)
        x = self.last_up(x)  # (N, 96, H, W)
        if self.last_cross is not None:
            x = self.last_cross(torch.cat((x, picture), dim=1))  # (N, 99, H, W)
        for layer in self.growth:
            x = layer(x)
        x = self.last(x)
        if self.output_range is not None:
            low, high = self.output_range
            x = low + (high - low) * torch.sigmoid(x)
        return x * self.normalise.std + self.normalise.mean


def build_perceptual_unet(
    *,
    scales: tuple[int, ...],
    weights: Path | str | None,
    backbone: str = "resnet34",
    attention: bool = False,
    blur: bool = True,
    last_cross: bool = True,
    upsampling: str = "shuffle",
    output_range: tuple[float, float] | None = None,
    growth: int = 0,
) -> PerceptualUNet:
    """Build the U-Net with its encoder pretrained, or at random where `weights` says so."""
    model = PerceptualUNet(
        scales, backbone=backbone, attention=attention, blur=blur, last_cross=last_cross, upsampling=upsampling,
        output_range=output_range, growth=growth,
    )  # fmt: skip
    model.pretrained = model.encoder.load(weights)
    return model
