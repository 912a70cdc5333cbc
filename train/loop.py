"""Train a recipe: stages x phases, one optimiser step at a time, resumable at any step."""

from __future__ import annotations

import functools
import json
import logging
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import plots
from .adversary import SavedResults, forget_results, save_results
from .checkpoint import (
    BEST,
    MANIFEST,
    TENSORS,
    Checkpoint,
    keep_latest,
    latest_checkpoint,
    load_bundle,
    load_checkpoint,
    save_checkpoint,
    stage_folder,
)
from .clock import Clock
from .data import CropPairs, Photographs, read_photographs, split_validation, to_floats
from .device_data import StoredPhotographs, device_batches, store
from .errors import CheckpointError, DivergedError, RecipeError, ResourceError, TrainError
from .feature_nets import RANDOM_WEIGHTS
from .learner import Learner
from .loading import Made, Steps, batches
from .pairs import read_pairs
from .recipe import PhaseConfig, Recipe, StageConfig, differences, recipe_from_dict
from .run_folder import append_log, cut_log, load_run, read_log, write_run
from .schedule import schedule
from .stages import last_stage, load_network
from .validation import to_batch, to_picture, validate

LOG = logging.getLogger(__name__)
NEWS_SECONDS = 30.0  # of what a phase prepares
KEPT_CHECKPOINTS = 2
# As PyTorch's loader words it, in whatever line the news arrive.
WORKER_ENDED = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")


@dataclass(frozen=True)
class Settings:
    """How a run is done, as opposed to what is trained: on one device only `precision` may change the result.

    precision: "auto" (bf16 where the device has it), "fp32" or "bf16".
    checkpoint_seconds, panel_seconds: at most that long between two of them.
    max_steps: stop after so many steps in all, those before a resume included; 0: at the recipe's end.
    """

    device: str = "auto"
    precision: str = "auto"
    workers: int = 1
    checkpoint_seconds: float = 300.0
    panel_seconds: float = 300.0
    max_steps: int = 0


@dataclass(frozen=True)
class Progress:
    """One line of news for the person who waits. skipped: steps whose loss or gradient was not finite.

    validation: means over the pictures that were set aside, see train.validation; None where none was made.
    """

    stage: str
    phase: str
    step: int
    steps: int
    done_steps: int
    all_steps: int
    learning_rate: float
    terms: dict[str, float]
    images_per_second: float
    skipped: int
    validation: dict[str, float] | None


def phase_steps(recipe: Recipe, stage: StageConfig, phase: PhaseConfig, pictures: int) -> int:
    """Count the optimiser steps of a phase: its epochs over its batches."""
    samples = recipe.samples_per_epoch or pictures
    return max(1, math.ceil(phase.epochs * samples / stage.batch))


class _Stopped(Exception):
    """The run is to stop, and a phase was still preparing its samples."""


