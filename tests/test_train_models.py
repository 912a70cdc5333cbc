"""Networks: exact sizes, exact starts, folding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from given import WEIGHTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.errors import RecipeError, WeightsError
from train.models import BUILDERS, Network, build_model
from train.models.decoder import ShuffleUp
from train.models.encoders import RESNET34_FILE
from train.models.fast_unet import FastUNet, Up
from train.models.interpolated import enlarge
from train.models.perceptual_unet import RESNET18_FILE, PerceptualUNet, build_perceptual_unet
from train.recipe import ModelConfig


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def phase_difference(shuffled: Tensor, factor: int) -> float:
    """Give the largest difference between sub-pixels of one block; (N, C, H, W)."""
    n, c, h, w = shuffled.shape
    blocks = shuffled.view(n, c, h // factor, factor, w // factor, factor)
    return float((blocks - blocks[:, :, :, :1, :, :1]).abs().max())


@pytest.fixture(scope="module")
def unet() -> Iterator[PerceptualUNet]:
    torch.manual_seed(0)
    yield PerceptualUNet().eval()


def test_perceptual_unet_has_the_parameters_of_each_block(unet: PerceptualUNet) -> None:
    assert count(unet) == 41_229_213
    assert {
        "encoder": count(unet.encoder),
        "middle": count(unet.middle_norm) + count(unet.middle),
        "up1": count(unet.up1),
        "up2": count(unet.up2),
        "up3": count(unet.up3),
        "up4": count(unet.up4),
        "last_up": count(unet.last_up),
        "last_cross": count(unet.last_cross),
        "last": count(unet.last),
    } == {
        "encoder": 21_284_672,
        "middle": 9_441_280,
        "up1": 5_247_488,
        "up2": 3_182_336,
        "up3": 1_477_248,
        "up4": 381_440,
        "last_up": 37_632,
        "last_cross": 176_814,
        "last": 303,
    }


def test_perceptual_unet_with_attention_has_its_parameters() -> None:
    assert count(PerceptualUNet(attention=True)) == 41_413_534


@pytest.mark.parametrize(("channels", "blocks", "parameters"), [(32, (2, 2, 2), 1_059_600), (48, (2, 2, 4), 3_697_536)])
def test_fast_unet_has_its_parameters(channels: int, blocks: tuple[int, int, int], parameters: int) -> None:
    assert count(FastUNet(2, channels=channels, blocks=blocks)) == parameters


def test_sub_pixels_start_equal_after_weight_norm(unet: PerceptualUNet) -> None:
    torch.manual_seed(1)
    shuffles = [module for module in unet.modules() if isinstance(module, ShuffleUp)]
    assert len(shuffles) == 5
    with torch.no_grad():
        for up in shuffles:
            conv = up.get_submodule("conv")
            assert isinstance(conv, nn.Conv2d)
            shuffled = up.shuffle(conv(torch.randn(1, conv.in_channels, 4, 4)))
            assert shuffled.abs().max() > 0.1
            assert phase_difference(shuffled, 2) == 0


def test_fast_sub_pixels_start_equal() -> None:
    ups = [module for module in FastUNet().modules() if isinstance(module, Up)]
    assert len(ups) == 2
    with torch.no_grad():
        for up in ups:
            shuffled = up(torch.randn(1, up.conv.in_channels, 4, 4))
            assert shuffled.abs().max() > 0.1
            assert phase_difference(shuffled, 2) == 0


@pytest.mark.parametrize("attention", [False, True])
def test_fold_keeps_the_output(attention: bool) -> None:
    torch.manual_seed(2)
    model = PerceptualUNet(attention=attention)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics and gains that are not 0 and 1
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
    model.eval()
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(picture, 2)
        model.fold()
        after = model(picture, 2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any("parametrizations" in key for key in model.state_dict())
    # Sums in another order; relative to outputs that reach tens in an untrained network.
    assert (before - after).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(("scale", "cell"), [(1, 4), (2, 4), (4, 4), (1, 2), (2, 2)])
def test_fast_unet_starts_as_interpolation(scale: int, cell: int) -> None:
    model = FastUNet(scale, channels=8, cell=cell)
    stride = model.stride(scale)
    assert stride * scale == 4 * cell
    picture = torch.rand(1, 3, stride * 2, stride * 3)
    expected = picture
    if scale > 1:
        expected = F.interpolate(picture, scale_factor=float(scale), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.equal(model(picture, scale), expected)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_fast_head_is_pixel_unshuffle_and_a_3x3_convolution(scale: int) -> None:
    factor = 4 // scale
    head = FastUNet(scale, channels=8).head
    # (8, 3, 3r, 3r) -> (8, 3 r r, 3, 3): tap (3, 3) of phase (r, r), the channel order of PixelUnshuffle
    weight = head.weight.view(8, 3, 3, factor, 3, factor).permute(0, 1, 3, 5, 2, 4).reshape(8, -1, 3, 3)
    picture = torch.rand(1, 3, 32, 48)
    expected = F.conv2d(F.pixel_unshuffle(picture, factor), weight, head.bias, padding=1)
    torch.testing.assert_close(head(picture), expected, rtol=0, atol=1e-5)  # sums in another order


def test_a_cell_of_fast_unet_holds_whole_input_pixels() -> None:
    for scale, cell in ((4, 2), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"a cell is a multiple of the scale, {scale}, not {cell}"):
            FastUNet(scale, cell=cell)


def test_fast_unet_does_not_grow_from_another_trunk() -> None:
    assert FastUNet(2, channels=8, cell=2).grow(FastUNet(2, channels=8).state_dict()) is None
    assert FastUNet(2, channels=8).grow(FastUNet(2, channels=8, cell=2).state_dict()) is None
    assert FastUNet(4, channels=8, cell=12).grow(FastUNet(1, channels=8, cell=2).state_dict()) is None


def test_fast_unet_takes_its_trunk_to_another_scale() -> None:
    """The detail that x2 adds, in pixels of twice the size; and back by means."""
    torch.manual_seed(1)
    small, large = FastUNet(2, channels=8, cell=2), FastUNet(4, channels=8)
    for end in (small.tail.weight, small.tail.bias):
        assert end is not None
        nn.init.normal_(end, std=0.1)
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        grown = large.grow(small.to(memory_format=torch.channels_last).state_dict())
        assert grown is not None
        large.load_state_dict(grown)
        details = [model(picture, scale) - enlarge(picture, scale) for model, scale in ((small, 2), (large, 4))]
        assert details[0].abs().max() > 0.1
        expected = details[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(details[1], expected, rtol=0, atol=1e-5)  # sums in another order
    back = small.grow(grown)
    assert back is not None
    torch.testing.assert_close(back, dict(small.state_dict()), rtol=0, atol=1e-7)


def test_fast_unet_refuses_another_scale() -> None:
    with pytest.raises(ValueError, match="enlarges by 2, not 4"):
        FastUNet(2)(torch.rand(1, 3, 16, 16), 4)


def test_muon_takes_every_convolution_but_the_ends() -> None:
    model = FastUNet(2)
    taken = {id(weight) for weight in model.hidden_weights()}
    left = {name for name, parameter in model.named_parameters() if id(parameter) not in taken and parameter.ndim > 1}
    assert left == {"head.weight", "tail.weight"}


def test_networks_share_one_base() -> None:
    for name in BUILDERS:
        model = build_model(ModelConfig(name=name), weights="random")
        assert isinstance(model, Network)
        learned = {id(p) for group in model.layer_groups() for p in group.parameters()}
        assert learned == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="fsat"), "unknown model 'fsat': one of fast, perceptual-unet"),
        (ModelConfig(options={"width": 3}), "model options: fast knows blocks, cell, channels, not width"),
        (ModelConfig(scales=(1, 2)), "one scale for each network"),
        (ModelConfig(scales=(3,)), "enlarges by 1, 2 or 4, not 3"),
        (ModelConfig(options={"channels": "many"}), "model.options.channels: expected int, got 'many'"),
    ],
)
def test_build_model_refuses(config: ModelConfig, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_model(config, weights=None)


def test_random_weights_leave_nothing_to_freeze(unet: PerceptualUNet) -> None:
    assert unet.freezable_parameters() == []


def resnet18_state(path: Path) -> dict[str, Tensor]:
    """Write a random ResNet-18's stem to layer3 as fp16, as the weights folder holds it."""
    import torchvision

    torch.manual_seed(3)
    network = torchvision.models.resnet18(weights=None)
    state = {key: v.half() for key, v in network.state_dict().items() if not key.startswith(("layer4", "fc"))}
    save_file(state, path / RESNET18_FILE)
    return {key: value.float() for key, value in state.items()}


