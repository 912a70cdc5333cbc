"""A critic beside the network: phases, turns, saved results, and going on in the middle of all that."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainers
from torch import Tensor

from train.adversary import FAKES, Adversary, SavedResults
from train.errors import RecipeError
from train.loop import Settings, Trainer
from train.recipe import AdversarialConfig, Recipe, recipe_from_dict
from train.run_folder import read_log
from train.schedule import schedule

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {
    "name": "tiny-gan",
    "model": {"options": {"channels": 8, "blocks": [1, 1, 1]}},
    "loss": {"pixel": "mse"},
    "adversarial": {
        "critic": "unet-critic", "options": {"channels": 8, "blocks": 1}, "weight": 0.1, "rate": 5.0,
    },
    "samples_per_epoch": 8,
    "stages": [
        {"name": "64", "size": 64, "batch": 2, "phases": [
            {"name": "content", "epochs": 1.0},
            {"name": "critic", "epochs": 1.0, "kind": "critic"},
            {"name": "both", "epochs": 2.0, "kind": "adversarial", "learning_rate": 1e-4},
        ]},
    ],
}  # fmt: skip
STEPS = 4 + 4 + 8


def make_trainer(photographs: Path, out: Path, *, recipe: Recipe | None = None, **settings: Any) -> Trainer:
    return trainers.make_trainer(
        photographs, out, recipe=recipe or recipe_from_dict(TINY), weights="random", **settings
    )


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.adversary is not None
    critic = {f"critic.{key}": value for key, value in trainer.adversary.critic.state_dict().items()}
    return {key: value.clone() for key, value in (trainer.model.state_dict() | critic).items()}


def test_each_phase_trains_what_it_says(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    moved = []
    before = weights_of(trainer)
    for stop in (4, 8, STEPS):
        trainer.train(stop=lambda stop=stop: trainer.done_steps == stop)
        after = weights_of(trainer)
        names = {name for name in after if name.endswith(("weight", "original"))}
        names = {name for name in names if not torch.equal(after[name], before[name])}
        moved.append({name.startswith("critic.") for name in names})
        before = after
    assert moved == [{False}, {True}, {False, True}]
    assert trainer.finished


def test_the_critic_goes_on_in_a_second_adversarial_phase(photo_folder: Path, tmp_path: Path) -> None:
    phases = [{"name": name, "epochs": 1.0, "kind": "adversarial"} for name in ("first", "second")]
    stages = [{"name": "64", "size": 64, "batch": 2, "phases": phases}]
    recipe = recipe_from_dict(TINY | {"stages": stages})
    trainer = make_trainer(photo_folder, tmp_path / "whole", recipe=recipe)
    trainer.train(stop=lambda: trainer.done_steps == 4)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    learned = {name for name in after if name.startswith("critic.") and name.endswith(("weight", "original"))}
    assert learned and all(not torch.equal(after[name], before[name]) for name in learned)
    make_trainer(photo_folder, tmp_path / "parts", recipe=recipe, max_steps=6).train()
    resumed = make_trainer(photo_folder, tmp_path / "parts", recipe=recipe)
    assert resumed.resume()
    resumed.train()
    other = weights_of(resumed)
    assert all(torch.equal(after[name], other[name]) for name in after)


def test_the_critic_learns_to_tell_results_from_photographs() -> None:
    """Of pictures with hard edges and the same without."""
    torch.manual_seed(0)
    adversary = Adversary(AdversarialConfig(critic="srgan", options={"channels": 8, "dense": 64}), torch.device("cpu"))
    optimizer = torch.optim.AdamW(adversary.critic.parameters(), lr=1e-3)
    losses = []
    for _ in range(80):
        hr = (torch.rand(4, 3, 8, 8) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
        soft = torch.nn.functional.avg_pool2d(hr, 3, 1, 1)
        loss, _ = adversary.judge(soft, hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.log(2) / 2 < losses[0] < 2 * np.log(2), "ln 2 is knowing nothing"
    assert np.mean(losses[-10:]) < 0.2
    verdict, terms = adversary.persuade(soft, torch.tensor(1.0), {"pixel": torch.tensor(1.0)})
    assert set(terms) == {"pixel", "adversarial"} and verdict > 1 and terms["adversarial"] > 1e-3


@pytest.mark.parametrize("stop_at", [2, 5, 8, 11, 14])
def test_a_stopped_run_goes_on_as_if_it_had_not(stop_at: int, photo_folder: Path, tmp_path: Path) -> None:
    whole = make_trainer(photo_folder, tmp_path / "whole")
    whole.train()
    make_trainer(photo_folder, tmp_path / "parts", max_steps=stop_at).train()
    resumed = make_trainer(photo_folder, tmp_path / "parts")
    assert resumed.resume() and resumed.done_steps == stop_at
    resumed.train()
    one, other = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_results_are_saved_and_read_again(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, max_steps=5)
    trainer.train()
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / FAKES).iterdir()}
    assert len(saved) == len(trainer.train_set)
    resumed = make_trainer(photo_folder, tmp_path, max_steps=7)
    resumed.resume()
    resumed.train()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / FAKES).iterdir()} == saved


def test_a_run_can_be_stopped_or_killed_while_it_saves_results(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer(photo_folder, tmp_path / "whole")
    whole.train()
    out = tmp_path / "parts"
    trainer = make_trainer(photo_folder, out)

    def stop() -> bool:  # after two results
        return trainer.done_steps == 4 and len(list(out.glob("fakes/*.png"))) == 2

    with caplog.at_level(logging.INFO):
        assert not trainer.train(stop=stop)
    assert f"results for the critic: 0 of {len(trainer.train_set)}" in caplog.text
    saved = {path: path.stat().st_mtime_ns for path in (out / FAKES).iterdir()}
    assert trainer.position == (0, 1, 0) and len(saved) == 2
    resumed = make_trainer(photo_folder, out)
    assert resumed.resume() and resumed.train()
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    one, other = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_begun_anew_takes_no_results_of_another(photo_folder: Path, tmp_path: Path) -> None:
    """The first phase is a critic's: nothing but the results themselves tells which network made them."""
    first_phase = TINY["stages"][0] | {"phases": TINY["stages"][0]["phases"][1:]}
    recipe = recipe_from_dict(TINY | {"stages": [first_phase]})
    trainer = make_trainer(photo_folder, tmp_path, recipe=recipe)
    trainer.begin()
    trainer.train(stop=lambda: trainer.done_steps == 1)
    results = sorted((tmp_path / FAKES).iterdir())
    for path in results:
        path.write_bytes(b"of another network")
    shutil.rmtree(tmp_path / "checkpoints")
    again = make_trainer(photo_folder, tmp_path, recipe=recipe)
    assert not again.resume()
    again.begin()
    again.train(stop=lambda: again.done_steps == 1)
    assert not any(path.read_bytes() == b"of another network" for path in results)


