"""Critics: what they hold, what they judge, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.adversary import Adversary
from train.errors import RecipeError
from train.models.critics import CRITICS, SRGANCritic, UNetCritic, build_critic
from train.recipe import AdversarialConfig

TINY: dict[str, dict[str, Any]] = {
    "unet-critic": {"channels": 8, "blocks": 2},
    "srgan": {"channels": 4, "dense": 16},
    "features": {"features": "squeezenet1_1", "layers": ("relu1", "fire3"), "channels": 8},
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_unet_critic_has_the_parameters_of_fastais() -> None:
    with torch.device("meta"):
        critic = UNetCritic()
    dense = 2 * (128 * 128 * 9 + 128)
    halving = sum(width * width * 2 * 16 + width * 2 for width in (256, 512, 1024))
    attention = 512 * (64 + 64 + 512) + 1
    assert count(critic) == (3 * 128 * 16 + 128) + dense + halving + attention + 2048 * 16


def test_srgan_critic_has_the_layers_of_the_paper() -> None:
    critic = SRGANCritic()
    convolutions = [module for module in critic.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [conv.stride[0] for conv in convolutions] == [1, 2, 1, 2, 1, 2, 1, 2]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in critic.modules()) == 7  # not behind the first
    features = critic.features(torch.rand(1, 3, 96, 96))
    assert features.shape == (1, 512, 6, 6)
    assert torch.equal(critic.pool(features), features), "at the paper's crops the pooling changes nothing"


@pytest.mark.parametrize("name", list(CRITICS))
@pytest.mark.parametrize("size", [64, 96, 128])
def test_critics_give_logits_for_each_picture_of_any_size(name: str, size: int) -> None:
    critic = build_critic(name, TINY[name], weights="random").eval()
    with torch.no_grad():
        pictures = torch.rand(3, 3, size, size)
        logits = critic(pictures)
        assert logits.shape == (3,) or (name == "features" and logits.ndim == 2 and len(logits) == 3)
        torch.testing.assert_close(logits[1:2], critic(pictures[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(CRITICS))
def test_critics_learn_to_tell_dark_from_bright(name: str) -> None:
    torch.manual_seed(0)
    critic = build_critic(name, TINY[name], weights="random").train()
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        real, fake = 0.5 + 0.5 * torch.rand(4, 3, 48, 48), 0.5 * torch.rand(4, 3, 48, 48)
        logits = critic(torch.cat((real, fake)))
        wanted = torch.zeros_like(logits)
        wanted[:4] = 1
        loss = F.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_every_convolution_of_the_unet_critic_has_spectral_norm() -> None:
    torch.manual_seed(1)
    critic = UNetCritic(channels=8, blocks=1)
    convolutions = [module for module in critic.modules() if isinstance(module, nn.Conv2d | nn.Conv1d)]
    assert len(convolutions) == 8
    with torch.no_grad():
        for _ in range(50):  # each forward pass takes the estimate one power iteration further
            critic(torch.rand(1, 3, 32, 32))
        critic.eval()
        for conv in convolutions:
            assert torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2).item() == pytest.approx(1, abs=0.02)


def test_the_features_that_a_critic_stands_on_are_never_trained() -> None:
    critic = build_critic("features", TINY["features"], weights="random")
    adversary = Adversary(
        AdversarialConfig(critic="features", options=TINY["features"]), torch.device("cpu"), weights="random"
    )
    sr, hr = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    loss, _ = adversary.judge(sr, hr)
    loss.backward()
    trained = {name for name, parameter in adversary.critic.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith("heads.") for name in trained)
    assert any(name.startswith("features.") for name, _ in critic.named_parameters())
    wanted = sr.requires_grad_()
    adversary.persuade(wanted, torch.zeros(()), {})[0].backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0


def test_a_crop_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs 64 pixels a side, got \(32, 128\)"):
        UNetCritic(channels=8)(torch.rand(1, 3, 32, 128))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patch", {}, "unknown critic 'patch': one of unet-critic, srgan, features"),
        ("srgan", {"blocks": 3}, "critic options: srgan knows channels, dense, not blocks"),
    ],
)
def test_build_critic_refuses(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_critic(name, options)
