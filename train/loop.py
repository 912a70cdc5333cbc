"""Train a recipe: stages x phases, one optimiser step at a time, resumable at any step."""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import plots
from .checkpoint import Checkpoint, keep_latest, latest_checkpoint, load_checkpoint, save_checkpoint, stage_folder
from .data import CropPairs, batches, random_pair, read_photographs, split_validation
from .errors import CheckpointError, DivergedError, RecipeError, ResourceError
from .losses import CombinedLoss
from .models import Network, build_model
from .optimizer import Muon
from .recipe import PhaseConfig, Recipe, StageConfig, differences
from .run_folder import append_log, cut_log, load_run, read_log, write_run
from .schedule import group_rates, one_cycle

LOG = logging.getLogger(__name__)
MAX_NON_FINITE = 10
KEPT_CHECKPOINTS = 2


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
    """One line of news for the person who waits."""

    stage: str
    phase: str
    step: int
    steps: int
    done_steps: int
    all_steps: int
    learning_rate: float
    terms: dict[str, float]
    images_per_second: float
    psnr_y: float | None


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda:N" into a device; a device asked for by name is used or refused."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ResourceError(f"--device {name}: expected auto, cpu or cuda:N") from exc
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"--device {name}: expected auto, cpu or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu or auto"
        )
    return device