def test_a_critic_that_needs_larger_crops_is_told_at_once(tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        TINY | {"adversarial": {"critic": "unet-critic", "options": {"blocks": 4, "channels": 8}}}
    )
    with pytest.raises(RecipeError, match="stage '64': size 64, and the critic needs 128 pixels a side"):
        Trainer(recipe, tmp_path, weights="random", settings=Settings(device="cpu"))


def test_rates_and_moments_are_the_schedules_and_in_adversarial_phases_constant(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    seen: list[tuple[str, float, float]] = []
    step = trainer.step

    def noted(*args: Any) -> Any:
        group = trainer.parameter_groups()[0]
        seen.append((trainer.phase.name, group["lr"], group["betas"][0]))
        return step(*args)

    monkeypatch.setattr(trainer, "step", noted)
    trainer.train()
    for name, steps, highest in (("content", 4, 1e-3), ("critic", 4, 5e-3), ("both", 8, 1e-4)):
        found = [(rate, moment) for phase, rate, moment in seen if phase == name]
        expected = [schedule(index, steps, trainer.recipe.optimizer) for index in range(steps)]
        if name == "both":
            expected = [(1.0, trainer.recipe.adversarial.beta1)] * steps
        assert np.array(found) == pytest.approx(np.array([(highest * share, moment) for share, moment in expected]))


def test_saved_crops_show_the_same_place(photo_folder: Path, tmp_path: Path) -> None:
    hr = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    crops = SavedResults([(255 - hr, hr)], size=32, entropy=(1, 0, 0))
    for index in range(5):
        sr, target = crops[index]
        torch.testing.assert_close(sr, 1 - target)
        assert sr.shape == (3, 32, 32)
    assert not torch.equal(crops[0][1], crops[1][1]) and torch.equal(crops[0][1], crops[0][1])


def test_the_critic_keeps_its_turn_until_it_knows_enough() -> None:
    adversary = Adversary(AdversarialConfig(critic="unet-critic", threshold=0.5), torch.device("cpu"))
    turns = []
    for loss in (0.9, 0.7, 0.4):
        adversary.take_turns({"critic": torch.tensor(loss)})
        turns.append(adversary.has_turn)
    assert turns == [True, True, False]
    adversary.take_turns({"adversarial": torch.tensor(1.0)})
    assert adversary.has_turn, "one step of the network each time"
    alternating = Adversary(AdversarialConfig(critic="unet-critic"), torch.device("cpu"))
    alternating.take_turns({"critic": torch.tensor(9.0)})
    assert not alternating.has_turn


def test_both_losses_are_logged(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.clock.REPORT_SECONDS", -1.0)
    make_trainer(photo_folder, tmp_path).train()
    terms = {name for entry in read_log(tmp_path) for name in entry["terms"]}
    assert {"pixel", "critic", "adversarial"} <= terms


def test_a_phase_that_needs_a_critic_asks_for_one() -> None:
    values = {key: value for key, value in TINY.items() if key != "adversarial"}
    with pytest.raises(RecipeError, match=r"phase 'critic': expected adversarial.critic"):
        recipe_from_dict(values)
