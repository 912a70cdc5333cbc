"""The recipes of systems B to H: they build, their stages lie on the grid, and they say what their sources say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.losses import CombinedLoss
from train.models import build_critic, build_model
from train.recipe import load_recipe

OURS = [
    "unet-mse", "unet-gan", "srgan-mse", "srgan", "resnet18-residual", "unet-transpose", "autoencoder",
    "autoencoder-hfen", "autoencoder-ssim", "vae", "fast-x4",
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_builds_and_its_stages_lie_on_the_grid(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):  # of the right shape is enough
        model = build_model(recipe.model, weights="random")
        CombinedLoss(recipe.loss, weights="random")
        if recipe.adversarial.critic:
            build_critic(recipe.adversarial.critic, recipe.adversarial.options)
    for stage in recipe.stages:
        for scale in recipe.model.scales:
            assert stage.size % (model.stride(scale) * scale) == 0


def test_unet_mse_is_the_perceptual_unet_with_another_loss() -> None:
    mse, perceptual = load_recipe("unet-mse"), load_recipe("perceptual-unet")
    same: list[Any] = [(r.model, r.degrade, r.optimizer, r.stages) for r in (mse, perceptual)]
    assert same[0] == same[1]
    assert (mse.loss.pixel, mse.loss.feature_net) == ("mse", "")


def test_fast_x4_is_fast_for_another_scale() -> None:
    fast, x4 = load_recipe("fast"), load_recipe("fast-x4")
    same: list[Any] = [(r.model.options, r.loss, r.optimizer, r.stages, r.samples_per_epoch) for r in (fast, x4)]
    assert same[0] == same[1]
    assert (fast.model.scales, x4.model.scales) == ((2,), (4,))


def test_unet_gan_has_the_lessons_three_phases() -> None:
    recipe = load_recipe("unet-gan")
    assert [phase.kind for phase in recipe.stages[0].phases] == ["generator", "generator", "critic", "adversarial"]
    assert recipe.model.options == {"attention": True, "output_range": [-3.0, 3.0]}
    adversarial = recipe.adversarial
    assert (adversarial.weight, adversarial.content_weight, adversarial.threshold) == (1.0, 50.0, 0.65)
    assert (adversarial.rate, adversarial.beta1, recipe.optimizer.beta2) == (5.0, 0.0, 0.99)


def test_srgan_goes_on_from_its_pre_training() -> None:
    before, recipe = load_recipe("srgan-mse"), load_recipe("srgan")
    assert before.model == recipe.model and before.loss.pixel == "mse"
    assert (recipe.loss.feature_net, recipe.loss.feature_distance) == ("vgg19", "mse")
    assert recipe.adversarial.weight == 1e-3 and recipe.model.scales == (4,)


def test_resnet18_residual_has_the_authors_loss() -> None:
    recipe = load_recipe("resnet18-residual")
    assert (recipe.loss.pixel, recipe.loss.pixel_weight) == ("l1", 0.01)
    assert (recipe.loss.feature_net, recipe.loss.feature_layers) == ("resnet18", ("relu", "layer2"))
    assert (recipe.stages[0].size, recipe.stages[0].batch) == (96, 52)
    assert recipe.stages[0].phases[0].learning_rate == 1e-3
    plain = load_recipe("resnet18-residual", overrides=("loss.feature_net=", "loss.pixel_weight=1.0"))
    assert plain.loss.feature_net == ""


def test_auto_encoders_differ_by_their_loss() -> None:
    losses = {name: load_recipe(name).loss for name in OURS if name.startswith("autoencoder")}
    terms = {name: (loss.pixel, loss.hfen_weight) for name, loss in losses.items()}
    assert terms == {"autoencoder": ("mse", 0.0), "autoencoder-hfen": ("mse", 10.0), "autoencoder-ssim": ("ssim", 0.0)}
