"""Loss terms on tensors whose result is known by hand, and the feature networks behind them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from train import losses
from train.errors import RecipeError, WeightsError
from train.feature_nets import (
    FEATURE_NETS,
    IMAGENET_STD,
    FeatureNet,
    build_feature_net,
    find_weights,
    load_pretrained,
)
from train.losses import CombinedLoss, block_colour, charbonnier, gram_matrix, l1_normalised, luma
from train.recipe import LossConfig

DEFAULT_WEIGHTS = Path(__file__).parent.parent.parent / "shared" / "data" / "weights"
WEIGHTS = Path(os.environ.get("SR_WEIGHTS_DIR", DEFAULT_WEIGHTS))


def flat(value: float, size: int = 32) -> Tensor:
    return torch.full((1, 3, size, size), value)


def test_charbonnier_by_hand() -> None:
    sr = torch.tensor([0.0, 3e-3, 0.5])
    expected = (1e-3 + (9e-6 + 1e-6) ** 0.5 + (0.25 + 1e-6) ** 0.5) / 3
    assert charbonnier(sr, torch.zeros(3)).item() == pytest.approx(expected, rel=1e-6)


def test_l1_normalised_divides_by_the_deviation_of_each_channel() -> None:
    expected = sum(0.1 / std for std in IMAGENET_STD) / 3
    assert l1_normalised(flat(0.6), flat(0.5)).item() == pytest.approx(expected, rel=1e-5)


def test_luma_of_white_and_primaries() -> None:
    assert luma(flat(1.0, 1)).item() == pytest.approx(219 / 255)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert luma(red).item() == pytest.approx(65.481 / 255)


def test_colour_sees_the_mean_and_not_the_detail() -> None:
    detail = torch.zeros(1, 3, 32, 32)
    detail[:, :, ::2] = 0.2
    detail[:, :, 1::2] = -0.2
    assert block_colour(flat(0.5) + detail, flat(0.5)).item() == pytest.approx(0, abs=1e-7)
    assert block_colour(flat(0.5) + detail + 0.1, flat(0.5)).item() == pytest.approx(0.1, rel=1e-5)


def test_gram_matrix_by_hand() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 2)  # two channels of a 1x2 picture
    expected = torch.tensor([[[5.0, 11.0], [11.0, 25.0]]]) / 4
    assert torch.equal(gram_matrix(features), expected)


def test_perceptual_total_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(nn.Module):
        """Two activations: the picture, and twice the picture at a half of the size."""

        taps = (0, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, 2 * x[:, :, ::2, ::2]]

    monkeypatch.setattr(losses, "build_feature_net", lambda *args, **kwargs: Stub())
    config = LossConfig(
        pixel="l1", colour_weight=3.0, luma_weight=2.0, feature_net="vgg16", feature_weights=(5.0, 15.0),
        feature_weight=0.5, style_weight=100.0,
    )  # fmt: skip
    total, terms = CombinedLoss(config)(flat(0.5), flat(0.25))
    # Each entry of a gram matrix of flat features f is f^2 / 3 channels.
    gram1, gram2 = (0.5**2 - 0.25**2) / 3, (1.0**2 - 0.5**2) / 3
    expected = {
        "pixel": 0.25,
        "luma": 2 * 0.25 * 219 / 255,
        "colour": 3 * 0.25,
        "features": 0.5 * (5 * 0.25 + 15 * 0.5),
        "style": 0.5 * 100 * (5**2 * gram1 + 15**2 * gram2),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(sum(expected.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(pixel="l3"), "loss.pixel: one of l1, l1_normalised, mse, charbonnier, not 'l3'"),
        (LossConfig(pixel_weight=0.0), "every term is switched off"),
        (LossConfig(feature_net="squeezenet1_1", feature_weights=(1.0,)), "3 layers need as many weights, got 1"),
    ],
)
def test_combined_loss_refuses(config: LossConfig, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CombinedLoss(config, weights="random")


def test_feature_net_is_frozen_and_stays_in_eval_mode() -> None:
    net = build_feature_net("squeezenet1_1", layers=(), weights="random")
    net.train()
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    activations = net(torch.rand(1, 3, 64, 64, requires_grad=True))
    assert [tuple(a.shape[:2]) for a in activations] == [(1, 128), (1, 256), (1, 384)]
    assert activations[0].requires_grad


def test_a_tap_before_a_relu_keeps_its_negative_values() -> None:
    stack = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    before, after = FeatureNet(stack, (0, 1))(torch.rand(1, 3, 8, 8))
    assert before.min() < 0
    assert torch.equal(after, before.clamp(min=0))


def test_layers_before_and_behind_a_relu_belong_together() -> None:
    import torchvision

    for spec in FEATURE_NETS.values():
        stack = getattr(torchvision.models, spec.builder)(weights=None).features
        for name, index in spec.layers.items():
            kind = nn.Conv2d if name.startswith("conv") else nn.ReLU
            assert isinstance(stack[index], kind) or name.startswith("fire"), (spec.builder, name)
        assert set(spec.default_layers) <= set(spec.layers)


def test_vgg16_bn_taps_stand_before_the_pools() -> None:
    import torchvision

    for name, taps in {"vgg16_bn": (22, 32, 42), "vgg16": (15, 22, 29)}.items():
        stack = getattr(torchvision.models, name)(weights=None).features
        assert tuple(FEATURE_NETS[name].layers.values()) == taps
        assert all(isinstance(stack[tap + 1], nn.MaxPool2d) for tap in taps)


def test_feature_weights_from_a_folder_are_used(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random = build_feature_net("squeezenet1_1", layers=("fire3",), weights="random")
    state = {key: value.half() for key, value in random.stack.state_dict().items()}
    save_file({f"features.{key}": value for key, value in state.items()}, tmp_path / FEATURE_NETS["squeezenet1_1"].file)
    loaded = build_feature_net("squeezenet1_1", layers=("fire3",), weights=tmp_path)
    for key, value in loaded.stack.state_dict().items():
        assert torch.equal(value, state[key].float())


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("vgg11", (), "unknown feature network 'vgg11'"),
        ("vgg16", ("relu9",), r"vgg16 has no layers \['relu9'\]"),
        ("vgg16", (), r"no weights for vgg16 \(vgg16.safetensors\); give a folder .* --weights random"),
    ],
)
def test_build_feature_net_refuses(name: str, layers: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        build_feature_net(name, layers=layers, weights=tmp_path)


def test_without_a_folder_the_normalised_network_tells_both_ways() -> None:
    with pytest.raises(WeightsError, match=r"--weights DIR or SR_WEIGHTS_DIR, or start without: --weights random"):
        build_feature_net("vgg19_normalised", layers=(), weights=None)


def test_a_failed_download_tells_both_ways() -> None:
    def fail() -> dict[str, Tensor]:
        raise OSError("no route to host")

    with pytest.raises(WeightsError, match=r"no route to host.*--weights DIR or SR_WEIGHTS_DIR.*--weights random"):
        load_pretrained("vgg16_bn", None, files=("x",), download=fail)


def test_find_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    assert find_weights(None) is None
    assert find_weights("random") == "random"
    assert find_weights(str(tmp_path)) == tmp_path
    monkeypatch.setenv("SR_WEIGHTS_DIR", str(tmp_path))
    assert find_weights(None) == tmp_path
    monkeypatch.setenv("SR_WEIGHTS_DIR", str(tmp_path / "gone"))
    with pytest.raises(WeightsError, match=r"SR_WEIGHTS_DIR=.*gone: no such folder"):
        find_weights(None)


@pytest.mark.skipif(
    not all((WEIGHTS / FEATURE_NETS[name].file).is_file() for name in ("squeezenet1_1", "vgg19_normalised")),
    reason="no feature networks in SR_WEIGHTS_DIR",
)
def test_pretrained_feature_nets_see_blur() -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    blurred = [nn.functional.avg_pool2d(nn.functional.pad(picture, (p,) * 4), 2 * p + 1, stride=1) for p in (1, 2)]
    for name in ("squeezenet1_1", "vgg19_normalised"):
        net = build_feature_net(name, layers=(), weights=WEIGHTS)
        target = net(picture)
        near, far = (sum(float((a - b).abs().mean()) for a, b in zip(net(x), target, strict=True)) for x in blurred)
        assert 0 < near < far