class Trainer(Learner):
    """One run: its networks, its position, and the folder it writes to.

    weights: of pretrained networks, as in feature_nets.find_weights.
    Raises: RecipeError, WeightsError, ResourceError for what cannot be built from the recipe here.
    """

    def __init__(self, recipe: Recipe, out: Path, *, weights: Path | str | None, settings: Settings):
        super().__init__(recipe, weights=weights, device=settings.device, precision=settings.precision)
        self._check_sizes()
        self.out, self.settings = out, settings
        self.position = (0, 0, 0)  # stage, phase, step within the phase
        self.best = -math.inf  # validation PSNR-Y
        self.is_in_step = False  # between two steps weights and position belong together
        self.looked_at: tuple[int, dict[str, float]] | None = None  # done steps and metrics of the last look
        self.stored: StoredPhotographs | None = None  # photographs that lie in a GPU's memory
        self.facts: dict[str, Any] = {
            "recipe": asdict(recipe),
            "weights": weights.resolve().name if isinstance(weights, Path) else weights or "torchvision",
            "device": self.device.type,
            "processes": self.processes.count,
            "precision": "bf16" if self.autocast else "fp32",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "commit": _git_commit(),
        }

    def _check_sizes(self) -> None:
        """Refuse what would fail hours later.

        Raises: RecipeError for a stage whose size or batch does not suit the network, the critic or the processes.
        """
        grid, count = self.model.output_grid(), self.processes.count
        smallest = getattr(self.adversary.critic, "smallest", 1) if self.adversary else 1
        for stage in self.recipe.stages:
            where = f"stage {stage.name!r}"
            if stage.size % grid:
                raise RecipeError(f"{where}: size {stage.size} is not a multiple of {grid}, the network's")
            if stage.size < smallest and any(phase.kind != "generator" for phase in stage.phases):
                raise RecipeError(f"{where}: size {stage.size}, and the critic needs {smallest} pixels a side")
            if stage.batch % count:
                raise RecipeError(f"{where}: a batch of {stage.batch} cannot be shared by {count} processes evenly")

    def load_photographs(
        self, data: Path, progress: Callable[[int, int], None], *, low_resolution: Path | None = None
    ) -> None:
        """Read the data folder and set the validation pictures aside.

        low_resolution: folder of the pictures that the photographs are to be made of; None degrades them.
        Raises: DataError for a folder without usable pictures; ResourceError if they do not fit into memory.
        """
        largest = max(stage.size for stage in self.recipe.stages)
        photographs: Photographs
        if low_resolution is None:
            photographs = read_photographs(data, smallest_side=largest, progress=progress)
        else:
            scales = self.recipe.model.scales
            photographs = read_pairs(low_resolution, data, scales=scales, smallest_side=largest, progress=progress)
        self.train_set, self.validation_set = split_validation(photographs, self.recipe.validation_pictures)
        self.stored = store(self.train_set, self.device)
        self.facts["samples"] = "cpu" if self.stored is None else self.device.type
        self.facts["data"] = data.resolve().name
        self.facts["fingerprint"] = photographs.fingerprint()
        self.facts["pictures"] = len(self.train_set)
        if low_resolution is not None:
            self.facts["low_resolution"] = low_resolution.resolve().name

    # Position and checkpoints

    @property
    def finished(self) -> bool:
        """Tell whether every stage of the recipe is trained."""
        return self.position[0] == len(self.recipe.stages)

    def start_from_run(self, run: Path) -> None:
        """Take over the weights of another run's last stage, of a checkpoint or of a bundle, before the first step.

        Raises: CheckpointError if there are none or they belong to another network.
        """
        if (run / MANIFEST).is_file():
            source = load_bundle(run)
            self.facts["init"] = source.facts
        elif (run / TENSORS).is_file():
            source = load_checkpoint(run)
            self.facts["init"] = _origin(source.facts)
        else:
            recipe = load_run(run)
            stage = last_stage(run, recipe)
            source = load_checkpoint(stage_folder(run, stage))
            self.facts["init"] = _origin(source.facts)
            _warn_unless_finished(run, recipe, stage, source.facts)
        self.start_from(source.group("ema") or source.group("model"))

    def learn_from_run(self, run: Path) -> None:
        """Take the network of another run's last stage for the teacher that loss.teacher_weight asks for.

        Raises: CheckpointError if there is none; RecipeError if it does not serve this recipe's scale.
        """
        recipe = load_run(run)
        stage = last_stage(run, recipe)
        teacher, facts = load_network(run, recipe, stage)
        self.facts["teacher"] = _origin(facts)
        _warn_unless_finished(run, recipe, stage, facts)
        if not set(self.recipe.model.scales) <= set(teacher.scales):
            raise RecipeError(f"{run}: a teacher for {list(teacher.scales)}, not for {list(self.recipe.model.scales)}")
        for each in self.recipe.stages:
            if each.size % teacher.output_grid():
                raise RecipeError(
                    f"stage {each.name}: size {each.size} is not a multiple of {teacher.output_grid()}, "
                    f"which the teacher needs"
                )
        self.teacher = teacher.to(self.device).to(memory_format=torch.channels_last).requires_grad_(False)

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the run folder; False if there is none.

        Raises: CheckpointError if it is damaged, or was made with another recipe or other photographs.
        """
        folder = latest_checkpoint(self.out)
        if folder is None:
            return False
        checkpoint = load_checkpoint(folder)
        facts = checkpoint.facts
        changes = self._changes_since(facts)
        if changes:
            raise CheckpointError(
                f"{self.out} was made with another recipe or data ({'; '.join(changes)}); "
                "go on with the same, or start anew with another --out (and --init to keep the weights)"
            )
        for key in ("weights", "device", "samples", "processes", "precision"):
            if facts.get(key, self.facts[key]) != self.facts[key]:
                LOG.warning("%s: %s before, %s now; the run goes on, not bit for bit", key, facts[key], self.facts[key])
        if "init" in facts:
            self.facts["init"] = facts["init"]
            self.model.is_trained = True
        try:
            stage, phase, step = self._position_in(facts)
            self.position, self.done_steps = (stage, phase, step), facts["done_steps"]
            self.best, self.skipped = float(facts.get("best") or -math.inf), int(facts.get("skipped", 0))
            if step:
                self.prepare_optimizers(self.recipe.stages[stage].phases[phase])
            if self.adversary:
                self.adversary.has_turn = facts["critic_has_turn"]
            self.load_tensors(checkpoint.group)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as exc:
            raise CheckpointError(f"{folder}: damaged ({exc}); delete it to go on from the one before") from exc
        return True

    def _position_in(self, facts: dict[str, Any]) -> tuple[int, int, int]:
        """Read a checkpoint's position. Raises: KeyError, TypeError or ValueError if it is none of this recipe."""
        stage, phase, step = facts["position"]
        counts = (stage, phase, step, facts["done_steps"])
        stages = self.recipe.stages
        is_end = (stage, phase, step) == (len(stages), 0, 0)
        if any(type(count) is not int or count < 0 for count in counts) or not (
            is_end or (stage < len(stages) and phase < len(stages[stage].phases))
        ):
            raise ValueError(f"position {facts['position']} after {facts['done_steps']} steps")
        return stage, phase, step

    def _changes_since(self, facts: dict[str, Any]) -> list[str]:
        """List what differs from a checkpoint's facts and would make another run of it.

        Stages that have not begun may be changed: what is done does not depend on them.
        """
        changes = differences(_as_now(facts.get("recipe")), json.loads(json.dumps(self.facts["recipe"])))
        try:
            stage, phase, step = self._position_in(facts)
            coming = range(stage + bool(phase or step), len(self.recipe.stages))
        except (KeyError, TypeError, ValueError):  # damaged, or of a recipe with other stages
            coming = range(0)
        changes = [change for change in changes if not change.startswith(tuple(f"stages.{i}." for i in coming))]
        if facts.get("fingerprint") != self.facts["fingerprint"]:
            changes.append(f"photographs: those of {facts.get('data')!r} before, of {self.facts['data']!r} now")
        if facts.get("teacher") != self.facts.get("teacher"):
            changes.append("teacher: another run, or another stage of it")
        if (facts.get("weights") == RANDOM_WEIGHTS) != (self.facts["weights"] == RANDOM_WEIGHTS):
            changes.append(f"weights: {facts.get('weights')} before, {self.facts['weights']} now")
        return changes

    def begin(self) -> None:
        """Write the recipe and the facts into the run folder, and drop what was logged after the present step.

        Raises: ResourceError if the folder cannot be written; CheckpointError if several processes are not at one
        point, as on machines without a common folder.
        """
        place = (self.position, self.done_steps, self.facts["fingerprint"], self.facts["recipe"])
        if not self.processes.agree(place):
            raise CheckpointError(
                f"{self.out}: the processes have other checkpoints, photographs or recipes; "
                "all machines need the same folders"
            )
        if self.processes.is_first:
            write_run(self.out, self.recipe, self.facts)
            if not self.done_steps:
                forget_results(self.out)
            cut_log(self.out, self.done_steps)

    def save(self, name: str = "") -> None:
        """Write a resumable checkpoint, of the present step or by another name, and drop the oldest.

        Raises: DivergedError if a weight is not finite, so that the newest checkpoint is always a good one.
        """
        self._check_finite(self.model.state_dict())
        if not self.processes.is_first:
            return
        facts = self.facts | {"position": list(self.position), "done_steps": self.done_steps, "skipped": self.skipped}
        facts["best"] = self.best if math.isfinite(self.best) else None
        if self.adversary:
            facts["critic_has_turn"] = self.adversary.has_turn
        folder = self.out / "checkpoints" / (name or f"step-{self.done_steps:09d}")
        save_checkpoint(folder, Checkpoint({key: value.cpu() for key, value in self.tensors().items()}, facts))
        keep_latest(self.out, KEPT_CHECKPOINTS)

    # The work itself

    def phase_lengths(self) -> list[list[int]]:
        """Count the steps of every phase of every stage."""
        return [
            [phase_steps(self.recipe, stage, phase, len(self.train_set)) for phase in stage.phases]
            for stage in self.recipe.stages
        ]

    def train(
        self, *, report: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Run from the present position to the end.

        stop: asked before each step; when true, a checkpoint is saved and False is returned.
        At `max_steps` the stage's weights are written as well, as an incomplete stage, so that they can be exported.
        Whatever else ends it between two steps, a checkpoint is saved if that can be.
        Returns: True if the run is complete.
        Raises: DivergedError after ten non-finite losses in a row; ResourceError when memory or disk runs out, or a
        process that prepares samples is killed.
        """
        try:
            return self._train(report, stop)
        except Exception as exc:
            if self.optimizers and not self.is_in_step:
                with suppress(TrainError):  # the first error says why
                    self.save()
            if isinstance(exc, RuntimeError) and WORKER_ENDED.search(str(exc)):
                raise ResourceError(
                    f"a process that prepares samples was ended from outside, perhaps for want of memory ({exc}); "
                    "the same command goes on from the last checkpoint, --workers 0 does without"
                ) from exc
            raise

    def _train(self, report: Callable[[Progress], None], stop: Callable[[], bool]) -> bool:
        lengths = self.phase_lengths()
        all_steps = sum(sum(stage) for stage in lengths)
        while not self.finished:
            stage_index, phase_index, _ = self.position
            stage = self.recipe.stages[stage_index]
            total = lengths[stage_index][phase_index]
            if not self._train_phase(total, all_steps, report, stop):
                self.save()
                if self._at_max_steps() and any(self.position[1:]):
                    self._write_stage(stage, complete=False)
                return False
            self.optimizers.clear()
            if phase_index + 1 < len(stage.phases):
                self.position = (stage_index, phase_index + 1, 0)
            else:
                self._write_stage(stage, complete=True)
                self.position = (stage_index + 1, 0, 0)
            self.save()
        return True

    def _train_phase(
        self, total: int, all_steps: int, report: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> bool:
        stage_index, phase_index, first = self.position
        stage, config = self.recipe.stages[stage_index], self.recipe.optimizer
        phase = stage.phases[phase_index]
        if not self.optimizers:
            self.prepare_optimizers(phase)
        self.set_mode()
        settings = self.settings
        clock = Clock(panel_seconds=settings.panel_seconds, checkpoint_seconds=settings.checkpoint_seconds)
        steps = Steps(first, total, batch=stage.batch, rank=self.processes.rank, count=self.processes.count)
        source = self.samples(stage_index, phase_index, steps, stop=stop)
        share = 0.0

        def tell(step: int, *, looks: bool) -> None:
            means, speed = clock.take_means()
            validation = self.look() if looks else None
            clock.has_reported(looked=looks)
            progress = Progress(
                stage.name, phase.name, step, total, self.done_steps, all_steps,
                phase.learning_rate * share, means, speed, self.skipped, validation,
            )  # fmt: skip
            if self.processes.is_first:
                append_log(self.out, asdict(progress))
                if looks:
                    plots.write_loss_curve(read_log(self.out), self.out / "loss.png")
                report(progress)

        for step in range(first, total):
            is_last = step + 1 == total
            ends, reports, looks, saves = self.processes.decide(
                stop() or self._at_max_steps(),
                is_last or clock.wants_report(),
                is_last or clock.wants_panel(),
                clock.wants_checkpoint(),
            )
            if ends:
                source.close()
                if clock.has_news():
                    tell(step, looks=self._at_max_steps())
                return False
            try:
                lr, hr = next(source)
            except _Stopped:
                return False
            share, beta1 = schedule(step, total, config)
            if phase.kind == "adversarial":
                share, beta1 = 1.0, self.recipe.adversarial.beta1
            for group in self.parameter_groups():
                group["lr"], group["betas"] = group["highest_rate"] * share, (beta1, config.beta2)
            self.is_in_step = True
            terms = self.step(lr, hr, stage)
            self.position = (stage_index, phase_index, step + 1)
            self.done_steps += 1
            self.is_in_step = False
            clock.add(terms, stage.batch)
            if reports:
                tell(step + 1, looks=looks)
            if saves and not self.non_finite:
                self.save()
                clock.has_saved()
        return True

    def _at_max_steps(self) -> bool:
        return bool(self.settings.max_steps) and self.done_steps >= self.settings.max_steps

    def samples(
        self, stage_index: int, phase_index: int, steps: Steps, *, stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Give the batches of a phase: LR and HR, in a critic's phase saved results and HR.

        stop: asked between two results that are saved, which may take long. Raises: _Stopped when it is true.
        """
        stage = self.recipe.stages[stage_index]
        entropy = (self.recipe.seed, stage_index, phase_index)
        workers, pin = self.settings.workers, self.device.type == "cuda"
        if stage.phases[phase_index].kind == "critic":
            pairs = self._save_results(stage, (*entropy, self.done_steps - steps.first), stop)
            results = SavedResults(pairs, size=stage.size, entropy=entropy)
            yield from batches(results, steps, workers=workers, pin=pin)
            return
        scales, config = self.recipe.model.scales, self.recipe.degrade
        crops = CropPairs(self.train_set, stage=stage, config=config, scales=scales, entropy=entropy)
        if self.stored is not None:
            yield from device_batches(self.stored, crops, steps, workers=workers)
            return
        for lr, hr in batches(Made(crops.pixels), steps, workers=workers, pin=pin):
            yield to_floats(lr, self.device), to_floats(hr, self.device)

    def _save_results(
        self, stage: StageConfig, entropy: tuple[int, ...], stop: Callable[[], bool]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        scale = self.model.scales[0]
        told = -math.inf

        def progress(done: int, total: int) -> None:
            nonlocal told
            if self.processes.decide(stop())[0]:
                raise _Stopped
            if self.processes.is_first and time.monotonic() - told > NEWS_SECONDS:
                told = time.monotonic()
                LOG.info("results for the critic: %d of %d", done, total)

        self.model.eval()
        pairs = save_results(
            self.out, self.train_set, functools.partial(self._enlarge_picture, scale=scale),
            scale=scale, grid=self.model.output_grid(), size=stage.size, config=self.recipe.degrade,
            entropy=entropy, progress=progress, writes=self.processes.is_first,
        )  # fmt: skip
        self.set_mode()
        return pairs

    @torch.no_grad()
    def _enlarge_picture(self, lr: np.ndarray, *, scale: int) -> np.ndarray:
        return to_picture(self.enlarge(to_batch(lr, self.device), scale)[0])

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        wrong = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
        if wrong:
            raise self._diverged(f"the weights are not finite any more ({wrong[0]})")

    def _diverged(self, what: str) -> DivergedError:
        last = latest_checkpoint(self.out)
        return DivergedError(f"{what}; last good checkpoint: {last or 'none'}; lower the learning rate")

    def _write_stage(self, stage: StageConfig, *, complete: bool) -> None:
        """Write the stage's product: EMA weights, the form that `sr-export` reads."""
        self._check_finite(self.ema)
        if not self.processes.is_first:
            return
        facts = {"stage": stage.name, "steps": self.done_steps, "complete": complete, "validation": self.look()}
        tensors = {f"model.{key}": value.cpu() for key, value in self.ema.items()}
        save_checkpoint(stage_folder(self.out, stage.name), Checkpoint(tensors, self.facts | facts))

    def look(self) -> dict[str, float] | None:
        """Measure the EMA weights on the validation pictures, write a panel, and keep the best checkpoint.

        Returns: the metrics; None without validation pictures, or in a process that does not report.
        """
        if not len(self.validation_set) or not self.processes.is_first:
            return None
        if self.looked_at is not None and self.looked_at[0] == self.done_steps:
            return self.looked_at[1]
        with self.averaged() as model:
            found = validate(
                model, self.validation_set, loss=self.loss, config=self.recipe.degrade,
                seed=self.recipe.seed, device=self.device, autocast=self.autocast,
            )  # fmt: skip
        plots.write_panel(found.rows[:4], self.out / "panels" / f"{self.done_steps:08d}.png")
        if found.metrics["psnr_y"] > self.best and self.optimizers and not self.non_finite:
            self.best = found.metrics["psnr_y"]
            self.save(BEST)
        self.looked_at = self.done_steps, found.metrics
        return found.metrics


def _origin(facts: dict[str, Any]) -> dict[str, Any]:
    """Tell where weights come from, by the facts of a stage or a checkpoint."""
    origin = {key: facts.get(key) for key in ("command", "stage", "steps", "complete", "commit", "fingerprint")}
    return origin | {"steps": facts.get("steps", facts.get("done_steps"))}


def _warn_unless_finished(run: Path, recipe: Recipe, stage: str, facts: dict[str, Any]) -> None:
    if stage != recipe.stages[-1].name or not facts.get("complete", True):
        LOG.warning("%s is not finished: taking its stage %s as it stands", run, stage)


def _as_now(recipe: Any) -> Any:
    """Give a recipe that was written earlier the values that have come to recipes since."""
    try:
        return json.loads(json.dumps(asdict(recipe_from_dict(recipe))))
    except RecipeError:
        return recipe


def _git_commit() -> str | None:
    """Name the commit of this code, None where it is not a file of a repository, as when it is installed."""
    here = Path(__file__)
    answers = []
    for command in (["git", "ls-files", "--error-unmatch", here.name], ["git", "describe", "--always", "--dirty"]):
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=here.parent)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if result.returncode:
            return None
        answers.append(result.stdout.strip())
    return answers[-1]