def choose_autocast(precision: str, device: torch.device) -> bool:
    """Tell whether the forward pass runs in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))


def phase_steps(recipe: Recipe, stage: StageConfig, phase: PhaseConfig, pictures: int) -> int:
    """Count the optimiser steps of a phase: its epochs over its batches."""
    samples = recipe.samples_per_epoch or pictures
    return max(1, math.ceil(phase.epochs * samples / stage.batch))


class Trainer:
    """One run: its networks, its position, and the folder it writes to."""

    def __init__(self, recipe: Recipe, out: Path, *, weights: Path | str | None, settings: Settings):
        self.recipe, self.out, self.settings = recipe, out, settings
        self.device = choose_device(settings.device)
        self.autocast = choose_autocast(settings.precision, self.device)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, weights=weights).to(self.device).to(memory_format=torch.channels_last)
        _check_sizes(recipe, self.model)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.loss = CombinedLoss(recipe.loss, weights=weights).to(self.device).to(memory_format=torch.channels_last)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.position = (0, 0, 0)  # stage, phase, step within the phase
        self.done_steps = 0
        self.non_finite = 0
        self.facts: dict[str, Any] = {
            "recipe": asdict(recipe),
            "weights": weights.resolve().name if isinstance(weights, Path) else weights or "torchvision",
            "device": self.device.type,
            "precision": "bf16" if self.autocast else "fp32",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "commit": _git_commit(),
        }

    def load_photographs(self, data: Path, progress: Callable[[int, int], None]) -> None:
        """Read the data folder and set the validation pictures aside."""
        largest = max(stage.size for stage in self.recipe.stages)
        photographs = read_photographs(data, smallest_side=largest, progress=progress)
        self.train_set, self.validation_set = split_validation(photographs, self.recipe.validation_pictures)
        self.facts["data"] = data.resolve().name
        self.facts["fingerprint"] = photographs.fingerprint()
        self.facts["pictures"] = len(self.train_set)

    # Position and checkpoints

    @property
    def finished(self) -> bool:
        """Tell whether every stage of the recipe is trained."""
        return self.position[0] == len(self.recipe.stages)

    def start_from_run(self, run: Path) -> None:
        """Take over the weights of the last stage that another run has written, before the first step.

        Raises: CheckpointError if there are none or they belong to another network.
        """
        names = [stage.name for stage in load_run(run).stages]
        written = [name for name in names if stage_folder(run, name).exists()]
        if not written:
            raise CheckpointError(f"{run}: no stage of this run is finished, so there are no weights to start from")
        source = load_checkpoint(stage_folder(run, written[-1]))
        self.start_from(source.group("model"))
        kept = ("command", "stage", "steps", "complete", "commit", "fingerprint")
        self.facts["init"] = {key: source.facts.get(key) for key in kept}
        if written[-1] != names[-1] or not source.facts.get("complete", True):
            LOG.warning("%s is not finished: starting from its stage %s as it stands", run, written[-1])

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over trained weights before the first step; a network that can grow takes those of a smaller one.

        Raises: CheckpointError if they belong to another network.
        """
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in weights.items()}
        wrong = sorted(key for key in shapes.keys() | given.keys() if shapes.get(key) != given.get(key))
        if wrong and (grown := self.model.grow(weights)):
            LOG.warning("the weights of a smaller network are widened: %d of %d tensors", len(wrong), len(shapes))
            weights = grown
        elif wrong:
            raise CheckpointError(
                f"the weights to start from do not fit this recipe's network ({self.recipe.model.name}): "
                f"{len(wrong)} of {len(shapes)} tensors differ, the first is {wrong[0]}"
            )
        self.reset(weights)

    def reset(self, weights: dict[str, Tensor]) -> None:
        """Set the weights, their average to the same, and forget the optimisers, gradients and counts."""
        self.model.load_state_dict(weights)
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(True)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizers, self.done_steps, self.non_finite = [], 0, 0

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the run folder; False if there is none.

        Raises: CheckpointError if it is damaged, or was made with another recipe or other photographs.
        """
        folder = latest_checkpoint(self.out)
        if folder is None:
            return False
        checkpoint = load_checkpoint(folder)
        facts = checkpoint.facts
        changes = differences(facts.get("recipe"), json.loads(json.dumps(self.facts["recipe"])))
        if facts.get("fingerprint") != self.facts["fingerprint"]:
            changes.append(f"photographs: those of {facts.get('data')!r} before, of {self.facts['data']!r} now")
        if changes:
            raise CheckpointError(
                f"{self.out} was made with another recipe or data ({'; '.join(changes)}); "
                "go on with the same, or start anew with another --out (and --init to keep the weights)"
            )
        for key in ("weights", "device", "precision"):
            if facts.get(key, self.facts[key]) != self.facts[key]:
                LOG.warning("%s: %s before, %s now; the run goes on, not bit for bit", key, facts[key], self.facts[key])
        if "init" in facts:
            self.facts["init"] = facts["init"]
        try:
            stage, phase, step = facts["position"]
            self.position, self.done_steps = (stage, phase, step), facts["done_steps"]
            self.model.load_state_dict(checkpoint.group("model"))
            for key, value in checkpoint.group("ema").items():
                self.ema[key].copy_(value)  # keeps the memory format, on which the last bit may depend
            if step:
                self.prepare_optimizers(self.recipe.stages[stage].phases[phase])
                self._load_optimizers(checkpoint.group("optimizer"))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as exc:
            raise CheckpointError(f"{folder}: damaged ({exc}); delete it to go on from the one before") from exc
        return True

    def begin(self) -> None:
        """Write the recipe and the facts into the run folder, and drop what was logged after the present step.

        Raises: ResourceError if the folder cannot be written.
        """
        write_run(self.out, self.recipe, self.facts)
        cut_log(self.out, self.done_steps)

    def save(self) -> None:
        """Write a resumable checkpoint and drop the oldest.

        Raises: DivergedError if a weight is not finite, so that the newest checkpoint is always a good one.
        """
        self._check_finite(self.model.state_dict())
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"ema.{key}": value for key, value in self.ema.items()}
        tensors |= self._optimizer_tensors()
        facts = self.facts | {"position": list(self.position), "done_steps": self.done_steps}
        folder = self.out / "checkpoints" / f"step-{self.done_steps:09d}"
        save_checkpoint(folder, Checkpoint({key: value.cpu() for key, value in tensors.items()}, facts))
        keep_latest(self.out, KEPT_CHECKPOINTS)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"optimizer.{names[id(parameter)]}.{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def _load_optimizers(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        owners = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = parameters[parameter_name]
            # Device and memory format of the parameter, as a fresh optimiser makes them; step counts have no format.
            like = torch.empty_like(parameter) if tensor.ndim else torch.empty_like(tensor, device=parameter.device)
            owners[id(parameter)].state[parameter][key] = like.copy_(tensor)

    def prepare_optimizers(self, phase: PhaseConfig) -> None:
        """Freeze what the phase freezes, and make its optimisers with fresh state."""
        frozen = {id(p) for p in self.model.freezable_parameters()} if phase.freeze_encoder else set()
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
        config = self.recipe.optimizer
        hidden = {id(p) for p in self.model.hidden_weights()} if config.muon_rate else set()
        modules = self.model.layer_groups()
        rates = group_rates(phase.encoder_learning_rate, phase.learning_rate, len(modules))
        adam: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for module, rate in zip(modules, rates, strict=True):
            trained = [p for p in module.parameters() if p.requires_grad]
            adam.append({"params": [p for p in trained if id(p) not in hidden], "highest_rate": rate})
            muon.append({"params": [p for p in trained if id(p) in hidden], "highest_rate": rate * config.muon_rate})
        betas = (config.beta1_high, config.beta2)
        self.optimizers = [torch.optim.AdamW(adam, betas=betas, weight_decay=config.weight_decay, fused=True)]
        if hidden:
            self.optimizers.append(Muon(muon, betas=betas, weight_decay=config.weight_decay))

    # The work itself

    def train(
        self, *, report: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Run from the present position to the end.

        stop: asked before each step; when true, a checkpoint is saved and False is returned.
        At `max_steps` the stage's weights are written as well, as an incomplete stage, so that they can be exported.
        Returns: True if the run is complete.
        Raises: DivergedError after ten non-finite losses in a row; ResourceError when memory or disk runs out.
        """
        lengths = [
            [phase_steps(self.recipe, stage, phase, len(self.train_set)) for phase in stage.phases]
            for stage in self.recipe.stages
        ]
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
            self.optimizers = []
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
        self.model.train()
        clock = _Clock(self.settings)
        crops = self.crops(stage_index, phase_index)
        source = batches(crops, batch=stage.batch, first_step=first, last_step=total, workers=self.settings.workers)
        for step, (lr, hr) in zip(range(first, total), source, strict=True):
            if stop() or self._at_max_steps():
                return False
            share, beta1 = one_cycle(step, total, config)
            for group in self.parameter_groups():
                group["lr"], group["betas"] = group["highest_rate"] * share, (beta1, config.beta2)
            terms = self.step(lr, hr, stage)
            self.position = (stage_index, phase_index, step + 1)
            self.done_steps += 1
            clock.add(terms, stage.batch)
            if clock.wants_report(last=step + 1 == total):
                means, speed = clock.take_means()
                psnr_y = self.validate() if clock.wants_panel(last=step + 1 == total) else None
                progress = Progress(
                    stage.name, phase.name, step + 1, total, self.done_steps, all_steps,
                    phase.learning_rate * share, means, speed, psnr_y,
                )  # fmt: skip
                append_log(self.out, asdict(progress))
                report(progress)
            if not self.non_finite and clock.wants_checkpoint():
                self.save()
        return True

    def _at_max_steps(self) -> bool:
        return bool(self.settings.max_steps) and self.done_steps >= self.settings.max_steps

    def crops(self, stage_index: int, phase_index: int) -> CropPairs:
        """Give the samples of a phase."""
        return CropPairs(
            self.train_set,
            stage=self.recipe.stages[stage_index],
            config=self.recipe.degrade,
            scales=self.recipe.model.scales,
            entropy=(self.recipe.seed, stage_index, phase_index),
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the groups of all optimisers, to set their rates."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr: Tensor, hr: Tensor, stage: StageConfig) -> dict[str, Tensor]:
        """Take one optimiser step and return the weighted loss terms.

        A step whose loss or gradient is not finite is skipped and counted, and returns nothing.
        Raises: DivergedError at the tenth of them in a row; ResourceError when memory runs out.
        """
        scale = hr.shape[-1] // lr.shape[-1]
        try:
            lr = lr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            hr = hr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                sr = self.model(lr, scale).float()
                loss, terms = self.loss(sr, hr)
            if not torch.isfinite(loss):
                self._skip("loss", loss)
                return {}
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            # Without a limit this only measures: the factor it multiplies with is then exactly 1.
            limit = self.recipe.optimizer.gradient_clip or math.inf
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            if not torch.isfinite(norm):
                self._skip("gradient", norm)
                return {}
            self.non_finite = 0
            for optimizer in self.optimizers:
                optimizer.step()
        except (torch.OutOfMemoryError, RuntimeError) as exc:
            if isinstance(exc, torch.OutOfMemoryError) or "can't allocate memory" in str(exc):
                raise ResourceError(
                    f"out of memory with batch {stage.batch} at size {stage.size} (stage {stage.name}); "
                    f"try --set stages.{self.recipe.stages.index(stage)}.batch={max(1, stage.batch // 2)}"
                ) from exc
            raise
        self._update_ema()
        return {name: term.detach() for name, term in terms.items()}

    def _skip(self, what: str, value: Tensor) -> None:
        self.non_finite += 1
        LOG.warning("step %d: the %s is %s, skipped", self.done_steps, what, value.item())
        for name, buffer in self.model.named_buffers():  # BatchNorm has taken the step in already
            if name in self.ema and buffer.is_floating_point():
                buffer.copy_(self.ema[name])
        if self.non_finite >= MAX_NON_FINITE:
            raise self._diverged(f"the loss or its gradient was not finite for {MAX_NON_FINITE} steps in a row")

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        wrong = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
        if wrong:
            raise self._diverged(f"the weights are not finite any more ({wrong[0]})")

    def _diverged(self, what: str) -> DivergedError:
        last = latest_checkpoint(self.out)
        return DivergedError(f"{what}; last good checkpoint: {last or 'none'}; lower the learning rate")

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The ramp lets the average forget the untrained start.
        decay = min(self.recipe.optimizer.ema_decay, (1 + self.done_steps) / (10 + self.done_steps))
        state = self.model.state_dict()
        floating = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[key] for key in floating], [state[key] for key in floating], 1 - decay)
        for key in state.keys() - set(floating):
            self.ema[key].copy_(state[key])

    def _write_stage(self, stage: StageConfig, *, complete: bool) -> None:
        """Write the stage's product: EMA weights, the form that `sr-export` reads."""
        self._check_finite(self.ema)
        facts = {"stage": stage.name, "steps": self.done_steps, "complete": complete}
        facts |= {"validation_psnr_y": self.validate()}
        tensors = {f"model.{key}": value.cpu() for key, value in self.ema.items()}
        save_checkpoint(stage_folder(self.out, stage.name), Checkpoint(tensors, self.facts | facts))

    # Looking at it

    @torch.no_grad()
    def validate(self) -> float | None:
        """Measure PSNR-Y of the EMA weights on the validation pictures and write a panel; None without any."""
        if not len(self.validation_set):
            return None
        scale, size = self.recipe.model.scales[0], min(256, self._smallest_validation_side())
        raw = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        psnrs, rows = [], []
        for index, picture in enumerate(self.validation_set.pictures):
            rng = np.random.default_rng((self.recipe.seed, index))
            lr, hr = random_pair(picture, size=size, scale=scale, config=self.recipe.degrade, rng=rng)
            tensor = torch.from_numpy(lr).permute(2, 0, 1)[None].to(self.device).float() / 255
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.model(tensor, scale).float()
            sr = (output[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            psnrs.append(psnr_y(sr, hr, shave=max(scale, 1)))
            rows.append((lr, sr, hr))
        self.model.load_state_dict(raw)
        self.model.train()
        plots.write_panel(rows[:4], self.out / "panels" / f"{self.done_steps:08d}.png")
        plots.write_loss_curve(read_log(self.out), self.out / "loss.png")
        return float(np.mean(psnrs))

    def _smallest_validation_side(self) -> int:
        grid = max(self.model.stride(scale) * scale for scale in self.recipe.model.scales)
        return min(min(picture.shape[:2]) for picture in self.validation_set.pictures) // grid * grid


class _Clock:
    """Decides when to report, look and save; keeps running means between reports."""

    def __init__(self, settings: Settings):
        self.settings = settings
        now = time.monotonic()
        self.started = self.last_checkpoint = now
        self.last_panel = -math.inf
        self.sums: dict[str, Tensor] = {}
        self.steps = self.images = self.reports = 0

    def add(self, terms: dict[str, Tensor], images: int) -> None:
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(term)) + term
        self.steps += bool(terms)
        self.images += images

    def wants_report(self, *, last: bool) -> bool:
        # The first step tells at once that something happens; then every two seconds.
        return last or self.reports == 0 or time.monotonic() - self.started > 2

    def take_means(self) -> tuple[dict[str, float], float]:
        now = time.monotonic()
        means = {name: float(value) / max(1, self.steps) for name, value in self.sums.items()}
        speed = self.images / max(1e-9, now - self.started)
        self.sums, self.steps, self.images, self.started = {}, 0, 0, now
        self.reports += 1
        return means, speed

    def wants_panel(self, *, last: bool) -> bool:
        if last or time.monotonic() - self.last_panel > self.settings.panel_seconds:
            self.last_panel = time.monotonic()
            return True
        return False

    def wants_checkpoint(self) -> bool:
        if time.monotonic() - self.last_checkpoint > self.settings.checkpoint_seconds:
            self.last_checkpoint = time.monotonic()
            return True
        return False


def psnr_y(sr: np.ndarray, hr: np.ndarray, *, shave: int) -> float:
    """PSNR in dB on BT.601 limited-range luma, `shave` pixels cut off each side; (H, W, 3) uint8 both."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    difference = ((sr.astype(np.float64) - hr) @ weights)[shave:-shave, shave:-shave]
    return float(10 * np.log10(255**2 / max(np.mean(difference**2), 1e-12)))


def _check_sizes(recipe: Recipe, model: Network) -> None:
    for stage in recipe.stages:
        for scale in recipe.model.scales:
            grid = model.stride(scale) * scale
            if stage.size % grid:
                raise RecipeError(f"stage {stage.name!r}: size {stage.size} is not a multiple of {grid}, the network's")


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
