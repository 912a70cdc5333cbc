"""Loss terms on tensors whose result is known by hand, and the feature networks behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from given import WEIGHTS
from safetensors.torch import save_file
from torch import Tensor, nn

from train import losses
from train.errors import RecipeError, WeightsError
from train.feature_nets import (
    FEATURE_NETS,
    IMAGENET_STD,
    FeatureNet,
    build_feature_net,
    feature_stack,
    find_weights,
    load_pretrained,
)
from train.losses import (
    PIXEL_LOSSES,
    CombinedLoss,
    block_colour,
    charbonnier,
    gram_matrix,
    grid,
    hfen,
    l1_normalised,
    laplacian_of_gaussian,
    luma,
    negative_psnr,
    ssim_loss,
    unit_distance,
)
from train.recipe import LossConfig


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


def test_psnr_loss_by_hand() -> None:
    # 20 dB and 40 dB: the mean is of decibels, picture by picture.
    sr = torch.cat((flat(0.6), flat(0.51)))
    assert negative_psnr(sr, torch.cat((flat(0.5), flat(0.5)))).item() == pytest.approx(1 - 0.30, abs=1e-5)
    assert negative_psnr(flat(0.5), flat(0.5)).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_psnr_loss_is_tame() -> None:
    sr = (flat(0.5) + 0.0316 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()
    (gradient,) = torch.autograd.grad(negative_psnr(sr, flat(0.5)), sr)
    relative_to_l1 = float(gradient.norm() * sr.numel() ** 0.5)
    assert relative_to_l1 == pytest.approx(2.75, rel=0.05)  # 0.2 / ln 10 / sqrt(MSE), at 30 dB
    same = flat(0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(negative_psnr(same, flat(0.5)), same)
    assert torch.isfinite(gradient).all()


def test_ssim_loss_of_flat_pictures_by_hand() -> None:
    # Without variance only the first factor is left.
    expected = (2 * 0.6 * 0.5 + 1e-4) / (0.36 + 0.25 + 1e-4)
    # Variances are differences of squares in float32, next to a constant of 9e-4.
    assert ssim_loss(flat(0.6), flat(0.5)).item() == pytest.approx(1 - expected, abs=1e-4)
    assert ssim_loss(flat(0.5), flat(0.5)).item() == pytest.approx(0, abs=1e-6)


def test_ssim_loss_agrees_with_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    hr = torch.rand(1, 3, 24, 28, generator=torch.Generator().manual_seed(2))
    sr = (hr + 0.1 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    planes = []
    for a, b in zip(sr[0].double().numpy(), hr[0].double().numpy(), strict=True):
        _, image = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True, win_size=11
        )
        planes.append(image[5:-5, 5:-5].mean())
    assert ssim_loss(sr, hr).item() == pytest.approx(1 - sum(planes) / 3, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim_loss(sr, hr).item() == pytest.approx(1 - sum(planes) / 3, abs=1e-5)


def test_hfen_by_hand() -> None:
    kernel = laplacian_of_gaussian()
    assert kernel.sum().item() == pytest.approx(0, abs=1e-5)
    # Of the continuous filter at its centre: -2 / sigma^2 / (2 pi sigma^2), over the largest gain 2 / (e sigma^2).
    assert kernel[7, 7].item() == pytest.approx(-2.718282 / (2 * 3.141593 * 2.25), rel=1e-2)
    gains = torch.fft.fft2(kernel.double(), s=(64, 64)).abs()
    assert gains.max().item() == pytest.approx(1, abs=0.02)
    # One pixel that differs by 0.5 is seen by each of the 18x18 positions inside that cover it: here by all 15x15.
    impulse = flat(0.5)
    impulse[:, 1, 16, 16] = 1.0
    expected = 0.25 * kernel.square().sum().item() / (3 * 18 * 18)
    assert hfen(impulse, flat(0.5)).item() == pytest.approx(expected, rel=1e-4)
    assert hfen(flat(0.9), flat(0.5)).item() == pytest.approx(0, abs=1e-9), "brightness is not an edge"


@pytest.mark.parametrize("name", list(PIXEL_LOSSES))
def test_pixel_losses_are_smallest_for_the_photograph_and_take_luma(name: str) -> None:
    hr = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    sr = hr + 0.05 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(5))
    loss = PIXEL_LOSSES[name]
    values = [float(loss(hr + share * (sr - hr), hr)) for share in (0.0, 0.5, 1.0)]
    assert -1e-6 < values[0] < values[1] < values[2]
    if name != "l1_normalised":  # which is for RGB
        assert loss(luma(sr), luma(hr)) > loss(luma(hr), luma(hr))


def test_hfen_and_squared_feature_distances_are_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(nn.Module):
        taps = (0,)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [2 * x]

    monkeypatch.setattr(losses, "build_feature_net", lambda *args, **kwargs: Stub())
    config = LossConfig(
        pixel_weight=0.0, hfen_weight=10.0, feature_net="vgg16", feature_weights=(3.0,), feature_distance="mse",
        style_weight=0.0,
    )  # fmt: skip
    sr = flat(0.5)
    sr[:, :, 16, 16] += 0.2
    total, terms = CombinedLoss(config)(sr, flat(0.5))
    expected = {"hfen": 10 * hfen(sr, flat(0.5)).item(), "features": 3 * 4 * 0.04 / 32**2}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(sum(expected.values()), rel=1e-5)
    alone = CombinedLoss(LossConfig(pixel_weight=0.0, hfen_weight=1.0))
    assert set(alone(sr, flat(0.5))[1]) == {"hfen"}


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
        (LossConfig(pixel="l3"), "loss.pixel: one of l1, l1_normalised, mse, charbonnier, psnr, ssim, not 'l3'"),
        (LossConfig(feature_distance="l3"), "loss.feature_distance: one of l1, mse, unit, not 'l3'"),
        (LossConfig(pixel_weight=0.0), "every term is switched off"),
        (LossConfig(pixel_weight=0.0, feature_net="alexnet", feature_weight=0.0), "every term is switched off"),
        (LossConfig(pixel="l1_normalised", luma_weight=1.0), "l1_normalised is for three channels"),
        (LossConfig(feature_net="squeezenet1_1", feature_weights=(1.0,)), "3 layers need as many weights, got 1"),
    ],
)
def test_combined_loss_refuses(config: LossConfig, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CombinedLoss(config, weights="random")


@pytest.mark.parametrize("term", ["grid_weight", "hfen_weight", "colour_weight", "luma_weight"])
def test_every_term_may_stand_alone(term: str) -> None:
    sr, hr = torch.rand(2, 1, 3, 32, 32)
    total, terms = CombinedLoss(LossConfig(pixel_weight=0.0, **{term: 2.0}))(sr, hr)
    assert list(terms) == [term.removesuffix("_weight")] and total == terms[term.removesuffix("_weight")] > 0


def test_a_teacher_alone_is_a_loss() -> None:
    total, terms = CombinedLoss(LossConfig(pixel_weight=0.0, teacher_weight=1.0))(flat(0.5), flat(0.25))
    assert (float(total), terms) == (0.0, {})


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
    kinds = {"conv": nn.Conv2d, "relu": nn.ReLU, "layer": nn.Sequential, "fire": nn.Module}
    for spec in FEATURE_NETS.values():
        stack = feature_stack(spec.builder)
        for name, index in spec.layers.items():
            kind = next(kind for prefix, kind in kinds.items() if name.startswith(prefix))
            assert isinstance(stack[index], kind), (spec.builder, name)
        assert set(spec.default_layers) <= set(spec.layers)


def test_vgg16_bn_taps_stand_before_the_pools() -> None:
    import torchvision

    for name, taps in {"vgg16_bn": (22, 32, 42), "vgg16": (15, 22, 29)}.items():
        stack = getattr(torchvision.models, name)(weights=None).features
        assert tuple(FEATURE_NETS[name].layers.values()) == taps
        assert all(isinstance(stack[tap + 1], nn.MaxPool2d) for tap in taps)


def test_vgg19_and_alexnet_taps_stand_where_their_names_say() -> None:
    stack = feature_stack("vgg19")
    layers = FEATURE_NETS["vgg19"].layers
    for block in ("3_4", "4_4", "5_4"):
        assert layers[f"relu{block}"] == layers[f"conv{block}"] + 1
        assert isinstance(stack[layers[f"relu{block}"] + 1], nn.MaxPool2d)
    rectifiers = [index for index, module in enumerate(feature_stack("alexnet")) if isinstance(module, nn.ReLU)]
    assert list(FEATURE_NETS["alexnet"].layers.values()) == rectifiers


def test_resnet18_features_are_those_behind_its_first_children() -> None:
    import torchvision

    torch.manual_seed(7)
    network = torchvision.models.resnet18(weights=None).eval()
    net = build_feature_net("resnet18", layers=("relu", "layer2"), weights="random")
    net.stack.load_state_dict({k: v for k, v in network.state_dict().items() if k in net.stack.state_dict()})
    picture = torch.rand(1, 3, 32, 32)
    found = net(picture)
    children = list(network.children())
    with torch.no_grad():
        expected = [nn.Sequential(*children[:count])(net.normalise(picture)) for count in (3, 6)]
    assert [tuple(x.shape) for x in found] == [(1, 64, 16, 16), (1, 128, 4, 4)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # another order of sums


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
    not all(
        (WEIGHTS / FEATURE_NETS[name].file).is_file() for name in ("squeezenet1_1", "vgg19_normalised", "resnet18")
    ),
    reason="no feature networks in SR_WEIGHTS_DIR",
)
def test_pretrained_feature_nets_see_blur() -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    blurred = [nn.functional.avg_pool2d(nn.functional.pad(picture, (p,) * 4), 2 * p + 1, stride=1) for p in (1, 2)]
    for name in ("squeezenet1_1", "vgg19_normalised", "resnet18"):
        net = build_feature_net(name, layers=(), weights=WEIGHTS)
        target = net(picture)
        near, far = (sum(float((a - b).abs().mean()) for a, b in zip(net(x), target, strict=True)) for x in blurred)
        assert 0 < near < far


# Perceptual terms without a grid


def test_unit_distance_by_hand() -> None:
    a = torch.zeros(1, 2, 1, 3)
    b = torch.zeros(1, 2, 1, 3)
    a[0, :, 0] = torch.tensor([[2.0, 1.0, 3.0], [0.0, 1.0, 4.0]])
    b[0, :, 0] = torch.tensor([[0.0, 5.0, 6.0], [7.0, 5.0, 8.0]])
    # Vectors at right angles are 2 apart, of one direction 0, whatever their lengths.
    assert unit_distance(a, b).item() == pytest.approx(2 / 3, rel=1e-6)


def test_grid_sees_what_repeats_and_nothing_else() -> None:
    hr = torch.rand(2, 3, 70, 96, generator=torch.Generator().manual_seed(1))
    assert grid(hr + 0.1, hr).item() == pytest.approx(0, abs=1e-6)
    for period, expected in ((4, 0.01 * 2 * 0.25 * 0.75), (2, 0.01 * 2 * 0.5 * 0.5)):
        striped = hr.clone()
        striped[..., ::period] += 0.01  # mean absolute deviation of one column in `period`
        assert grid(striped, hr).item() == pytest.approx(expected, rel=1e-3)
    third = hr.clone()
    third[..., ::3] += 0.01
    assert grid(third, hr).item() < 0.001


def test_features_are_compared_from_a_place_that_moves_in_training_alone() -> None:
    torch.manual_seed(3)
    config = LossConfig(
        pixel_weight=0.0, feature_net="squeezenet1_1", feature_weights=(1.0,), feature_layers=("relu1",),
        style_weight=0.0, feature_distance="unit", feature_shift=8,
    )  # fmt: skip
    loss = CombinedLoss(config, weights="random")
    sr, hr = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    assert loss(sr, hr)[0] == loss(sr, hr)[0], "validation is the same every time"
    wanted = sr.requires_grad_()
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(float(loss(wanted, hr)[0].detach()))
    assert found[0] == found[2] != found[1]
