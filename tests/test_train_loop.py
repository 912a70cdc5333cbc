"""The training loop: resumable bit for bit, frozen as told, stopped when it diverges."""

from __future__ import annotations

import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from trainers import TINY, bad_loss, make_trainer, same

from train.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint, stage_folder
from train.errors import CheckpointError, DivergedError, RecipeError, ResourceError
from train.learner import MAX_NON_FINITE
from train.loop import Progress, Settings, Trainer, phase_steps
from train.models import build_model
from train.models.perceptual_unet import RESNET18_FILE, PerceptualUNet
from train.recipe import ModelConfig, PhaseConfig, Recipe, StageConfig, load_recipe, recipe_from_dict
from train.run_folder import load_run, read_log, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8 + 4


def test_a_run_writes_all_it_promises(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = make_trainer(photo_folder, out)
    news: list[Progress] = []
    trainer.begin()
    assert trainer.train(report=news.append)
    assert trainer.finished and trainer.done_steps == STEPS
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "log.jsonl", "loss.png", "panels", "recipe.json", "run.json", "stages",
    ]  # fmt: skip
    assert load_run(out) == trainer.recipe
    assert news[0].done_steps == 1 and news[-1].done_steps == STEPS  # news from the first step on
    assert [entry["done_steps"] for entry in read_log(out)] == [line.done_steps for line in news]
    assert set(news[-1].terms) == {"pixel"} and news[-1].validation is not None
    assert (out / "panels" / f"{STEPS:08d}.png").is_file()
    for name, steps in (("32", 8), ("48", STEPS)):
        product = load_checkpoint(stage_folder(out, name))
        assert (product.facts["stage"], product.facts["steps"], product.facts["complete"]) == (name, steps, True)
        assert product.facts["recipe"] == json.loads((out / "recipe.json").read_text())
    assert same(product.group("model"), trainer.ema)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("stop_at", [1, 5, 8, 10])
def test_a_stopped_and_resumed_run_is_the_run_that_was_not(stop_at: int, photo_folder: Path, tmp_path: Path) -> None:
    whole = make_trainer(photo_folder, tmp_path / "whole")
    whole.train()
    make_trainer(photo_folder, tmp_path / "parts", max_steps=stop_at).train()
    resumed = make_trainer(photo_folder, tmp_path / "parts")
    assert resumed.resume() and resumed.done_steps == stop_at
    assert resumed.train()
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.ema, resumed.ema)


def test_workers_panels_and_checkpoints_do_not_change_the_result(photo_folder: Path, tmp_path: Path) -> None:
    plain = make_trainer(photo_folder, tmp_path / "plain", checkpoint_seconds=1e9, panel_seconds=1e9)
    busy = make_trainer(photo_folder, tmp_path / "busy", workers=1, checkpoint_seconds=0, panel_seconds=0)
    plain.train()
    busy.train()
    assert same(plain.model.state_dict(), busy.model.state_dict())


def test_max_steps_leaves_an_incomplete_stage(photo_folder: Path, tmp_path: Path) -> None:
    first = make_trainer(photo_folder, tmp_path, max_steps=3)
    assert not first.train()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000000003"
    product = load_checkpoint(stage_folder(tmp_path, "32"))
    assert (product.facts["complete"], product.facts["steps"]) == (False, 3)
    assert same(product.group("model"), first.ema)

    second = make_trainer(photo_folder, tmp_path, max_steps=3)  # steps in all: nothing is left to do
    second.resume()
    assert not second.train() and second.done_steps == 3

    third = make_trainer(photo_folder, tmp_path, max_steps=8)  # ends with the first stage: it is complete
    third.resume()
    assert not third.train()
    assert load_checkpoint(stage_folder(tmp_path, "32")).facts["complete"] is True
    assert not stage_folder(tmp_path, "48").exists()


