"""The networks of the other systems: sizes, grids, starts, folding and what ONNX Runtime computes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from export.to_onnx import WeightsFile, trace
from train.feature_nets import RESNET18_FILE
from train.models import Network, build_model
from train.models.autoencoder import AutoEncoder
from train.models.encoders import Encoder
from train.models.resnet_residual import ResNetResidual
from train.models.srgan import ShuffleUp, SRGANGenerator
from train.models.unet_transpose import TransposeUNet
from train.models.vae import VariationalAutoEncoder, kl_divergence
from train.recipe import ModelConfig

TINY: dict[str, dict[str, Any]] = {
    "unet-transpose": {"channels": 4},
    "srgan": {"channels": 8, "blocks": 2},
    "resnet18-residual": {},
    "autoencoder": {"channels": 4},
    "vae": {"channels": 4, "latent": 3},
}
CASES = [(name, scale) for name in TINY for scale in (1, 2, 4) if (name, scale) != ("srgan", 1)]
GRID = {"unet-transpose": 8, "resnet18-residual": 2, "autoencoder": 4, "vae": 8}  # in output pixels


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def make(name: str, scale: int, seed: int = 0) -> Network:
    """Make a tiny network as after training: no layer that starts at zero still is, statistics have moved."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(name=name, scales=(scale,), options=TINY[name]), weights="random")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def interpolated(lr: Tensor, scale: int) -> Tensor:
    return F.interpolate(lr, scale_factor=float(scale), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (SRGANGenerator(4), 1_547_350),  # as MMEditing and others count SRResNet
        (SRGANGenerator(2), 1_547_350 - (64 * 256 * 9 + 256 + 1)),
        (ResNetResidual(), 538_243),
        (AutoEncoder(), 1_110_403),
        (TransposeUNet(), 7_697_475),
    ],
)
def test_trainable_parameters(model: Network, parameters: int) -> None:
    assert count(model) == parameters


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_output_is_the_input_times_the_scale_on_the_grid(name: str, scale: int) -> None:
    model = make(name, scale)
    stride = model.stride(scale)
    assert stride == max(1, GRID.get(name, 1) // scale)
    height, width = 3 * stride, 5 * stride
    with torch.no_grad():
        assert model(torch.rand(2, 3, height, width), scale).shape == (2, 3, height * scale, width * scale)


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name, scale in CASES if scale != 1])
def test_the_grid_is_the_grid(name: str, scale: int) -> None:
    """A shift by the stride shifts the result, far from the borders."""
    model = make(name, scale)
    stride = model.stride(scale)
    side = -(-96 // scale // stride) * stride
    picture = torch.rand(1, 3, side, side + stride)
    with torch.no_grad():
        left, right = model(picture[..., :side], scale), model(picture[..., stride:], scale)
    margin, shift = side * scale // 2 - 4, stride * scale
    inner = np.s_[..., margin:-margin, margin : -margin - shift]
    there = np.s_[..., margin:-margin, margin + shift : -margin]
    torch.testing.assert_close(right[inner], left[there], rtol=0, atol=1e-4)  # other kernels for another width


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_fold_keeps_the_output_and_leaves_no_norm(name: str, scale: int) -> None:
    model = make(name, scale)
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        before = model(picture, scale)
        model.fold()
        after = model(picture, scale)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (before - after).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))  # sums in another order


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name, scale in CASES if scale in (1, 2)])
def test_onnx_runtime_computes_the_same(name: str, scale: int, tmp_path: Path) -> None:
    model = make(name, scale)
    model.fold()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())  # as the weights file holds them
    graph = trace(model, scale=scale, ends="float32", weights=WeightsFile.write(tmp_path / "weights.bin", model))
    onnx.save(graph, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    stride = model.stride(scale)
    for height, width in ((3 * stride, 5 * stride), (16, 24)):  # neither is the size of the tracing
        picture = torch.rand(2, 3, height, width)
        with torch.no_grad():
            expected = model(picture, scale).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        (found,) = session.run(None, {"picture": picture.permute(0, 2, 3, 1).numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["unet-transpose", "resnet18-residual", "vae"])
def test_training_starts_from_interpolation(name: str) -> None:
    model = build_model(ModelConfig(name=name, scales=(2,), options=TINY[name]), weights="random").eval()
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(model(picture, 2), interpolated(picture, 2))


def test_srgan_sub_pixels_start_equal() -> None:
    ups = [module for module in SRGANGenerator(4, blocks=1).modules() if isinstance(module, ShuffleUp)]
    assert len(ups) == 2
    for up in ups:
        with torch.no_grad():
            x = up(torch.randn(1, 64, 4, 4))
        blocks = x.view(1, 64, 4, 2, 4, 2)
        assert x.abs().max() > 0.1
        assert (blocks - blocks[:, :, :, :1, :, :1]).abs().max() == 0


@pytest.mark.parametrize(("scale", "message"), [(1, "enlarges by 2 or 4, not 1"), (3, "enlarges by 2 or 4, not 3")])
def test_srgan_refuses_other_scales(scale: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SRGANGenerator(scale)


@pytest.mark.parametrize("name", list(GRID))
def test_interpolated_networks_refuse_other_scales(name: str) -> None:
    with pytest.raises(ValueError, match="enlarges by 2, not 3"):
        make(name, 2)(torch.rand(1, 3, 16, 16), 3)


def test_one_interpolated_network_serves_every_scale() -> None:
    model = AutoEncoder((1, 2, 4), channels=4).eval()
    picture = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(picture, 4), model(interpolated(picture, 4), 1))


def test_the_frozen_stem_never_moves() -> None:
    torch.manual_seed(0)
    model = ResNetResidual()
    stem = {key: value.clone() for key, value in model.stem.state_dict().items()}
    last = model.last.weight.detach().clone()
    model.train()
    model.requires_grad_(True)  # whoever trains it may not know
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # at the first step only the last convolution, which starts at zero, has a gradient
        optimizer.zero_grad()
        F.l1_loss(model(torch.rand(2, 3, 8, 8), 2), torch.rand(2, 3, 16, 16)).backward()
        optimizer.step()
    assert all(torch.equal(value, stem[key]) for key, value in model.stem.state_dict().items())
    assert not model.stem.training and model.block1.training
    assert not torch.equal(model.last.weight, last)
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("stem.")}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_the_stem_is_that_of_the_short_resnet18_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = {key: value.half() for key, value in Encoder("resnet18").state_dict().items()}
    save_file({key: v for key, v in state.items() if not key.startswith("layer4")}, tmp_path / RESNET18_FILE)
    model = build_model(ModelConfig(name="resnet18-residual"), weights=tmp_path)
    stem = {key: value for key, value in model.get_submodule("stem").state_dict().items() if value.ndim}
    assert len(stem) == 5 and all(torch.equal(value, state[key].float()) for key, value in stem.items())


def test_kl_divergence_by_hand() -> None:
    mean, variance = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 0.25])
    # (m^2 + v - 1 - ln v) / 2: 0.5, (3 - 1.386294) / 2, (4 - 0.75 + 1.386294) / 2
    assert kl_divergence(mean, variance.log()).item() == pytest.approx(0.5 + 0.806853 + 2.318147, rel=1e-5)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_divergence(mean, variance.log()), expected)


