"""Export plain state dicts: a .safetensors or .pth file with the weights of one of our architectures."""

from __future__ import annotations

import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdk.bundle import Manifest, hash_file
from train.errors import TrainError
from train.feature_nets import RANDOM_WEIGHTS
from train.models import BUILDERS, Network, build_model
from train.recipe import ModelConfig, load_recipe

from .bundle_writer import Options, Report, export_network
from .errors import ExportError
from .folders import refuse_existing
from .to_onnx import quiet

STAGE = "main"
PICKLES = (".pth", ".pt", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
NESTS = ("params_ema", "params", "state_dict")  # where other trainers put the weights, the best first
PARALLEL = "module."  # what DataParallel puts before every name
MAX_SHOWN = 4


def export_checkpoint(
    path: Path,
    out: Path,
    options: Options,
    *,
    arch: str,
    settings: tuple[str, ...] = (),
    report: Report = lambda line: None,
) -> Manifest:
    """Export a state dict into the folder `out`, which must not exist, as a bundle of one stage.

    path: .safetensors, or a pickle of PyTorch that holds tensors alone. arch: a name in train.models. settings: what
    the network is built with, such as "model.channels=48". options.scale is needed.
    Raises: ExportError if the file is not such a state dict or does not fit the network, and as export_network.
    """
    refuse_existing(out)
    if options.scale is None or options.scale < 1:
        raise ExportError(f"{path}: a plain checkpoint does not say by how much it enlarges; give --scale, 1 or more")
    config = _configure(arch, options.scale, settings)
    state = read_state(path)
    network = _build(config)
    _load(network, state, where=f"{path}, {arch}")
    facts = {"checkpoint": asdict(hash_file(path)), "model": asdict(config)}
    return export_network(network, out, options, stage=STAGE, training_size=0, facts=facts, report=report)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name; nothing in it is run.

    Raises: ExportError if it is of another kind, damaged, or a pickle that holds more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path}: a checkpoint is a .safetensors, {', '.join(PICKLES)} file, or a run of sr-train")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats: what cannot be read is an error below
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise ExportError(
            f"{path}: holds more than tensors, or is damaged ({_first_line(exc)}); such a file could run anything, so "
            "it is not opened: save its state_dict() alone, best as .safetensors"
        ) from exc
    except Exception as exc:  # damaged pickles raise whatever comes
        raise ExportError(f"{path}: not a readable checkpoint ({_first_line(exc)})") from exc
    return _find_state(values, path)


def _first_line(exc: Exception) -> str:
    return (str(exc) or type(exc).__name__).splitlines()[0][:200]


def _find_state(values: Any, path: Path) -> dict[str, Tensor]:
    """Take the state dict out of what a trainer saved around it."""
    for nest in NESTS:
        if isinstance(values, Mapping) and isinstance(values.get(nest), Mapping):
            values = values[nest]
            break
    if not (isinstance(values, Mapping) and values and all(isinstance(value, Tensor) for value in values.values())):
        raise ExportError(
            f"{path}: expected names and tensors, or such a table under {', '.join(NESTS)}; got {_describe(values)}"
        )
    state = {str(name): tensor for name, tensor in values.items()}
    if all(name.startswith(PARALLEL) for name in state):
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    return state


def _describe(values: Any) -> str:
    if not isinstance(values, Mapping):
        return type(values).__name__
    return f"a table with {_some([f'{name}: {type(value).__name__}' for name, value in values.items()]) or 'nothing'}"


def _configure(arch: str, scale: int, settings: tuple[str, ...]) -> ModelConfig:
    """Make the model's part of a recipe of a name and settings, which are read as those of sr-train."""
    if arch not in BUILDERS:
        raise ExportError(f"--arch {arch!r}: one of {', '.join(BUILDERS)}")
    overrides = []
    for setting in settings:
        key = setting.removeprefix("model.")
        if key == setting:
            raise ExportError(f"--set {setting}: only the network can be set here, as model.channels=48")
        known = [field.name for field in fields(ModelConfig)]
        overrides.append(setting if key.partition("=")[0].split(".")[0] in known else f"model.options.{key}")
    # Of the recipe only the model counts; a stage must have a size that its scale divides.
    text = f'[model]\nname = "{arch}"\nscales = [{scale}]\n\n[[stages]]\nname = "{STAGE}"\nsize = {16 * scale}\n'
    try:
        with tempfile.TemporaryDirectory(prefix="sr-export-") as folder:
            recipe = Path(folder) / "checkpoint.toml"
            recipe.write_text(text, encoding="utf-8")
            return load_recipe(str(recipe), overrides=tuple(overrides)).model
    except TrainError as exc:
        raise ExportError(str(exc)) from exc


def _build(config: ModelConfig) -> Network:
    try:
        with quiet("train.feature_nets"), warnings.catch_warnings():  # its weights are random for a moment only
            warnings.simplefilter("ignore")  # of layers without channels, which do not fit below
            return build_model(config, weights=RANDOM_WEIGHTS)
    except TrainError as exc:
        raise ExportError(str(exc)) from exc
    except (RuntimeError, ValueError, TypeError, IndexError) as exc:  # sizes that no layer can have
        raise ExportError(f"--set: {config.name} cannot be built so ({_first_line(exc)})") from exc


def _load(network: Network, state: Mapping[str, Tensor], *, where: str) -> None:
    """Put weights into a network.

    Raises: ExportError that tells which names or shapes differ, the first few of each.
    """
    expected = network.state_dict()
    faults = []
    if missing := sorted(expected.keys() - state.keys()):
        faults.append(f"{len(missing)} missing: {_some(missing)}")
    if unknown := sorted(state.keys() - expected.keys()):
        faults.append(f"{len(unknown)} unknown: {_some(unknown)}")
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = [
        f"{name} is {str(state[name].dtype).removeprefix('torch.')}"
        for name, tensor in expected.items()
        if name in state and tensor.is_floating_point() and not _is_plain(state[name])
    ]
    if kinds:
        faults.append(f"{len(kinds)} not dense floating-point numbers: {_some(kinds)}")
    if shapes:
        faults.append(f"{len(shapes)} of another shape: {_some(shapes)}")
    if faults:
        raise ExportError(f"{where}: the weights do not fit: {'; '.join(faults)}. Choose --arch and --set as trained")
    network.load_state_dict(dict(state))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type != "meta"


def _some(items: list[str]) -> str:
    return ", ".join(items[:MAX_SHOWN]) + (", ..." if len(items) > MAX_SHOWN else "")
