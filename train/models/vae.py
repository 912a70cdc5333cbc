"""A convolutional variational auto-encoder with skips, whose samples are plausible results (SEEDS G)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast_unet import ResidualBlock, Up
from .icnr import zero_bias_
from .interpolated import InterpolatedNetwork

LOG_VARIANCE_LIMIT = 10.0  # exp() of it is still far from what bfloat16 or a step of training cannot bear


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over all elements.

    Source: Kingma and Welling, arXiv 1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()


class VariationalAutoEncoder(InterpolatedNetwork):
    """Encode the interpolated picture to maps of means and log-variances at an eighth, decode with additive skips.

    In train mode the decoder gets a sample, in eval mode (and in the exported graph) the mean.
    channels: of the first level; the two below have twice and four times as many. latent: of the maps.
    beta: weight of the KL divergence for each value of the output, so that crops of any size weigh alike. Next to a
    mean squared error it is twice the variance that the output is taken to have: 1e-3 is a deviation of 0.02.
    The encoder sees the input alone, never the photograph, so samples spread by what noise in the maps leaves: about
    1.5 code values after 1,265 steps of a half-width network at beta 1e-3, and 0.1 at 1e-6 (bilinear x2).
    Input: (N, 3, h, w) float RGB in [0, 1], h*scale and w*scale multiples of 8.
    Output: (N, 3, h*scale, w*scale) float RGB, not clamped.
    Source: SEEDS, system G; Kingma and Welling, arXiv 1312.6114; beta: Higgins et al., ICLR 2017.
    """

    def __init__(self, scales: tuple[int, ...] = (2,), *, channels: int = 32, latent: int = 32, beta: float = 1e-3):
        super().__init__(scales, grid=8)
        c = channels
        self.beta = beta
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.encoder1 = ResidualBlock(c)
        self.down1 = nn.Conv2d(c, c * 2, 2, stride=2)
        self.encoder2 = ResidualBlock(c * 2)
        self.down2 = nn.Conv2d(c * 2, c * 4, 2, stride=2)
        self.encoder3 = ResidualBlock(c * 4)
        self.down3 = nn.Conv2d(c * 4, c * 8, 2, stride=2)
        self.mean = nn.Conv2d(c * 8, latent, 1)
        self.log_variance: nn.Module = nn.Conv2d(c * 8, latent, 1)
        self.unpack = nn.Conv2d(latent, c * 8, 1)
        self.up3 = Up(c * 8)
        self.decoder3 = ResidualBlock(c * 4)
        self.up2 = Up(c * 4)
        self.decoder2 = ResidualBlock(c * 2)
        self.up1 = Up(c * 2)
        self.decoder1 = ResidualBlock(c)
        self.tail = nn.Conv2d(c, 3, 3, padding=1)
        self._terms: dict[str, Tensor] = {}
        for conv in (self.head, self.down1, self.down2, self.down3, self.mean, self.unpack):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            zero_bias_(conv)
        for conv in (self.log_variance, self.tail):  # from the prior's variance, and from plain interpolation
            assert isinstance(conv, nn.Conv2d)
            nn.init.zeros_(conv.weight)
            zero_bias_(conv)

    def encode(self, picture: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(N, 3, H, W) -> what the maps are made of (N, 8c, H/8, W/8), and the skips at 1, 1/2 and 1/4."""
        level1 = self.encoder1(self.head(picture))
        level2 = self.encoder2(F.relu(self.down1(level1)))
        level3 = self.encoder3(F.relu(self.down2(level2)))
        return F.relu(self.down3(level3)), (level1, level2, level3)

    def decode(self, picture: Tensor, latent: Tensor, skips: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Add to the picture what the latent map (N, latent, H/8, W/8) and the skips tell."""
        level1, level2, level3 = skips
        x = self.decoder3(self.up3(F.relu(self.unpack(latent))) + level3)
        x = self.decoder2(self.up2(x) + level2)
        x = self.decoder1(self.up1(x) + level1)
        return picture + self.tail(x)

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        picture = self.interpolate(lr, scale)
        deep, skips = self.encode(picture)
        if not self.training:
            return self.decode(picture, self.mean(deep), skips)
        mean, log_variance = self._distribution(deep)
        self._terms = {"kl": self.beta * kl_divergence(mean, log_variance) / picture.numel()}
        return self.decode(picture, mean + torch.randn_like(mean) * (log_variance / 2).exp(), skips)

    @torch.no_grad()
    def sample(self, lr: Tensor, scale: int, generator: torch.Generator) -> Tensor:
        """Enlarge with one draw of the latent map: (N, 3, h, w) to one plausible (N, 3, h*scale, w*scale).

        generator: on the network's device.
        """
        picture = self.interpolate(lr, scale)
        deep, skips = self.encode(picture)
        mean, log_variance = self._distribution(deep)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.decode(picture, mean + noise * (log_variance / 2).exp(), skips)

    def _distribution(self, deep: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and log-variance in float32, whatever autocast computes in."""
        log_variance = self.log_variance(deep).float()
        return self.mean(deep).float(), log_variance.clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)

    def extra_terms(self) -> dict[str, Tensor]:
        """Give the weighted KL divergence of the last forward pass in train mode."""
        return self._terms

    def fold(self) -> None:
        """Drop the log-variances, which the exported graph has no use for."""
        super().fold()
        self.log_variance = nn.Identity()


def build_vae(
    *, scales: tuple[int, ...], weights: object, channels: int = 32, latent: int = 32, beta: float = 1e-3
) -> VariationalAutoEncoder:
    """Build the auto-encoder; it starts from no pretrained weights."""
    return VariationalAutoEncoder(scales, channels=channels, latent=latent, beta=beta)
