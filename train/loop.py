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
from .data import CropPairs, Photographs, batches, random_pair, read_photographs, split_validation
from .errors import CheckpointError, DivergedError, RecipeError, ResourceError
from .losses import CombinedLoss
from .models import build_model
from .optimizer import Muon
from .recipe import PhaseConfig, Recipe, StageConfig, recipe_from_dict
from .schedule import group_rates, one_cycle

LOG = logging.getLogger(__name__)
MAX_NON_FINITE = 10
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Settings:
    """How a run is done, as opposed to what is trained: nothing here may change the result on one device.

    precision: "auto" (bf16 where the device has it), "fp32" or "bf16".
    checkpoint_seconds, panel_seconds: at most that long between two of them.
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
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
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
        self.model = build_model(recipe.model, weights=weights).to(self.device, memory_format=torch.channels_last)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.loss = CombinedLoss(recipe.loss, weights=weights).to(self.device, memory_format=torch.channels_last)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.position = (0, 0, 0)  # stage, phase, step within the phase
        self.done_steps = 0
        self.non_finite = 0
        self.facts: dict[str, Any] = {
            "recipe": asdict(recipe),
            "weights": str(weights.name if isinstance(weights, Path) else weights or "torchvision"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "commit": _git_commit(),
        }

    def load_photographs(self, data: Path, progress: Callable[[int, int], None]) -> None:
        """Read the data folder and set the validation pictures aside."""
        largest = max(stage.size for stage in self.recipe.stages)
        photographs = read_photographs(data, smallest_side=largest, progress=progress)
        self.train_set, self.validation_set = split_validation(photographs, self.recipe.validation_pictures)
        self.facts["data"] = data.name
        self.facts["fingerprint"] = photographs.fingerprint()
        self.facts["pictures"] = len(self.train_set)

    # Position and checkpoints

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over trained weights before the first step.

        Raises: CheckpointError if they belong to another network.
        """
        try:
            self.reset(weights)
        except RuntimeError as exc:
            raise CheckpointError(f"the weights to start from do not fit this recipe's network: {exc}") from exc

    def reset(self, weights: dict[str, Tensor]) -> None:
        """Set the weights, their average to the same, and forget the optimisers."""
        self.model.load_state_dict(weights)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizers, self.done_steps, self.non_finite = [], 0, 0

    def resume(self) -> bool:
        """Continue from the newest checkpoint in the run folder; False if there is none."""
        folder = latest_checkpoint(self.out)
        if folder is None:
            return False
        checkpoint = load_checkpoint(folder)
        for key in ("recipe", "fingerprint"):
            if checkpoint.facts.get(key) != json.loads(json.dumps(self.facts[key])):
                raise CheckpointError(
                    f"{folder}: made with another {key}; use the one that made it, or another --out with --init"
                )
        self.model.load_state_dict(checkpoint.group("model"))
        self.ema = {key: value.to(self.device) for key, value in checkpoint.group("ema").items()}
        stage, phase, step = checkpoint.facts["position"]
        self.position = (stage, phase, step)
        self.done_steps = checkpoint.facts["done_steps"]
        if step:
            self.prepare_optimizers(self.recipe.stages[stage].phases[phase])
            self._load_optimizers(checkpoint.group("optimizer"))
        LOG.info("resumed at stage %s, phase %d, step %d", self.recipe.stages[stage].name, phase, step)
        return True

    def save(self) -> None:
        """Write a resumable checkpoint and drop the oldest."""
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
            if tensor.ndim:  # step counts stay on the CPU; the rest takes its parameter's device and memory format
                tensor = torch.empty_like(parameter).copy_(tensor)
            owners[id(parameter)].state[parameter][key] = tensor

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
        for module, rate in zip(modules, rates):
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
        Returns: True if the run is complete.
        Raises: DivergedError after ten non-finite losses in a row; ResourceError when memory or disk runs out.
        """
        lengths = [
            [phase_steps(self.recipe, stage, phase, len(self.train_set)) for phase in stage.phases]
            for stage in self.recipe.stages
        ]
        all_steps = sum(sum(stage) for stage in lengths)
        while self.position[0] < len(self.recipe.stages):
            stage_index, phase_index, _ = self.position
            stage = self.recipe.stages[stage_index]
            total = lengths[stage_index][phase_index]
            if not self._train_phase(total, all_steps, report, stop):
                self.save()
                return False
            self.optimizers = []
            if phase_index + 1 < len(stage.phases):
                self.position = (stage_index, phase_index + 1, 0)
            else:
                self._finish_stage(stage)
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
        dataset = CropPairs(
            self.train_set,
            stage=stage,
            config=self.recipe.degrade,
            scales=self.recipe.model.scales,
            entropy=(self.recipe.seed, stage_index, phase_index),
        )
        self.model.train()
        clock = _Clock(self.settings)
        source = batches(
            dataset, batch=stage.batch, first_step=first, last_step=total, workers=self.settings.workers
        )
        for step, (lr, hr) in zip(range(first, total), source):
            if stop() or (self.settings.max_steps and self.done_steps >= self.settings.max_steps):
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
                self._log(progress)
                report(progress)
            if clock.wants_checkpoint():
                self.save()
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the groups of all optimisers, to set their rates."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr: Tensor, hr: Tensor, stage: StageConfig) -> dict[str, Tensor]:
        """Take one optimiser step and return the weighted loss terms; a non-finite loss is skipped and counted."""
        scale = hr.shape[-1] // lr.shape[-1]
        try:
            lr = lr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            hr = hr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                sr = self.model(lr, scale).float()
                loss, terms = self.loss(sr, hr)
            if not torch.isfinite(loss):
                self.non_finite += 1
                LOG.warning("step %d: the loss is %s, skipped", self.done_steps, loss.item())
                if self.non_finite >= MAX_NON_FINITE:
                    last = latest_checkpoint(self.out)
                    raise DivergedError(
                        f"the loss was not finite for {MAX_NON_FINITE} steps in a row; "
                        f"last good checkpoint: {last or 'none'}; lower the learning rate"
                    )
                return {}
            self.non_finite = 0
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            if self.recipe.optimizer.gradient_clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.gradient_clip)
            for optimizer in self.optimizers:
                optimizer.step()
        except (torch.OutOfMemoryError, RuntimeError) as exc:
            if isinstance(exc, torch.OutOfMemoryError) or "can't allocate memory" in str(exc):
                raise ResourceError(
                    f"out of memory with batch {stage.batch} at size {stage.size} (stage {stage.name}); "
                    f"try --set stages.N.batch={max(1, stage.batch // 2)}"
                ) from exc
            raise
        self._update_ema()
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The ramp lets the average forget the untrained start.
        decay = min(self.recipe.optimizer.ema_decay, (1 + self.done_steps) / (10 + self.done_steps))
        state = self.model.state_dict()
        floating = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[key] for key in floating], [state[key] for key in floating], 1 - decay)
        for key in state.keys() - set(floating):
            self.ema[key].copy_(state[key])

    def _finish_stage(self, stage: StageConfig) -> None:
        """Write the stage's product: EMA weights, the form that `sr-export` reads."""
        psnr_y = self.validate()
        facts = self.facts | {"stage": stage.name, "steps": self.done_steps, "validation_psnr_y": psnr_y}
        tensors = {f"model.{key}": value.cpu() for key, value in self.ema.items()}
        save_checkpoint(stage_folder(self.out, stage.name), Checkpoint(tensors, facts))

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
        plots.write_loss_curve(self.out / "log.jsonl", self.out / "loss.png")
        return float(np.mean(psnrs))

    def _smallest_validation_side(self) -> int:
        grid = max(32, *(self.model.stride(scale) * scale for scale in self.recipe.model.scales))
        return min(min(picture.shape[:2]) for picture in self.validation_set.pictures) // grid * grid

    def _log(self, progress: Progress) -> None:
        try:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(progress)) + "\n")
        except OSError as exc:
            raise ResourceError(f"{self.out}: the log could not be written ({exc})") from exc


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


def load_run(run: Path) -> Recipe:
    """Read the effective recipe of a run folder.

    Raises: CheckpointError if the folder is not a run.
    """
    try:
        return recipe_from_dict(json.loads((run / "recipe.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecipeError) as exc:
        raise CheckpointError(f"{run}: not a run of sr-train ({exc})") from exc


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Write the effective recipe into the run folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise ResourceError(f"{out}: the run folder cannot be written ({exc})") from exc


def _git_commit() -> str | None:
    """Name the commit of the working directory, None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