def test_a_stop_saves_and_leaves_no_stage(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    assert not trainer.train(stop=lambda: trainer.done_steps == 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000000002"
    assert not (tmp_path / "stages").exists()


def test_a_finished_run_resumes_to_nothing(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path).train()
    again = make_trainer(photo_folder, tmp_path)
    assert again.resume() and again.finished
    assert again.train()
    assert again.done_steps == STEPS


def test_resume_without_a_checkpoint_starts_anew(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    assert not trainer.resume()


def test_resume_names_what_differs(photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path / "run", max_steps=1).train()
    other = recipe_from_dict(TINY | {"seed": 9, "loss": {"pixel": "l1"}})
    with pytest.raises(CheckpointError) as caught:
        make_trainer(photo_folder, tmp_path / "run", recipe=other).resume()
    assert 'seed: 1 before, 9 now; loss.pixel: "charbonnier" before, "l1" now' in str(caught.value)
    (photo_folder / "photo0.png").unlink()
    with pytest.raises(CheckpointError, match="photographs: those of 'photos' before, of 'photos' now"):
        make_trainer(photo_folder, tmp_path / "run").resume()


def test_a_stage_that_has_not_begun_may_be_changed(photo_folder: Path, tmp_path: Path) -> None:
    """As the advice after running out of memory has it: a smaller batch for a late stage."""
    first, second = TINY["stages"]
    changed = recipe_from_dict(TINY | {"stages": [first, second | {"batch": 1}]})
    make_trainer(photo_folder, tmp_path, max_steps=8).train()  # the first stage, all of it
    trainer = make_trainer(photo_folder, tmp_path, recipe=changed)
    assert trainer.resume() and trainer.train() and trainer.done_steps == 8 + 8
    with pytest.raises(CheckpointError, match=r"stages.1.batch: 1 before, 2 now"):
        make_trainer(photo_folder, tmp_path).resume()


def taught(**values: Any) -> Recipe:
    return recipe_from_dict(TINY | {"loss": {"teacher_weight": 1.0} | values})


def test_a_teacher_is_learned_from(photo_folder: Path, tmp_path: Path) -> None:
    teacher = make_trainer(photo_folder, tmp_path / "teacher")
    teacher.begin()
    teacher.train()
    pupil = make_trainer(photo_folder, tmp_path / "pupil", recipe=taught(pixel_weight=0.0))
    pupil.learn_from_run(tmp_path / "teacher")
    lr = torch.rand(2, 3, 16, 16)
    distances = []
    pupil.prepare_optimizers(PhaseConfig())
    for step in range(100):
        for group in pupil.parameter_groups():
            group["lr"] = 3e-3 * (1 - step / 100)
        distances.append(float(pupil.step(lr, torch.zeros(2, 3, 32, 32), pupil.recipe.stages[0])["teacher"]))
    assert pupil.teacher is not None
    assert distances[-1] < distances[0] / 2  # by its own term alone: HR is black
    assert same(pupil.teacher.state_dict(), teacher.ema)
    assert not any(parameter.requires_grad for parameter in pupil.teacher.parameters())
    assert pupil.facts["teacher"]["steps"] == STEPS


def test_resume_refuses_another_teacher(photo_folder: Path, tmp_path: Path) -> None:
    for name, steps in (("a", 0), ("b", 10)):
        teacher = make_trainer(photo_folder, tmp_path / name, max_steps=steps)
        teacher.begin()
        teacher.train()

    def pupil(name: str, **settings: Any) -> Trainer:
        trainer = make_trainer(photo_folder, tmp_path / "pupil", recipe=taught(), **settings)
        trainer.learn_from_run(tmp_path / name)
        return trainer

    pupil("a", max_steps=1).train()
    with pytest.raises(CheckpointError, match="teacher: another run, or another stage of it"):
        pupil("b").resume()
    assert pupil("a").resume()


def test_a_teacher_must_suit_every_stage(photo_folder: Path, tmp_path: Path) -> None:
    coarse = recipe_from_dict({"name": "coarse", "model": {"name": "perceptual-unet"}, "stages": [{"size": 64}]})
    run = tmp_path / "teacher"
    write_run(run, coarse, {})
    model = build_model(coarse.model, weights="random")
    save_checkpoint(stage_folder(run, "128"), Checkpoint({f"model.{k}": v for k, v in model.state_dict().items()}, {}))
    with pytest.raises(RecipeError, match="stage 48: size 48 is not a multiple of 32, which the teacher needs"):
        make_trainer(photo_folder, tmp_path / "pupil", recipe=taught()).learn_from_run(run)


def test_resume_tells_what_may_change_the_result(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(photo_folder, tmp_path, max_steps=1).train()
    make_trainer(photo_folder, tmp_path, precision="bf16").resume()
    assert "precision: fp32 before, bf16 now" in caplog.text


def test_resume_names_another_recipe_where_the_position_is_none_of_it(photo_folder: Path, tmp_path: Path) -> None:
    """Such a checkpoint is not damaged."""
    make_trainer(photo_folder, tmp_path, max_steps=8).train()  # the first stage, all of it
    shorter = recipe_from_dict(TINY | {"stages": TINY["stages"][:1], "seed": 9})
    trainer = make_trainer(photo_folder, tmp_path, max_steps=9)
    assert trainer.resume()
    trainer.train()
    with pytest.raises(
        CheckpointError, match=r"made with another recipe or data \(seed: 1 before, 9 now; stages: 2 before, 1 now"
    ):
        make_trainer(photo_folder, tmp_path, recipe=shorter).resume()


@pytest.mark.parametrize("damage", [
    "position", "tensors", "half", "ema", "moment", {"position": [0, 0, -5]}, {"position": [0, 0, 2.5]},
    {"position": [9, 0, 0]}, {"position": [0, 7, 0]}, {"position": 3}, {"done_steps": "2"}, {"best": [1]},
])  # fmt: skip
def test_resume_refuses_a_damaged_checkpoint(damage: str | dict[str, Any], photo_folder: Path, tmp_path: Path) -> None:
    make_trainer(photo_folder, tmp_path, max_steps=1).train()
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    if damage == "position":
        facts = json.loads((folder / "state.json").read_text())
        del facts["position"]
        (folder / "state.json").write_text(json.dumps(facts))
    elif isinstance(damage, dict):
        facts = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(facts | damage))
    elif damage in ("ema", "moment"):
        tensors = load_checkpoint(folder).tensors
        name = next(key for key in tensors if key.startswith("ema." if damage == "ema" else "optimizer.tail.weight"))
        tensors[name] = tensors[name].flatten()[:1].clone()
        save_file(tensors, folder / "state.safetensors")
    elif damage == "tensors":
        save_file({"model.x": torch.zeros(1)}, folder / "state.safetensors")
    else:
        (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=folder.name):
        make_trainer(photo_folder, tmp_path).resume()


def test_init_starts_from_another_runs_weights(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_trainer(photo_folder, tmp_path / "source", max_steps=10)
    source.begin()
    source.train()
    trainer = make_trainer(photo_folder, tmp_path / "tuned")
    trainer.start_from_run(tmp_path / "source")
    assert same(trainer.model.state_dict(), source.ema) and same(trainer.ema, source.ema)
    assert trainer.done_steps == 0
    assert (trainer.facts["init"]["stage"], trainer.facts["init"]["steps"]) == ("48", 10)
    assert "taking its stage 48 as it stands" in caplog.text
    trainer.train(stop=lambda: trainer.done_steps == 1)
    resumed = make_trainer(photo_folder, tmp_path / "tuned")
    resumed.resume()
    assert resumed.facts["init"] == trainer.facts["init"]


def test_init_starts_from_a_bundle(photo_folder: Path, tmp_path: Path) -> None:
    """Its weights are folded and in fp16: what a network without norms has, rounded."""
    trainer = make_trainer(photo_folder, tmp_path / "run")
    half = {key: value.half().contiguous() for key, value in trainer.model.state_dict().items()}
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    save_file(half, bundle / "48.safetensors")
    stage = {"name": "48", "weights": {"name": "48.safetensors", "bytes": 1, "sha256": "abc"}}
    (bundle / "manifest.json").write_text(json.dumps({"name": "mine", "stages": [stage]}))
    trainer.start_from_run(bundle)
    assert same(trainer.model.state_dict(), {key: value.float() for key, value in half.items()})
    assert trainer.facts["init"] == {"bundle": "mine", "stage": "48", "sha256": "abc"}
    stage["weights"]["name"] = "48.weights"
    (bundle / "manifest.json").write_text(json.dumps({"name": "mine", "stages": [stage]}))
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        trainer.start_from_run(bundle)
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable bundle"):
        trainer.start_from_run(bundle)


def test_init_starts_from_a_checkpoint(photo_folder: Path, tmp_path: Path) -> None:
    """The best one, say, of a run that got worse afterwards: its averaged weights."""
    source = make_trainer(photo_folder, tmp_path / "source", max_steps=3)
    source.begin()
    source.train()
    trainer = make_trainer(photo_folder, tmp_path / "run")
    trainer.start_from_run(tmp_path / "source" / "checkpoints" / "best")
    best = load_checkpoint(tmp_path / "source" / "checkpoints" / "best")
    assert same(trainer.model.state_dict(), best.group("ema"))
    assert trainer.facts["init"]["steps"] == best.facts["done_steps"] > 0


@pytest.mark.parametrize("weights", [{}, {"head.weight": torch.zeros(8), "tail.weight": torch.zeros(48)}])
def test_init_refuses_a_bundle_of_nothing(weights: dict[str, Tensor], photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path / "run")
    with pytest.raises(CheckpointError, match="do not fit this recipe's network"):
        trainer.start_from(weights)


def test_init_refuses_another_network_and_an_empty_run(photo_folder: Path, tmp_path: Path) -> None:
    source = make_trainer(photo_folder, tmp_path / "source", max_steps=1)
    source.begin()
    narrower = recipe_from_dict(TINY | {"model": {"options": {"channels": 4, "blocks": [1, 1, 1]}}})
    with pytest.raises(CheckpointError, match="no stage of this run is finished; let sr-train"):
        make_trainer(photo_folder, tmp_path / "run").start_from_run(tmp_path / "source")
    source.train()
    with pytest.raises(CheckpointError, match=r"do not fit this recipe's network \(fast\): 31 of 32 tensors differ"):
        make_trainer(photo_folder, tmp_path / "run", recipe=narrower).start_from_run(tmp_path / "source")


def test_non_finite_steps_are_skipped_and_counted(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    good = trainer.loss.forward
    monkeypatch.setattr(trainer.loss, "forward", bad_loss(float("nan")))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train(stop=lambda: trainer.done_steps == 3)
    assert trainer.non_finite == 3 and "step 2: the loss is nan, skipped" in caplog.text
    assert same(trainer.model.state_dict(), before)
    monkeypatch.setattr(trainer.loss, "forward", good)
    trainer.train(stop=lambda: trainer.done_steps == 4)
    assert trainer.non_finite == 0
    assert not same(trainer.model.state_dict(), before)


def test_a_gradient_that_is_not_finite_is_skipped(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)

    def root_of_zero(sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = (sr * 0).abs().sum().sqrt()  # 0, with the slope of a root at 0
        return total, {"pixel": total}

    monkeypatch.setattr(trainer.loss, "forward", root_of_zero)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train(stop=lambda: trainer.done_steps == 1)
    assert "the gradient is nan, skipped" in caplog.text
    assert same(trainer.model.state_dict(), before)


def test_ten_in_a_row_end_the_run_at_the_last_good_checkpoint(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StageConfig(name="32", size=32, batch=2, phases=(PhaseConfig(epochs=20.0),))
    recipe = replace(recipe_from_dict(TINY), stages=(stage,))
    trainer = make_trainer(photo_folder, tmp_path, recipe=recipe, checkpoint_seconds=0)
    trainer.train(stop=lambda: trainer.done_steps == 2)
    monkeypatch.setattr(trainer.loss, "forward", bad_loss(float("inf")))
    with pytest.raises(DivergedError, match=rf"{MAX_NON_FINITE} steps in a row; last good checkpoint: .*step-0+2;"):
        trainer.train()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000000002"


def test_an_absurd_learning_rate_ends_the_run(photo_folder: Path, tmp_path: Path) -> None:
    stage = StageConfig(name="32", size=32, batch=2, phases=(PhaseConfig(epochs=20.0, learning_rate=1e30),))
    recipe = replace(recipe_from_dict(TINY), stages=(stage,))
    trainer = make_trainer(photo_folder, tmp_path, recipe=recipe, checkpoint_seconds=0)
    with pytest.raises(DivergedError, match=r"not finite.*; last good checkpoint: .*; lower the learning rate"):
        trainer.train()
    folder = latest_checkpoint(tmp_path)
    if folder is not None:
        assert all(torch.isfinite(value).all() for value in load_checkpoint(folder).tensors.values())


def test_weights_that_are_not_finite_are_never_saved(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters())[0] = float("inf")
    with pytest.raises(DivergedError, match=r"weights are not finite any more .*; last good checkpoint: none"):
        trainer.save()
    assert latest_checkpoint(tmp_path) is None


def test_out_of_memory_names_batch_and_size(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)

    good = trainer.loss.forward

    def exhausted(sr: Tensor, hr: Tensor) -> Any:
        if len(sr) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return good(sr, hr)

    monkeypatch.setattr(trainer.loss, "forward", exhausted)
    most = 1
    with pytest.raises(ResourceError, match=r"batch 2 at size 32 \(stage 32\); 1 would fit: --set stages.0.batch=1"):
        trainer.train()
    most = 0
    with pytest.raises(ResourceError, match="not even one picture fits: take a smaller stage size"):
        trainer.train()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_ran_out_of_memory_leaves_none_of_it(
    where: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    good, results = trainer.loss.forward, []

    def exhausted(sr: Tensor, hr: Tensor) -> Any:
        assert [result() for result in results] == [None] * len(results)  # freed before a smaller batch is tried
        results.append(weakref.ref(sr))
        if len(sr) > 1 and where == "backward":
            sr.register_hook(end)
        elif len(sr) > 1:
            end()
        return good(sr, hr)

    def end(gradient: Tensor | None = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.loss, "forward", exhausted)
    with pytest.raises(ResourceError, match="1 would fit"):
        trainer.train()
    assert len(results) == 2


def test_what_ends_a_run_between_two_steps_costs_no_step(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path)

    def gone(progress: Progress) -> None:
        if progress.done_steps >= 3:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    trainer.train(stop=lambda: trainer.done_steps == 2)
    trainer = make_trainer(photo_folder, tmp_path)
    trainer.resume()
    with pytest.raises(ResourceError, match="a process that prepares samples was ended from outside"):
        trainer.train(report=gone)
    resumed = make_trainer(photo_folder, tmp_path)
    assert resumed.resume() and resumed.done_steps == 3
    resumed.train()
    whole = make_trainer(photo_folder, tmp_path / "whole")
    whole.train()
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_a_failure_inside_a_step_is_not_saved(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    monkeypatch.setattr(trainer, "_update_ema", lambda: 1 / 0)  # the weights have moved by then
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert latest_checkpoint(tmp_path) is None


def test_a_failing_look_leaves_the_weights(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(photo_folder, tmp_path)
    trainer.train(stop=lambda: trainer.done_steps == 3)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    monkeypatch.setattr("train.loop.validate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.look()
    assert same(trainer.model.state_dict(), before) and trainer.model.training


def test_pictures_that_do_not_fit_into_memory_are_told_before_they_are_decoded(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.memory_bytes", lambda: 10_000)
    monkeypatch.setattr("train.data.read_picture", lambda path: pytest.fail("decoded"))
    with pytest.raises(ResourceError, match=r"photos: 6 pictures take .* GB in memory, and 0.0 GB are free"):
        make_trainer(photo_folder, tmp_path)


@pytest.mark.parametrize("name", ["panels", "log.jsonl", "checkpoints", "stages", "loss.png"])
def test_an_unwritable_part_of_the_run_folder_is_told(name: str, photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    if name in ("log.jsonl", "loss.png"):
        (out / name).mkdir()
    else:
        (out / name).write_text("")
    trainer = make_trainer(photo_folder, out)
    with pytest.raises(ResourceError, match=r"(could not|cannot) be written"):
        trainer.train()


def test_muon_without_hidden_weights_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(TINY | {"model": {"name": "vae", "options": {"channels": 4, "latent": 4}}})
    with pytest.raises(RecipeError, match=r"optimizer.muon_rate: VariationalAutoEncoder has no weights for Muon"):
        make_trainer(photo_folder, tmp_path, recipe=recipe).train()


def write_resnet18(folder: Path) -> None:
    import torchvision

    network = torchvision.models.resnet18(weights=None)
    state = {key: value for key, value in network.state_dict().items() if not key.startswith(("layer4", "fc"))}
    save_file(state, folder / RESNET18_FILE)


def test_a_frozen_phase_holds_the_pretrained_convolutions_alone(photo_folder: Path, tmp_path: Path) -> None:
    write_resnet18(tmp_path)
    stage = StageConfig(
        name="64", size=64, batch=2,
        phases=(
            PhaseConfig(name="frozen", learning_rate=1e-3, freeze_encoder=True),
            PhaseConfig(name="unfrozen", learning_rate=1e-3, encoder_learning_rate=1e-5),
        ),
    )  # fmt: skip
    shipped = load_recipe("perceptual-unet", overrides=("loss.feature_net=''",))
    recipe = replace(shipped, stages=(stage,), samples_per_epoch=4, validation_pictures=0)
    trainer = make_trainer(photo_folder, tmp_path / "run", recipe=recipe, weights=tmp_path)
    model = trainer.model
    assert isinstance(model, PerceptualUNet)
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}

    def moved() -> set[str]:
        return {key for key, value in model.encoder.state_dict().items() if not torch.equal(value, before[key])}

    convolutions = {name for name, value in before.items() if value.ndim == 4}
    pretrained = {name for name in convolutions if name in model.pretrained}
    trainer.train(stop=lambda: trainer.done_steps == 2)
    assert not moved() & pretrained
    assert convolutions - pretrained <= moved()  # layer4 and the inserted blocks
    norms = {name for name, module in model.encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {f"{name}.running_mean" for name in norms} <= moved()
    assert {f"{name}.weight" for name in norms} <= moved()

    trainer.train(stop=lambda: trainer.done_steps == 3)
    rates = [group["highest_rate"] for group in trainer.parameter_groups()]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3])
    assert pretrained <= moved()


def test_sizes_must_lie_on_the_networks_grid(tmp_path: Path) -> None:
    stage = StageConfig(name="40", size=40)
    with pytest.raises(RecipeError, match="stage '40': size 40 is not a multiple of 16, the network's"):
        Trainer(replace(Recipe(), stages=(stage,)), tmp_path, weights=None, settings=Settings(device="cpu"))


def test_weights_of_a_run_are_held_still_too(tmp_path: Path) -> None:
    """With --init RUN --weights random nothing is pretrained, and yet nothing is at random."""
    recipe = Recipe(model=ModelConfig(name="perceptual-unet", options={"backbone": "resnet18"}))
    trainer = Trainer(recipe, tmp_path, weights="random", settings=Settings(device="cpu"))
    assert trainer.model.freezable_parameters() == []
    trainer.start_from({key: value.clone() for key, value in trainer.model.state_dict().items()})
    trainer.prepare_optimizers(PhaseConfig(freeze_encoder=True))
    assert isinstance(trainer.model, PerceptualUNet)
    frozen = {name for name, p in trainer.model.encoder.named_parameters() if not p.requires_grad}
    convolutions = {f"{name}.weight" for name, m in trainer.model.encoder.named_modules() if isinstance(m, nn.Conv2d)}
    assert frozen == convolutions and len(frozen) == 20


def test_a_grown_phase_moves_the_grown_layer_alone(photo_folder: Path, tmp_path: Path) -> None:
    options = {"backbone": "resnet18", "growth": 1}
    recipe = recipe_from_dict({
        "name": "grown", "model": {"name": "perceptual-unet", "scales": [2], "options": options},
        "loss": {"pixel": "l1"}, "samples_per_epoch": 4, "validation_pictures": 0,
        "stages": [{"size": 64, "batch": 2, "phases": [{"grown_only": True, "learning_rate": 1e-2}]}],
    })  # fmt: skip
    trainer = make_trainer(photo_folder, tmp_path, recipe=recipe, weights="random")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("growth.0.") for key in moved)


def test_phase_steps_cover_the_epochs() -> None:
    recipe = Recipe()
    stage = StageConfig(batch=8)
    assert phase_steps(recipe, stage, PhaseConfig(epochs=2.0), 100) == 25
    assert phase_steps(replace(recipe, samples_per_epoch=10), stage, PhaseConfig(epochs=1.0), 100) == 2
    assert phase_steps(recipe, stage, PhaseConfig(epochs=0.001), 100) == 1


def test_random_weights_are_recorded(photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_from_dict(TINY | {"loss": {"feature_net": "squeezenet1_1"}})
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(photo_folder, tmp_path, recipe=recipe, weights="random")
    assert trainer.facts["weights"] == "random"
    assert "squeezenet1_1 starts from random weights, as --weights random asks" in caplog.text
    trainer.train(stop=lambda: trainer.done_steps == 1)
    assert set(read_log(tmp_path)[0]["terms"]) == {"pixel", "features", "style"}
