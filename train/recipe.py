"""Recipes: what is trained, on what, and for how long. All defaults stand here, once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .tasks import load_task, merge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE_DIR = Path(__file__).parent / "recipes"
RESIZE_FILTERS = ("bicubic", "bilinear")
SCHEDULES = ("one-cycle", "constant")
PHASE_KINDS = ("generator", "critic", "adversarial")
LARGEST = 65536  # size and batch
MAX_OPTION = 8192  # channels, blocks and the like
MAX_BASES = 8  # more is a circle
MAX_NUMBER = 1e18  # what fits into 64 bits, and is no mistake of typing
DISTANCES = ("l1", "mse", "unit")


@dataclass(frozen=True)
class ModelConfig:
    """Which network; `options` are keyword arguments of its builder in train.models."""

    name: str = "fast"
    scales: tuple[int, ...] = (2,)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DegradeConfig:
    """How the low-resolution picture is made of the photograph; every range is drawn for each sample.

    crop_scale: (lowest, highest) size that the photograph is reduced to before a crop is cut, 1 is as it is.
    resize: filter of the reduction, "bicubic" (the protocol's) or "bilinear", both antialiased.
    blur_sigma (Gaussian, pixels), jpeg_quality, noise_sigma (8-bit code values), holes, texts: (lowest, highest).
    *_probability: share of the samples that get the damage; grey is the loss of all colour.
    rounds: 2 blurs, resizes, adds noise and saves as JPEG once more before, at a random size in between: photographs
    from the web (Wang et al., arXiv 2107.10833).
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    rounds: int = 1
    resize: str = "bicubic"
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 2.5)
    grey_probability: float = 0.0
    jpeg_probability: float = 0.0
    jpeg_quality: tuple[int, int] = (10, 70)
    noise_probability: float = 0.0
    noise_sigma: tuple[float, float] = (2.0, 20.0)
    holes_probability: float = 0.0
    holes: tuple[int, int] = (1, 8)
    text_probability: float = 0.0
    texts: tuple[int, int] = (1, 3)


