"""The perceptual U-Net's switches: encoders, ways to enlarge, output range, growth."""

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
from train.models import build_model
from train.models.decoder import Growth, ResizeUp, ShuffleUp, TransposeUp, blurred
from train.models.encoders import BACKBONES, RESNET34_FILE, Encoder, InceptionStem
from train.models.perceptual_unet import PerceptualUNet, build_perceptual_unet
from train.recipe import ModelConfig


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(**options: Any) -> PerceptualUNet:
    """Make the network without its values, to count what it holds."""
    with torch.device("meta"):
        return PerceptualUNet(**options)


def settle(module: nn.Module) -> None:
    """Give batch norms statistics and gains as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(norm.weight, 0.8, 1.2)


SWITCHES: list[dict[str, Any]] = [
    {"backbone": "resnet18", "blur": False},
    {"backbone": "inception", "last_cross": False},
    {"backbone": "resnet18", "upsampling": "transpose"},
    {"backbone": "resnet18", "upsampling": "resize", "output_range": (-3.0, 3.0), "attention": True},
    {"backbone": "resnet18", "growth": 1},
]


def test_defaults_and_switches_have_their_parameters() -> None:
    default = 41_229_213
    assert count(on_meta()) == default
    assert count(on_meta(attention=True)) == 41_413_534
    assert count(on_meta(blur=False)) == default and count(on_meta(output_range=(-3, 3))) == default
    # Without the last residual block (its weight norm: gain and bias for each channel), a final 1x1 from 96 channels.
    block = 2 * (99 * 99 * 9 + 99 + 99)
    assert block == 176_814
    assert count(on_meta(last_cross=False)) == default - block - 3 * 3
    growth = 99 * 396 * 9 + 396 + 396
    assert count(on_meta(growth=2, scales=(4,))) == default + 2 * growth
    # Nothing else but the encoder differs between those whose blocks are basic.
    encoders = {name: count(Encoder(name)) for name in BACKBONES}
    assert encoders["resnet34"] == 21_284_672 and encoders["resnet18"] == 11_176_512
    for name in ("resnet18", "inception"):
        assert count(on_meta(backbone=name)) == default - encoders["resnet34"] + encoders[name]


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_an_encoder_tells_the_channels_it_gives(backbone: str) -> None:
    encoder = Encoder(backbone).eval()
    with torch.no_grad():
        activations = encoder(torch.randn(1, 3, 64, 96))
    expected = (64, 256, 512, 1024, 2048) if backbone == "resnet50" else (64, 64, 128, 256, 512)
    assert encoder.channels == expected
    shapes = [(1, width, 64 // 2**i, 96 // 2**i) for i, width in enumerate(expected, start=1)]
    assert [tuple(a.shape) for a in activations] == shapes


def test_resnet50_widths_follow_the_encoder() -> None:
    model = on_meta(backbone="resnet50")
    widths = [len(block.get_parameter("conv2.bias")) for block in (model.up1, model.up2, model.up3, model.up4)]
    # Half of what comes from below and the skip: 1024 + 1024, 1024 + 512, 768 + 256, (512 + 64) / 2.
    assert widths == [2048, 1536, 1024, 288]


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_encoders_fold(backbone: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(backbone)
    settle(encoder)
    encoder.eval()
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(picture)
        encoder.fold()
        after = encoder(picture)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    for a, b in zip(after, before, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


def test_inception_stem_sees_what_its_branches_see() -> None:
    stem = InceptionStem()
    assert stem(torch.randn(2, 3, 32, 48)).shape == (2, 64, 16, 24)
    picture = torch.randn(1, 3, 33, 33, requires_grad=True)
    seen = []
    for channels in (slice(0, 16), slice(16, 32), slice(32, 48)):
        (gradient,) = torch.autograd.grad(stem(picture)[0, channels, 8, 8].sum(), picture)
        seen.append(int((gradient[0].abs().sum(0) > 0).any(0).sum()))
    assert seen == [1, 3, 5]


def test_inception_takes_the_rest_of_a_resnet34(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = {key: torch.randn_like(v) for key, v in Encoder("resnet34").state_dict().items() if v.is_floating_point()}
    save_file(state, tmp_path / RESNET34_FILE)
    encoder = Encoder("inception")
    before = encoder.get_parameter("bn1.weight").detach().clone()
    loaded = encoder.load(tmp_path)
    assert not any(name.startswith(("conv1.", "bn1.")) for name in loaded)
    assert torch.equal(encoder.get_parameter("bn1.weight"), before)
    assert torch.equal(encoder.get_parameter("layer4.0.conv1.weight"), state["layer4.0.conv1.weight"])


def test_resnet18_starts_from_the_short_file(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = {k: v.half() for k, v in Encoder("resnet18").state_dict().items() if not k.startswith("layer4")}
    save_file(state, tmp_path / RESNET18_FILE)
    model = build_perceptual_unet(scales=(2,), weights=tmp_path, backbone="resnet18")
    assert model.pretrained == state.keys()
    assert torch.equal(model.encoder.get_parameter("layer3.1.conv2.weight"), state["layer3.1.conv2.weight"].float())
    frozen = {id(parameter) for parameter in model.freezable_parameters()}
    names = {name for name, parameter in model.encoder.named_parameters() if id(parameter) in frozen}
    assert names == {key for key, value in state.items() if value.ndim == 4}


@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_switches_fold_and_run_in_onnx_runtime(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    scale = 2
    model = PerceptualUNet((scale,), **options)
    settle(model)
    model.eval()
    stride = model.stride(scale)
    assert stride == 32 * 2 ** options.get("growth", 0) // scale
    picture = torch.rand(1, 3, stride, 2 * stride)
    with torch.no_grad():
        before = model(picture, scale)
        model.fold()
        after = model(picture, scale)
        size = max(1.0, float(before.abs().max()))
        assert after.shape == (1, 3, stride * scale, 2 * stride * scale)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert (before - after).abs().max() <= 2e-5 * size
        # An untrained network reaches tens: brought into the range that is not clamped.
        last = model.last
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        last.weight.div_(size)
        last.bias.div_(size)
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        expected = model(picture, scale).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    graph = trace(model, scale=scale, ends="float32", weights=WeightsFile.write(tmp_path / "weights.bin", model))
    onnx.save(graph, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"picture": picture.permute(0, 2, 3, 1).numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [ShuffleUp, TransposeUp, ResizeUp])
@pytest.mark.parametrize("blur", [False, True])
def test_ways_to_enlarge_double_and_start_at_unit_gain(kind: Any, blur: bool) -> None:
    torch.manual_seed(4)
    up = kind(64, 32, blur=blur)
    x = torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        found = up(x)
        expected = F.relu(up.enlarge(x))
    assert found.shape == (1, 32, 32, 32)
    assert torch.equal(found, blurred(expected) if blur else expected)
    # Kaiming's gain of sqrt(2) before the ReLU; interpolation between independent values takes some of it.
    assert 0.3 < expected.square().mean() < 1.5


def test_blur_is_the_mean_of_a_pixel_and_those_above_and_left() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert torch.equal(blurred(x), torch.tensor([[1.0, 1.5], [2.0, 2.5]]).view(1, 1, 2, 2))


def test_output_range_bounds_the_normalised_values() -> None:
    torch.manual_seed(5)
    model = PerceptualUNet((1,), backbone="resnet18", output_range=(-3.0, 3.0)).eval()
    bare = PerceptualUNet((1,), backbone="resnet18").eval()
    bare.load_state_dict(model.state_dict())
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        found, raw = model.normalise(model(picture, 1)), bare.normalise(bare(picture, 1))
    torch.testing.assert_close(found, -3 + 6 * torch.sigmoid(raw), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.last.get_parameter("bias").add_(100.0)
        torch.testing.assert_close(model.normalise(model(picture, 1)), torch.full_like(picture, 3.0))


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_a_growth_layer_starts_as_repetition() -> None:
    x = torch.randn(1, 99, 4, 6)
    with torch.no_grad():
        assert torch.equal(Growth(99)(x), repeated(x))


@pytest.mark.parametrize("options", [{}, {"last_cross": False, "output_range": (-3.0, 3.0)}], ids=str)
def test_a_grown_network_repeats_the_pixels_of_the_smaller_one(options: dict[str, Any]) -> None:
    torch.manual_seed(6)
    picture = torch.rand(1, 3, 16, 16)
    small = PerceptualUNet((2,), backbone="resnet18", **options).eval()
    for growth, scale in ((1, 4), (2, 8)):
        large = PerceptualUNet((scale,), backbone="resnet18", growth=growth, **options)
        weights = large.grow({key: value.clone() for key, value in small.state_dict().items()})
        assert weights is not None
        large.load_state_dict(weights)
        large.eval()
        assert large.stride(scale) == small.stride(small.scales[0]) == 16
        with torch.no_grad():
            expected = repeated(small(picture, small.scales[0]))
            assert (large(picture, scale) - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
        new = large.growth[-1]
        assert [id(p) for p in large.grown_parameters()] == [id(p) for p in new.parameters()]
        assert small.grow(large.state_dict()) is None
        small = large
    twice = PerceptualUNet((8,), backbone="resnet18", growth=2, **options)
    plain = PerceptualUNet((2,), backbone="resnet18", **options)
    assert twice.grow(plain.state_dict()) is not None
    assert PerceptualUNet((4,), backbone="resnet34", growth=1, **options).grow(plain.state_dict()) is None


def test_only_grown_networks_have_grown_parameters() -> None:
    assert on_meta().grown_parameters() == []
    assert build_model(ModelConfig(), weights=None).grown_parameters() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet101"}, "unknown backbone 'resnet101': one of resnet18, resnet34, resnet50, inception"),
        ({"upsampling": "bicubic"}, "unknown upsampling 'bicubic': one of shuffle, transpose, resize"),
        ({"output_range": (3.0, -3.0)}, "output_range is"),
        ({"growth": -1}, "growth counts layers"),
        ({"growth": 1, "scales": (1,)}, r"scales are 2, 4, 8, not \[1\]"),
        ({"scales": (3,)}, r"scales are 1, 2, 4, not \[3\]"),
    ],
)
def test_switches_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualUNet(**options)