def test_vae_weighs_its_divergence_for_each_output_value() -> None:
    torch.manual_seed(0)
    model = VariationalAutoEncoder(channels=4, latent=3, beta=0.25)
    assert model.extra_terms() == {}
    small = torch.rand(1, 3, 8, 8)
    model.train()
    model(small.repeat(2, 1, 1, 1), 2)
    terms = model.extra_terms()
    deep, _ = model.encode(interpolated(small, 2))
    # The variances start at 1: half of the squared means is left.
    expected = 0.25 * 0.5 * model.mean(deep).square().sum() / (3 * 16 * 16)
    assert set(terms) == {"kl"}
    torch.testing.assert_close(terms["kl"], expected)
    terms["kl"].backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().max() > 0


def test_vae_samples_in_training_and_gives_its_mean_otherwise() -> None:
    model = make("vae", 2)
    picture = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(picture, 2), model(picture, 2))
        model.train()
        assert not torch.equal(model(picture, 2), model(picture, 2))


def test_vae_samples_differ_by_the_generator_around_the_mean() -> None:
    model = make("vae", 2)
    assert isinstance(model, VariationalAutoEncoder)
    picture = torch.rand(1, 3, 8, 8)

    def draw(seed: int) -> Tensor:
        return model.sample(picture, 2, torch.Generator().manual_seed(seed))

    assert draw(1).shape == (1, 3, 16, 16)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert isinstance(model.log_variance, nn.Conv2d) and model.log_variance.bias is not None
    nn.init.constant_(model.log_variance.bias, -50.0)  # clamped: a deviation of e^-5 still
    with torch.no_grad():
        torch.testing.assert_close(draw(1), model(picture, 2), rtol=0, atol=0.02)