@dataclass(frozen=True)
class LossConfig:
    """Pixel term plus, where `feature_net` is named, the perceptual terms of SEEDS A.

    pixel: a name in train.losses.PIXEL_LOSSES; 0 weights switch a term off.
    hfen_weight: of the distance between Laplacians of Gaussians, which sees edges alone.
    feature_layers: names in train.feature_nets, empty for the network's own default.
    feature_weights: one for each layer; the style term's weight is its square times `style_weight`.
    feature_distance: between features: "l1", "mse", or "unit", the squared distance of vectors scaled to length 1.
    feature_shift: features are compared from a place that moves by fewer pixels than this at random.
    luma_weight: the pixel term once more, on BT.601 luma.
    colour_weight: L1 between 16x16 block means, which deep features hardly see.
    grid_weight: of the error that repeats every 4 pixels, which perceptual terms invite.
    teacher_weight: Charbonnier distance to the result of another run's network (--teacher RUN).
    """

    pixel: str = "charbonnier"
    pixel_weight: float = 1.0
    luma_weight: float = 0.0
    colour_weight: float = 0.0
    grid_weight: float = 0.0
    teacher_weight: float = 0.0
    hfen_weight: float = 0.0
    feature_net: str = ""
    feature_distance: str = "l1"
    feature_shift: int = 0
    feature_layers: tuple[str, ...] = ()
    feature_weights: tuple[float, ...] = (5.0, 15.0, 2.0)
    feature_weight: float = 1.0
    style_weight: float = 5e3


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a schedule: "one-cycle" (cosine both ways), or "constant" with beta1_high throughout.

    muon_rate: the rate of Muon, which then takes the hidden convolutions, as a multiple of the phase's; 0: AdamW alone.
    warmup_share: of a phase's steps, in which the rate rises. div, final_div: the highest rate over the first one and
    over the last one. gradient_clip: largest norm of the gradient; 0: none. ema_decay: of the averaged weights, a step.
    Adversarial phases have a constant rate and adversarial.beta1.
    """

    schedule: str = "one-cycle"
    muon_rate: float = 0.0
    weight_decay: float = 0.0
    beta1_high: float = 0.95
    beta1_low: float = 0.85
    beta2: float = 0.99
    warmup_share: float = 0.25
    div: float = 25.0
    final_div: float = 2.5e5
    gradient_clip: float = 0.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class PhaseConfig:
    """Part of a stage with one schedule.

    kind: "generator" trains the network with the loss, "critic" a critic on what the network makes, "adversarial" both
    in turn.
    epochs: passes over samples_per_epoch samples, or over a crop of each photograph; fractions are meant.
    learning_rate: highest of the cycle, at the network's output end.
    encoder_learning_rate: at its input end; layer groups between are spaced geometrically; 0: the same.
    """

    name: str = "all"
    epochs: float = 1.0
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 0.0
    freeze_encoder: bool = False
    grown_only: bool = False  # train the layers alone that --init did not find in the smaller network
    kind: str = "generator"


@dataclass(frozen=True)
class AdversarialConfig:
    """A critic that tells results from photographs, and how it trains with the network.

    critic: a name in train.models.critics; empty: none. options: keyword arguments of its builder.
    weight, content_weight: of the critic's verdict and of the recipe's loss in the network's steps.
    threshold: the critic trains until its loss is below it, then the network takes one step; 0: one step each.
    rate: the critic's learning rate as a multiple of the phase's. beta1: of both, in adversarial phases.
    """

    critic: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1e-3
    content_weight: float = 1.0
    threshold: float = 0.0
    rate: float = 1.0
    beta1: float = 0.0


@dataclass(frozen=True)
class StageConfig:
    """One step of progressive resizing: HR crops of `size` pixels in batches of `batch`."""

    name: str = "128"
    size: int = 128
    batch: int = 16
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides the photographs."""

    name: str = ""
    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    degrade: DegradeConfig = field(default_factory=DegradeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    samples_per_epoch: int = 0  # 0: one crop of each photograph
    validation_pictures: int = 16


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.toml"))


def load_recipe(name_or_path: str, *, task: str | None = None, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name or from a TOML file, lay a task over it and apply `key=value` overrides.

    task: a name in train.tasks.
    overrides: such as "loss.pixel=l1" or "stages.0.batch=8"; values are written as in TOML, bare words are strings.
    A file's `base = NAME` is another recipe, or a file beside it, of which it changes what it names.
    Raises: RecipeError for an unknown recipe or key, or a value of the wrong type.
    """
    values = _read_recipe(name_or_path)
    if task is not None:
        values = merge(values, load_task(task))
    for override in overrides:
        _apply_override(values, override)
    return recipe_from_dict(values)


def _read_recipe(name_or_path: str, *, depth: int = 0) -> dict[str, Any]:
    """Read a recipe's plain values, laid over those of its base."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPE_DIR / f"{name_or_path}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown recipe {name_or_path!r}: one of {', '.join(recipe_names())}, or a .toml file{hint}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"{path}: cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise RecipeError(f"{path}: not a TOML file: {exc}") from exc
    values.setdefault("name", path.stem)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or depth >= MAX_BASES:
        raise RecipeError(f"{path}: base is the name of a recipe or a .toml file, at most {MAX_BASES} deep")
    beside = path.parent / base
    return merge(_read_recipe(str(beside) if beside.suffix == ".toml" else base, depth=depth + 1), values)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Build a Recipe from plain values, as found in TOML or in a run's recipe.json."""
    recipe = _convert(Recipe, values, "recipe")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    names = [stage.name.lower() for stage in recipe.stages]  # some file systems know no difference
    if not names or len(set(names)) != len(names):
        raise RecipeError(f"stages need distinct names, got {names}")
    for stage in recipe.stages:
        where = f"stage {stage.name!r}"
        # The name becomes a folder of the run and a part of file names in the bundle.
        _expect(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", stage.name), where, "a name of letters, digits, . _ -")
        _expect(16 <= stage.size <= LARGEST, where, f"a size from 16 to {LARGEST}, got {stage.size}")
        _expect(1 <= stage.batch <= LARGEST, where, f"a batch from 1 to {LARGEST}, got {stage.batch}")
        _expect(stage.phases, where, "a phase at least")
        if any(scale < 1 or stage.size % scale for scale in recipe.model.scales):
            raise RecipeError(f"{where}: size {stage.size} is not a multiple of {list(recipe.model.scales)}")
        for phase in stage.phases:
            where = f"stage {stage.name!r}, phase {phase.name!r}"
            _expect(phase.epochs > 0 and phase.learning_rate > 0, where, "epochs > 0 and learning_rate > 0")
            _expect(phase.encoder_learning_rate >= 0, where, "encoder_learning_rate >= 0")
            _expect(phase.kind in PHASE_KINDS, f"{where}, kind", f"one of {', '.join(PHASE_KINDS)}")
            is_alone = phase.kind == "generator" or recipe.adversarial.critic
            _expect(is_alone, where, f"adversarial.critic for a phase of kind {phase.kind!r}")
    degrade, optimizer = recipe.degrade, recipe.optimizer
    _expect(degrade.resize in RESIZE_FILTERS, "degrade.resize", f"one of {', '.join(RESIZE_FILTERS)}")
    _expect(degrade.rounds in (1, 2), "degrade.rounds", "1 or 2")
    low, high = degrade.crop_scale
    _expect(0 < low <= high <= 1, "degrade.crop_scale", "[lowest, highest] in (0, 1]")
    for name, most in (
        ("jpeg_quality", 100), ("noise_sigma", 255), ("blur_sigma", 100), ("holes", 1000), ("texts", 1000)
    ):  # fmt: skip
        low, high = getattr(degrade, name)
        _expect(0 <= low <= high <= most, f"degrade.{name}", f"[lowest, highest] from 0 to {most}")
    for name in ("jpeg", "noise", "blur", "holes", "text", "grey"):
        share = getattr(degrade, f"{name}_probability")
        _expect(0 <= share <= 1, f"degrade.{name}_probability", "a share from 0 to 1")
    _expect(recipe.loss.feature_distance in DISTANCES, "loss.feature_distance", f"one of {', '.join(DISTANCES)}")
    _expect(optimizer.schedule in SCHEDULES, "optimizer.schedule", f"one of {', '.join(SCHEDULES)}")
    _expect(optimizer.div > 0 and optimizer.final_div > 0, "optimizer", "div > 0 and final_div > 0")
    _expect(0 <= optimizer.warmup_share <= 1, "optimizer.warmup_share", "a share from 0 to 1")
    _expect(0 <= optimizer.ema_decay < 1, "optimizer.ema_decay", "0 <= ema_decay < 1")
    for part, config in (("optimizer", optimizer), ("loss", recipe.loss), ("adversarial", recipe.adversarial)):
        for name, value in vars(config).items():
            if name.startswith("beta"):
                _expect(0 <= value < 1, f"{part}.{name}", f"0 <= {name} < 1")
            elif isinstance(value, float):  # rates and weights, of which a negative one would learn the contrary
                _expect(value >= 0, f"{part}.{name}", "a number that is not negative")
    _expect(all(weight >= 0 for weight in recipe.loss.feature_weights), "loss.feature_weights", "none negative")
    smallest = min(stage.size for stage in recipe.stages)
    _expect(0 <= recipe.loss.feature_shift < smallest, "loss.feature_shift", f"0 or more, less than {smallest}")
    _expect(recipe.model.scales, "model.scales", "at least one scale")
    for where, options in (("model", recipe.model.options), ("adversarial", recipe.adversarial.options)):
        for key, value in options.items():
            least = {"channels": 1, "output_range": -MAX_OPTION}.get(key, 0)
            for each in value if isinstance(value, (list, tuple)) else (value,):
                is_fine = type(each) is not int or least <= each <= MAX_OPTION
                _expect(is_fine, f"{where}.options.{key}", f"{least} to {MAX_OPTION}")
    _expect(recipe.seed >= 0, "seed", "a number that is not negative")
    _expect(recipe.samples_per_epoch >= 0 and recipe.validation_pictures >= 0, "recipe", "counts >= 0")


def _expect(condition: object, where: str, expected: str) -> None:
    if not condition:
        raise RecipeError(f"{where}: expected {expected}")


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """List the keys in which two recipes (as plain values) differ, with both values: "seed: 1 before, 2 now"."""
    if isinstance(before, dict) and isinstance(after, dict):
        items = [(key, before.get(key), after.get(key)) for key in (*before, *sorted(after.keys() - before.keys()))]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        items = [(str(index), old, new) for index, (old, new) in enumerate(zip(before, after, strict=True))]
    else:
        if isinstance(before, list) and isinstance(after, list) and any(isinstance(each, dict) for each in before):
            before, after = len(before), len(after)  # tables fill a screen
        return [] if before == after else [f"{where}: {json.dumps(before)} before, {json.dumps(after)} now"]
    return [line for key, old, new in items for line in differences(old, new, f"{where}.{key}" if where else key)]


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text  # more lines would be more keys
    except (ValueError, RecursionError):
        value = text
    *parents, last = key.split(".")
    target: Any = values
    for part in parents:
        if isinstance(target, list):
            if not (part.isdecimal() and int(part) < len(target)):
                raise RecipeError(f"--set {key}: {part!r} is not an index below {len(target)}")
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
    if not isinstance(target, dict):
        raise RecipeError(f"--set {key}: {'.'.join(parents)} has no named values")
    target[last] = value


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Turn a plain value into the annotated type, or say what was expected."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {value!r:.200}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                raise RecipeError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        return kind(**{key: _convert(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise RecipeError(f"{where}: expected {len(items)} values, got {len(value)}")
        return tuple(_convert(items[0], item, f"{where}.{index}") for index, item in enumerate(value))
    if origin is dict or isinstance(kind, types.GenericAlias):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER:
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"{where}: expected {kind.__name__}, got {value!r:.200}")
    if kind in (int, float) and not abs(value) <= MAX_NUMBER:  # which nan is not, either
        raise RecipeError(f"{where}: expected a number up to {MAX_NUMBER:.0e}, got {value!r:.30}")
    return value
