"""A critic beside the network: trained on saved results first, then in turns with the network (SEEDS C and D)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .atomic import read_json, replacing, write_json
from .data import Photographs, to_tensor
from .errors import ResourceError
from .models.critics import build_critic
from .recipe import AdversarialConfig, DegradeConfig

FAKES = "fakes"
FACTS = "fakes.json"
FAKE_SIDE = 512  # a photograph gives one result of at most that size


class Adversary:
    """A critic, and whose turn it is."""

    def __init__(self, config: AdversarialConfig, device: torch.device, *, weights: Path | str | None = None):
        self.config = config
        critic = build_critic(config.critic, config.options, weights=weights)
        self.critic = critic.to(device).to(memory_format=torch.channels_last)
        self.has_turn = True

    def judge(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the critic's loss: binary cross-entropy on results, which are 0, and photographs, which are 1.

        sr, hr: (N, 3, H, W) float in [0, 1].
        """
        false, true = self.critic(sr).float(), self.critic(hr).float()
        loss = (
            F.binary_cross_entropy_with_logits(false, torch.zeros_like(false))
            + F.binary_cross_entropy_with_logits(true, torch.ones_like(true))
        ) / 2
        return loss, {"critic": loss}

    def persuade(self, sr: Tensor, content: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the network's loss: the recipe's, and what is lacking until its results pass for photographs."""
        with self._held_still():
            verdict = self.critic(sr).float()
        adversarial = self.config.weight * F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
        weight = self.config.content_weight
        scaled = {name: weight * term for name, term in terms.items()}
        return weight * content + adversarial, scaled | {"adversarial": adversarial}

    @contextmanager
    def _held_still(self) -> Iterator[None]:
        """Leave the critic without gradients from what runs inside; outside, its optimisers find their parameters."""
        trained = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def take_turns(self, terms: dict[str, Tensor]) -> None:
        """Pass the turn on after a step: the critic keeps it until its loss is below the threshold."""
        if "critic" in terms:
            self.has_turn = bool(self.config.threshold) and float(terms["critic"]) >= self.config.threshold
        else:
            self.has_turn = True


class SavedResults(Dataset[tuple[Tensor, Tensor]]):
    """Crops of saved results and of the photographs they were made of, both (3, size, size) in [0, 1].

    entropy: (seed, stage index, phase index).
    """

    def __init__(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, size: int, entropy: tuple[int, int, int]):
        self.pairs, self.size, self.entropy = pairs, size, entropy

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((*self.entropy, 3, index))
        sr, hr = self.pairs[int(rng.integers(len(self.pairs)))]
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in hr.shape[:2])
        window = np.s_[top : top + self.size, left : left + self.size]
        return to_tensor(sr[window]), to_tensor(hr[window])


def save_results(
    run: Path,
    photographs: Photographs,
    enlarge: Callable[[np.ndarray], np.ndarray],
    *,
    scale: int,
    grid: int,
    size: int,
    config: DegradeConfig,
    entropy: tuple[int, ...],
    progress: Callable[[int, int], None],
    writes: bool = True,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give a network's result and the photograph's part for each photograph; results lie in the run's folder `fakes`.

    enlarge: (h, w, 3) -> (h*scale, w*scale, 3), both uint8. grid: of HR sides. size: of crops, which fit into all.
    entropy: of the damages; results that were saved with it are read again, so that a run may be killed at any time.
    progress: called with how many of how many are there, before each; what it raises ends the work.
    writes: False in all but the first of several processes.
    Raises: ResourceError if they cannot be written.
    """
    folder = run / FAKES
    key: dict[str, Any] = {"entropy": list(entropy), "pictures": len(photographs)}
    is_theirs = _read_facts(run / FACTS) == key
    if writes and not is_theirs:
        forget_results(run)
        write_json(key, run / FACTS)
    pairs = []
    for index, photograph in enumerate(photographs.pictures):
        progress(index, len(photographs))
        rng = np.random.default_rng((*entropy, index))
        side = max(size, min(FAKE_SIDE, *photograph.shape[:2]) // grid * grid)
        lr, hr = photographs.cut(index, size=side, scale=scale, config=config, rng=rng)
        path = folder / f"{index:05d}.png"
        if is_theirs and path.is_file():
            with Image.open(path) as image:
                sr = np.asarray(image.convert("RGB"))
        else:
            sr = enlarge(lr)
            if writes:
                with replacing(path) as temporary:
                    Image.fromarray(sr).save(temporary, "PNG")
        pairs.append((sr, hr))
    return pairs


def forget_results(run: Path) -> None:
    """Delete the results that an earlier run, or another phase, has left in the folder.

    Raises: ResourceError if they cannot be deleted.
    """
    try:
        (run / FACTS).unlink(missing_ok=True)
        if (run / FAKES).exists():
            shutil.rmtree(run / FAKES)
    except OSError as exc:
        raise ResourceError(f"{run / FAKES}: old results could not be deleted ({exc})") from exc


def _read_facts(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
