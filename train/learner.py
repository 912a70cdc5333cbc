"""The networks of a run, and one step of their optimisers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adversary import Adversary
from .compiling import choose_forward
from .devices import choose_autocast, choose_device, join_processes
from .errors import CheckpointError, DivergedError, RecipeError, ResourceError
from .losses import CombinedLoss, charbonnier
from .models import Network, build_model
from .optimizer import load_states, make_optimizers, states_by_name
from .recipe import PhaseConfig, Recipe, StageConfig

LOG = logging.getLogger(__name__)
MAX_NON_FINITE = 10
MEMORY_ERRORS = ("can't allocate memory", "could not create a primitive")  # of PyTorch, of oneDNN on CPUs


class Learner:
    """A network, its average, what judges it, and the optimisers of the present phase.

    fixed: names of parameters that no phase trains. ema: the average of the weights, a run's product.
    non_finite, skipped: steps whose loss or gradient was not finite, in a row and in all.
    """

    def __init__(self, recipe: Recipe, *, weights: Path | str | None, device: str, precision: str):
        self.recipe = recipe
        self.device = choose_device(device)
        self.autocast = choose_autocast(precision, self.device)
        self.processes = join_processes(self.device)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, weights=weights).to(self.device).to(memory_format=torch.channels_last)
        self.model = self.processes.share_batch_norm(self.model, self.device)
        self.fixed = frozenset(name for name, p in self.model.named_parameters() if not p.requires_grad)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.loss = CombinedLoss(recipe.loss, weights=weights).to(self.device).to(memory_format=torch.channels_last)
        self.teacher: Network | None = None
        self.adversary: Adversary | None = None
        if recipe.adversarial.critic:
            self.adversary = Adversary(recipe.adversarial, self.device, weights=weights)
            self.adversary.critic = self.processes.share_batch_norm(self.adversary.critic, self.device)
        self.phase = recipe.stages[0].phases[0]
        self.optimizers: list[torch.optim.Optimizer] = []
        self.forward: Callable[[Tensor, int], Tensor] = self.model  # in a phase on a GPU compiled
        self.done_steps = 0
        self.non_finite = self.skipped = 0

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over trained weights before the first step; a network that can grow takes those of a smaller one.

        Raises: CheckpointError if they belong to another network.
        """
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        given = {key: tuple(value.shape) for key, value in weights.items()}
        wrong = sorted(key for key in shapes.keys() | given.keys() if shapes.get(key) != given.get(key))
        if wrong and (grown := self.model.grow(weights)):
            LOG.warning(
                "the weights are of a smaller network or another scale: %d of %d tensors fitted",
                len(wrong),
                len(shapes),
            )
            weights = grown
        elif wrong:
            raise CheckpointError(
                f"the weights to start from do not fit this recipe's network ({self.recipe.model.name}): "
                f"{len(wrong)} of {len(shapes)} tensors differ, the first is {wrong[0]}"
            )
        self.model.is_trained = True
        self.reset(weights)

    def reset(self, weights: dict[str, Tensor]) -> None:
        """Set the weights, their average to the same, and forget the optimisers, gradients and counts."""
        self.model.load_state_dict(weights)
        self.model.zero_grad(set_to_none=True)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.fixed)
        self.ema = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.optimizers, self.done_steps, self.non_finite, self.skipped = [], 0, 0, 0

    def tensors(self) -> dict[str, Tensor]:
        """Give everything that a checkpoint must hold to go on from here, by name."""
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        found |= {f"ema.{key}": value for key, value in self.ema.items()}
        if self.adversary:
            found |= {f"critic.{key}": value for key, value in self.adversary.critic.state_dict().items()}
        for prefix, network in self._optimised().items():
            states = states_by_name(network, self.optimizers)
            found |= {f"{prefix}.{key}": value for key, value in states.items()}
        return found

    def load_tensors(self, groups: Callable[[str], dict[str, Tensor]]) -> None:
        """Take over what `tensors` gave; the optimisers of a phase that has begun must be prepared.

        Raises: KeyError, ValueError or RuntimeError for tensors that are missing, or not of this network.
        """
        self.model.load_state_dict(groups("model"))
        ema = groups("ema")
        if {key: value.shape for key, value in ema.items()} != {key: value.shape for key, value in self.ema.items()}:
            raise ValueError("the averaged weights are not those of this network")
        for key, value in ema.items():
            self.ema[key].copy_(value)  # keeps the memory format, on which the last bit may depend
        if self.adversary:
            self.adversary.critic.load_state_dict(groups("critic"))
        for prefix, network in self._optimised().items():
            load_states(network, self.optimizers, groups(prefix))

    def _optimised(self) -> dict[str, nn.Module]:
        """Give the networks whose optimisers' state is kept, by their prefix in a checkpoint."""
        networks: dict[str, nn.Module] = {"optimizer": self.model}
        return networks | ({"critic_optimizer": self.adversary.critic} if self.adversary else {})

    def prepare_optimizers(self, phase: PhaseConfig) -> None:
        """Freeze what the phase freezes, and make its optimisers with fresh state."""
        self.phase = phase
        frozen = {id(p) for p in self.model.freezable_parameters()} if phase.freeze_encoder else set()
        if phase.grown_only:
            grown = {id(p) for p in self.model.grown_parameters()}
            if not grown:
                raise RecipeError(f"phase {phase.name!r}: {self.recipe.model.name} has no grown layers to train alone")
            frozen = {id(p) for p in self.model.parameters()} - grown
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(id(parameter) not in frozen and name not in self.fixed)
        self.set_mode()
        config = self.recipe.optimizer
        self.forward = choose_forward(self.model, self.device)
        self.optimizers = [] if phase.kind == "critic" else make_optimizers(self.model, config, phase)
        if phase.kind != "generator":
            assert self.adversary is not None, "the recipe was checked"
            rate = phase.learning_rate * self.recipe.adversarial.rate
            self.optimizers += make_optimizers(self.adversary.critic, config, replace(phase, learning_rate=rate))

    def set_mode(self) -> None:
        """Put the network into train mode; where grown layers are trained alone, no statistics of others move."""
        self.model.train()
        if self.phase.grown_only:
            trained = {id(parameter) for parameter in self.model.grown_parameters()}
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(any(id(parameter) in trained for parameter in module.parameters()))

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Give the network with its averaged weights, in eval mode."""
        raw = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(raw)
            self.set_mode()

    def enlarge(self, lr: Tensor, scale: int) -> Tensor:
        """Run the network in the run's precision: (N, 3, h, w) float in [0, 1] to (N, 3, h*scale, w*scale) float32.

        As PyTorch has it, since pictures come in many sizes.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(lr, scale).float()

    def enlarge_batch(self, lr: Tensor, scale: int) -> Tensor:
        """Do what `enlarge` does with a batch of a phase, all of one size: compiled on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.forward(lr, scale).float()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the groups of all optimisers, to set their rates."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr: Tensor, hr: Tensor, stage: StageConfig) -> dict[str, Tensor]:
        """Take one optimiser step and return the weighted loss terms.

        lr: (N, 3, h, w) float32 in [0, 1]; in a critic's phase results of HR's size. hr: (N, 3, H, W).
        A step whose loss or gradient is not finite is skipped and counted, and returns nothing.
        Raises: DivergedError at the tenth of them in a row; ResourceError when memory runs out.
        """
        # Of dropout and of sampling: the same at this step of every run, whatever was run before it.
        torch.manual_seed(hash((self.recipe.seed, self.done_steps, self.processes.rank)))
        lr = lr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        hr = hr.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        try:
            terms = self._descend(*self.losses(lr, hr))  # no name here holds what a failed step has made
        except RuntimeError as exc:
            if not _is_memory_error(exc):
                raise
            terms = None
        if terms is None:  # the exception, which holds all that the failed step has made, is gone by now
            raise self._out_of_memory(lr, hr, stage)
        if terms and self.phase.kind != "critic" and "critic" not in terms:
            self._update_ema()
        if terms and self.adversary and self.phase.kind == "adversarial":
            self.adversary.take_turns(terms)
        return terms

    def losses(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the loss of the network that learns in this step, and its terms."""
        if self.phase.kind == "critic":
            return self._judge(lr, hr)
        scale = hr.shape[-1] // lr.shape[-1]
        if self.phase.kind == "adversarial" and self.adversary and self.adversary.has_turn:
            with torch.no_grad():
                sr = self.enlarge_batch(lr, scale)
            return self._judge(sr, hr)
        sr = self.enlarge_batch(lr, scale)
        loss, terms = self.loss(sr, hr)
        for name, term in self.model.extra_terms().items():
            loss, terms = loss + term, terms | {name: term}
        if self.teacher is not None:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                taught = self.teacher(lr, scale).float()
            term = self.recipe.loss.teacher_weight * charbonnier(sr, taught)
            loss, terms = loss + term, terms | {"teacher": term}
        if self.phase.kind == "adversarial":
            assert self.adversary is not None, "the recipe was checked"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss, terms = self.adversary.persuade(sr, loss, terms)
        return loss, terms

    def _judge(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.adversary is not None, "the recipe was checked"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.adversary.judge(sr, hr)

    def _descend(self, loss: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a step of what the loss has a gradient for, with its mean over all processes."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        told = {name: term.detach().clone() for name, term in terms.items()}
        loss = loss.detach().clone()
        parameters = [p for group in self.parameter_groups() for p in group["params"] if p.grad is not None]
        self.processes.average([loss, *told.values(), *(p.grad for p in parameters if p.grad is not None)])
        # Without a limit this only measures: the factor it multiplies with is then exactly 1.
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.gradient_clip or math.inf)
        for what, value in (("loss", loss), ("gradient", norm)):
            if not torch.isfinite(value):
                self._skip(what, value)
                return {}
        self.non_finite = 0
        for optimizer in self.optimizers:
            optimizer.step()  # which leaves alone what has no gradient
        return told

    def _out_of_memory(self, lr: Tensor, hr: Tensor, stage: StageConfig) -> ResourceError:
        """Try smaller batches after memory ran out, and say which one fits."""
        count = len(lr) // 2
        while count and not self._fits(lr[:count], hr[:count]):
            count //= 2
        fitting = count * self.processes.count
        advice = f"{fitting} would fit" if fitting else "not even one picture fits: take a smaller stage size"
        return ResourceError(
            f"out of memory with batch {stage.batch} at size {stage.size} (stage {stage.name}); {advice}: "
            f"--set stages.{self.recipe.stages.index(stage)}.batch={max(1, fitting)}"
        )

    def _fits(self, lr: Tensor, hr: Tensor) -> bool:
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.losses(lr, hr)[0].backward()
        except RuntimeError as exc:
            if not _is_memory_error(exc):
                raise
            return False
        return True

    def _skip(self, what: str, value: Tensor) -> None:
        self.non_finite += 1
        self.skipped += 1
        LOG.warning("step %d: the %s is %s, skipped", self.done_steps, what, value.item())
        for name, buffer in self.model.named_buffers():  # BatchNorm has taken the step in already
            if name in self.ema and buffer.is_floating_point():
                buffer.copy_(self.ema[name])
        if self.non_finite >= MAX_NON_FINITE:
            raise self._diverged(f"the loss or its gradient was not finite for {MAX_NON_FINITE} steps in a row")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(f"{what}; lower the learning rate")

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The ramp lets the average forget the untrained start.
        decay = min(self.recipe.optimizer.ema_decay, (1 + self.done_steps) / (10 + self.done_steps))
        state = self.model.state_dict()
        floating = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[key] for key in floating], [state[key] for key in floating], 1 - decay)
        for key in state.keys() - set(floating):
            self.ema[key].copy_(state[key])


def _is_memory_error(exc: RuntimeError) -> bool:
    return isinstance(exc, torch.OutOfMemoryError) or any(text in str(exc) for text in MEMORY_ERRORS)
