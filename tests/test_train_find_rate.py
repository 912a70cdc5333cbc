"""The finder of learning rates: no trace left, a suggestion where the loss falls."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import Tensor
from trainers import TINY, bad_loss, make_trainer, same

from train.errors import DivergedError, RecipeError
from train.find_rate import find_rate
from train.recipe import recipe_from_dict

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_rate_finder_leaves_no_trace(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path / "run")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    told: list[tuple[int, int]] = []
    rate = find_rate(trainer, tmp_path / "find_lr.png", report=lambda *counts: told.append(counts))
    assert rate is None  # this network starts as its own skip: its loss has nowhere to fall
    assert told[0] == (1, 100) and len(told) > 10
    assert (tmp_path / "find_lr.png").is_file()
    assert same(trainer.model.state_dict(), before) and same(trainer.ema, before)
    assert (trainer.optimizers, trainer.done_steps, trainer.non_finite) == ([], 0, 0)
    assert trainer.position == (0, 0, 0)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trainer.model.parameters())
    fresh = make_trainer(photo_folder, tmp_path / "fresh")
    trainer.train()
    fresh.train()
    assert same(trainer.model.state_dict(), fresh.model.state_dict())


def test_the_rate_finder_suggests_where_the_loss_falls(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path / "run")
    good = trainer.loss.forward
    step = itertools.count()

    def falling(sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total, _ = good(sr, hr)
        at = next(step)
        value = 1 - 0.5 * min(1.0, max(0, at - 40) / 20) if at < 80 else 1e3
        return total * 0 + value, {"pixel": (total * 0 + value).detach()}

    monkeypatch.setattr(trainer.loss, "forward", falling)
    rate = find_rate(trainer, tmp_path / "find_lr.png")
    assert rate is not None and 1e-4 < rate < 1  # steps 40 to 80 of 100


@pytest.mark.parametrize("good_steps", [0, 30])
def test_the_rate_finder_stops_at_an_infinite_loss(
    good_steps: int, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    steps = []
    good = trainer.loss.forward

    def worse(sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        steps.append(sr)
        return good(sr, hr) if len(steps) <= good_steps else bad_loss(float("inf"))(sr, hr)

    monkeypatch.setattr(trainer.loss, "forward", worse)
    if good_steps:
        find_rate(trainer, tmp_path / "find_lr.png")
    else:
        with pytest.raises(DivergedError, match="non-finite loss after 0 steps"):
            find_rate(trainer, tmp_path / "find_lr.png")
    assert len(steps) == good_steps + 1
    assert trainer.non_finite == 0


def test_the_rate_finder_is_for_the_network_alone(photo_folder: Path, tmp_path: Path) -> None:
    phase = {"kind": "adversarial"}
    critic = {"critic": "srgan", "options": {"channels": 4, "dense": 8}}
    recipe = recipe_from_dict(TINY | {"stages": [{"size": 32, "phases": [phase]}], "adversarial": critic})
    with pytest.raises(RecipeError, match="for phases that train the network alone"):
        find_rate(make_trainer(photo_folder, tmp_path, recipe=recipe), tmp_path / "find_lr.png")
