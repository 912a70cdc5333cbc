"""Compiled forward passes: the same network under the same names, and one that cannot be compiled still runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from train import learner
from train.compiling import compiled
from train.learner import Learner
from train.recipe import recipe_from_dict

RECIPE: dict[str, Any] = {
    "model": {"options": {"channels": 8, "blocks": [1, 1, 1]}},
    "stages": [{"name": "32", "size": 32, "batch": 2}],
}


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def make_learner() -> Learner:
    return Learner(recipe_from_dict(RECIPE), weights=None, device="cpu", precision="fp32")


def take_steps(each: Learner, count: int = 3) -> dict[str, torch.Tensor]:
    """Give all that a checkpoint would hold after some steps on drawn pictures."""
    stage = each.recipe.stages[0]
    each.prepare_optimizers(stage.phases[0])
    for group in each.parameter_groups():
        group["lr"] = 1e-3
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        lr, hr = (torch.rand(2, 3, side, side, generator=generator) for side in (16, 32))
        assert each.step(lr, hr, stage)
        each.done_steps += 1
    return each.tensors()


def test_a_compiled_run_has_the_tensors_of_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_learner()
    expected = take_steps(plain)
    assert plain.forward is plain.model, "the CPU compiles nothing"
    other = make_learner()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(learner, "choose_forward", lambda network, device: compiled(network, backend=backend))
    found = take_steps(other)
    assert graphs and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_what_cannot_be_compiled_runs_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    network = make_learner().model

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        raise RuntimeError("there is no triton")

    forward = compiled(network, backend=backend)
    lr = torch.rand(1, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(forward(lr, 2), network(lr, 2))
    assert [record.levelname for record in caplog.records if record.name == "train.compiling"] == ["WARNING"]
    assert "cannot be compiled" in caplog.text and "there is no triton" in caplog.text


def test_an_error_of_the_network_stays_one() -> None:
    forward = compiled(make_learner().model, backend="eager")
    with pytest.raises(RuntimeError):
        forward(torch.rand(1, 5, 16, 16), 2)