def stem_to_layer3(network: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(network.get_submodule("bn1")(network.get_submodule("conv1")(x)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for name in ("layer1", "layer2", "layer3"):
        x = network.get_submodule(name)(x)
    return x


def assert_computes_what_resnet18_computes(model: PerceptualUNet, state: dict[str, Tensor]) -> None:
    import torchvision

    small = torchvision.models.resnet18(weights=None)
    small.load_state_dict(state, strict=False)
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = stem_to_layer3(small.eval(), picture)
        found = stem_to_layer3(model.encoder.eval(), picture)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_resnet34_starts_as_a_resnet18(tmp_path: Path) -> None:
    state = resnet18_state(tmp_path)
    model = build_perceptual_unet(scales=(2,), weights=tmp_path)
    assert_computes_what_resnet18_computes(model, state)
    frozen = {id(parameter) for parameter in model.freezable_parameters()}
    names = {name for name, parameter in model.encoder.named_parameters() if id(parameter) in frozen}
    # Every pretrained convolution; no inserted block, no layer4, no batch norm.
    assert names == {key for key, value in state.items() if value.ndim == 4}
    assert "layer1.1.conv2.weight" in names and "layer1.2.conv1.weight" not in names


@pytest.mark.skipif(not (WEIGHTS / RESNET18_FILE).is_file(), reason=f"no {RESNET18_FILE} in SR_WEIGHTS_DIR")
def test_resnet34_starts_as_the_pretrained_resnet18() -> None:
    state = {key: value.float() for key, value in load_file(WEIGHTS / RESNET18_FILE).items()}
    assert_computes_what_resnet18_computes(build_perceptual_unet(scales=(2,), weights=WEIGHTS), state)


def test_a_folder_without_encoder_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"--weights DIR or SR_WEIGHTS_DIR, or start without: --weights random"):
        build_perceptual_unet(scales=(2,), weights=tmp_path)


def test_encoder_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = resnet18_state(tmp_path)
    state["layer2.0.conv1.weight"] = torch.zeros(1, 1, 3, 3)
    save_file(state, tmp_path / RESNET18_FILE)
    with pytest.raises(WeightsError, match=r"layer2.0.conv1.weight is \(1, 1, 3, 3\), expected \(128, 64, 3, 3\)"):
        build_perceptual_unet(scales=(2,), weights=tmp_path)
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / RESNET18_FILE)
    with pytest.raises(WeightsError, match=r"resnet18 lack bn1.weight"):
        build_perceptual_unet(scales=(2,), weights=tmp_path)
    (tmp_path / RESNET34_FILE).write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        build_perceptual_unet(scales=(2,), weights=tmp_path)


def test_a_grown_network_computes_what_the_smaller_one_did() -> None:
    torch.manual_seed(0)
    small, large = FastUNet(2, channels=8, blocks=(1, 1, 2)), FastUNet(2, channels=12, blocks=(2, 1, 3))
    with torch.no_grad():
        for parameter in small.parameters():  # trained, so to say: the tail, which begins at zero, above all
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {key: value.clone() for key, value in small.state_dict().items()}
    grown = large.grow(weights)
    assert grown is not None
    large.load_state_dict(grown)
    picture = torch.rand(1, 3, 16, 24)
    expected = small(picture, 2)
    assert (expected - FastUNet(2, channels=8)(picture, 2)).abs().max() > 0.01
    torch.testing.assert_close(large(picture, 2), expected, atol=1e-5, rtol=1e-5)
    large(picture, 2).square().mean().backward()
    tail = large.tail.weight.grad
    assert tail is not None and tail[:, 8:].abs().min() > 0, "the new channels learn"
    assert small.grow({key: value.clone() for key, value in large.state_dict().items()}) is None
    assert large.grow({"something": torch.zeros(1)}) is None


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_network_starts_from_one_of_another_scale(scale: int) -> None:
    """On pictures of blocks both see the same, so that their details are the same."""
    torch.manual_seed(0)
    source, target = FastUNet(2, channels=8, blocks=(1, 1, 1)), FastUNet(scale, channels=8, blocks=(1, 1, 1))
    nn.init.normal_(source.tail.weight, std=0.05)
    grown = target.grow({key: value.clone() for key, value in source.state_dict().items()})
    assert grown is not None
    target.load_state_dict(grown)
    blocks = torch.rand(1, 3, 16, 24)

    def detail(network: FastUNet, scale: int) -> Tensor:
        lr = blocks.repeat_interleave(4 // scale, 2).repeat_interleave(4 // scale, 3)
        skip = F.interpolate(lr, scale_factor=float(scale), mode="bilinear") if scale > 1 else lr
        return network(lr, scale) - skip

    torch.testing.assert_close(detail(target, scale), detail(source, 2), atol=1e-5, rtol=1e-4)
