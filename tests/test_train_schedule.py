"""Learning rates at the points where they are known exactly, and Muon's orthogonal steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.optimizer import Muon, orthogonalise
from train.recipe import OptimizerConfig
from train.schedule import group_rates, one_cycle, suggest_rate


def test_one_cycle_is_exact_at_its_ends_and_peak() -> None:
    config = OptimizerConfig(div=25.0, final_div=2.5e5, warmup_share=0.25, beta1_high=0.95, beta1_low=0.85)
    assert one_cycle(0, 100, config) == pytest.approx((1 / 25, 0.95), rel=1e-12)
    assert one_cycle(25, 100, config) == (1.0, 0.85)
    assert one_cycle(99, 100, config) == pytest.approx((1 / 2.5e5, 0.95), rel=1e-9)


def test_one_cycle_is_half_way_between_in_the_middle_of_each_side() -> None:
    config = OptimizerConfig(div=2.0, final_div=4.0, warmup_share=0.5)
    assert one_cycle(10, 41, config)[0] == pytest.approx((1 / 2 + 1) / 2)
    assert one_cycle(30, 41, config)[0] == pytest.approx((1 / 4 + 1) / 2)


def test_one_cycle_rises_then_falls() -> None:
    shares = [one_cycle(step, 40, OptimizerConfig())[0] for step in range(40)]
    peak = shares.index(max(shares))
    assert peak == 10
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_one_cycle_of_few_steps_stays_in_range(total: int) -> None:
    for step in range(total):
        share, beta1 = one_cycle(step, total, OptimizerConfig())
        assert 0 < share <= 1 and 0.85 <= beta1 <= 0.95


def test_group_rates_are_spaced_geometrically() -> None:
    assert group_rates(1e-5, 1e-3, 3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert group_rates(0.0, 1e-3, 3) == [1e-3] * 3
    assert group_rates(1e-5, 1e-3, 1) == [1e-3]


def test_suggest_rate_finds_the_steepest_descent() -> None:
    rates = [10.0**power for power in range(-7, 2)]
    losses = [1.0, 1.0, 0.99, 0.9, 0.5, 0.3, 0.29, 0.4, 3.0]
    assert suggest_rate(rates, losses) == 1e-3  # the slope over its neighbours, 0.9 -> 0.3, is the largest
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        suggest_rate(rates[:2], losses[:2])


@pytest.mark.parametrize("shape", [(3, 32, 288), (2, 64, 128), (2, 128, 16)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    result = orthogonalise(torch.randn(shape) * 1e-3)
    assert result.shape == shape and result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() >= 0.5 and values.max() <= 1.3


@pytest.mark.parametrize("shape", [(48, 432), (256, 128)])
def test_orthogonalise_takes_five_newton_schulz_steps(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -4, min(shape), dtype=torch.float64)  # singular values, most of them small
    matrix = (u * values) @ v
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    result = orthogonalise(matrix.float()[None])[0]
    torch.testing.assert_close(result.double(), (u * values) @ v, rtol=0, atol=1e-3)


def test_muon_steps_the_same_in_either_memory_format() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.to(memory_format=memory_format, copy=True))
        weight.grad = gradient.to(memory_format=memory_format)
        Muon([{"params": [weight], "lr": 0.5}], betas=(0.9, 0.99), weight_decay=0.0).step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    factor = orthogonalise(gradient.reshape(1, 8, 36)).view(8, 4, 3, 3)
    torch.testing.assert_close(ends[0], start - 0.5 * factor, rtol=0, atol=1e-4)


def test_muon_steps_by_the_orthogonal_factor() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 2, 1, 1))
    before, gradient = weight.detach().clone(), torch.randn(8, 2, 1, 1)
    weight.grad = gradient.clone()
    Muon([{"params": [weight], "lr": 0.5}], betas=(0.9, 0.99), weight_decay=0.1).step()
    # Fresh momentum is 0.1 of the gradient: the step has the gradient's direction whatever the mixture.
    update = orthogonalise(gradient.view(1, 8, 2))[0].view(8, 2, 1, 1)
    expected = before * (1 - 0.5 * 0.1) - 0.5 * math.sqrt(8 / 2) * update
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-4)


def test_muon_leaves_parameters_without_gradient() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [weight], "lr": 0.5}], betas=(0.9, 0.99), weight_decay=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))
