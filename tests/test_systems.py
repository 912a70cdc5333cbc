"""Every recipe trains, is resumed, exports and runs in the SDK: the networks in full size, on a few small crops."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from export import bundle_writer, verify
from export.bundle_writer import Options, export_network
from export.cli import main as export_command
from sdk import OptionError, Upscaler
from sdk.bundle import HaloRow
from train.checkpoint import load_checkpoint, stage_folder
from train.cli import NEEDS_INIT
from train.cli import main as train_command
from train.models import Network, build_model
from train.models.decoder import SelfAttention
from train.recipe import Recipe, load_recipe, recipe_names
from train.run_folder import read_log

SIZE, BATCH = 64, 2
HALVES = ("fast", "srgan-mse", "vae")  # also exported in fp16: a graph of each kind that is small


def goes_on_from(name: str) -> str | None:
    """Name the recipe whose run a recipe's --init is given."""
    return NEEDS_INIT[name].split()[-1] if name in NEEDS_INIT else None


ORDER = sorted(recipe_names(), key=lambda name: (goes_on_from(name) is not None, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for runs and bundles, which together are large: removed at the end."""
    folder = tmp_path_factory.mktemp("systems")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out what takes minutes for large networks and is tested elsewhere, and what is set for a whole process.

    The halo (tests/test_export_bundle.py), other engines than the one that is run here, waiting for the disk.
    """
    monkeypatch.delenv("SR_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(verify, "measure_halo", lambda *arguments, **options: (HaloRow(0, 0.0),))
    monkeypatch.setattr(bundle_writer, "ENGINES", (("onnxruntime", "fp32"),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("train").setLevel(logging.ERROR)  # of random weights
    yield
    logging.getLogger("train").setLevel(logging.NOTSET)
    torch.set_num_threads(threads)


def overrides(recipe: Recipe, steps: int) -> list[str]:
    """Make crops and batches small and every phase a few steps long; nothing else is changed."""
    found = [f"samples_per_epoch={steps * BATCH}", "validation_pictures=0"]
    for index, stage in enumerate(recipe.stages):
        found += [f"stages.{index}.size={SIZE}", f"stages.{index}.batch={BATCH}"]
        found += [f"stages.{index}.phases.{phase}.epochs=1" for phase in range(len(stage.phases))]
    return [word for override in found for word in ("--set", override)]


def run(command: object, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def train(name: str, photographs: Path, out: Path, *, source: Path | None) -> Recipe:
    """Train all phases of the first stage, in two commands: the second resumes the first in the middle."""
    recipe = load_recipe(name)
    phases = recipe.stages[0].phases
    steps = 1 if len(phases) > 1 else 2
    options = ["--weights", "random", "--device", "cpu", "--precision", "fp32", "--workers", 0]
    options += ["--init", source] if source else []
    common = [photographs, "--recipe", name, "--out", out, *options, *overrides(recipe, steps)]
    first, last = steps * len(phases) - 1, steps * len(phases)
    told = run(train_command, *common, "--max-steps", first)
    assert f"stopped at step {first}" in told
    told = run(train_command, *common, "--max-steps", last)
    assert f"resumed {out} at step {first}" in told
    product = load_checkpoint(stage_folder(out, recipe.stages[0].name))
    assert (product.facts["steps"], product.facts["complete"]) == (last, True)
    assert {entry["phase"] for entry in read_log(out)} == {phase.name for phase in phases}
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDER)
def test_a_recipe_trains_exports_and_runs(name: str, folder: Path, photo_folder: Path, make_photo) -> None:
    parent = goes_on_from(name)
    source = folder / f"run-{parent}" if parent else None
    assert source is None or source.is_dir(), f"{name} goes on from the run of {parent}, tested before it"
    out, bundle = folder / f"run-{name}", folder / f"{name}-bundle"
    recipe = train(name, photo_folder, out, source=source)

    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    Image.fromarray(make_photo(48, 64, 1)).save(pictures / "photo.png")
    run(export_command, out, "--out", bundle, "--pictures", pictures, *(["--fp16"] if name in HALVES else []))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["training"]["recipe"]["name"] == name
    assert manifest["scale"] == recipe.model.scales[0]
    assert bool(manifest["stages"][0]["halo"]) != bool(recipe.model.options.get("attention")), "which cannot be tiled"

    picture = make_photo(45, 70, 2)  # on no grid
    with Upscaler(bundle, backend="onnxruntime", precision="fp32") as upscaler:
        result = upscaler.upscale(picture)
    expected = in_torch(recipe, out, picture)
    assert result.dtype == np.uint8 and result.shape == expected.shape
    # 1 code value where rounding falls to the other side, and one for weights that are kept in fp16.
    assert np.abs(result.astype(int) - expected).max() <= 2
    shutil.rmtree(bundle)
    if name not in {goes_on_from(other) for other in ORDER}:
        shutil.rmtree(out)


def in_torch(recipe: Recipe, run: Path, picture: np.ndarray) -> np.ndarray:
    """Enlarge a picture with a run's network as it was trained, neither folded nor traced: (H, W, 3) uint8."""
    scale = recipe.model.scales[0]
    network = build_model(recipe.model, weights="random").eval()
    network.load_state_dict(load_checkpoint(stage_folder(run, recipe.stages[0].name)).group("model"))
    stride = network.stride(scale)
    height, width = picture.shape[:2]
    padding = ((0, -height % stride), (0, -width % stride), (0, 0))
    padded = np.pad(picture, padding, mode="reflect").transpose(2, 0, 1)[None].astype(np.float32) / 255
    with torch.no_grad():
        result = network(torch.from_numpy(padded), scale)[0].clamp(0, 1)
    code_values = (result * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return code_values[: height * scale, : width * scale]


class Attentive(Network):
    """A small network that looks at the whole picture; a trained one's attention is weighted as this one's is."""

    scales = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 8, stride=8), nn.Conv2d(16, 3 * 64, 1)
        self.attention = SelfAttention(16)
        nn.init.ones_(self.attention.gamma)

    def stride(self, scale: int) -> int:
        return 8

    def forward(self, lr: Tensor, scale: int) -> Tensor:
        return F.pixel_shuffle(self.last(self.attention(self.first(lr))), 8) + lr


def test_attention_is_exported_and_runs_in_one_piece(tmp_path: Path, make_photo) -> None:
    torch.manual_seed(0)
    network = Attentive().eval()
    with torch.no_grad():
        network.attention.query.weight *= 10  # a few places count, not the mean of all
    pictures = tmp_path / "pictures"  # small: memory grows with the square of their pixels
    pictures.mkdir()
    Image.fromarray(make_photo(24, 32, 1)).save(pictures / "photo.png")
    told: list[str] = []
    options = Options(pictures=pictures)
    manifest = export_network(
        network, tmp_path / "b", options, stage="main", training_size=0, facts={}, report=told.append
    )
    assert manifest.stages[0].halo == () and any("looks at the whole picture" in line for line in told)
    picture = make_photo(48, 72, 2)
    with Upscaler(tmp_path / "b", backend="onnxruntime", precision="fp32", memory_mib=4096) as upscaler:
        result = upscaler.upscale(picture)
        with pytest.raises(OptionError, match="looks at the whole picture"):
            upscaler.upscale(picture, tile=32)
    expected = verify.run_torch(network, picture[None], scale=1)[0]
    assert np.abs(result.astype(int) - expected).max() <= 1
    with torch.no_grad():
        network.attention.gamma.zero_()
    assert (verify.run_torch(network, picture[None], scale=1)[0] != expected).any()


def test_every_recipe_is_tested_after_what_it_goes_on_from() -> None:
    assert sorted(ORDER) == recipe_names()
    for name in ORDER:
        parent = goes_on_from(name)
        assert parent is None or ORDER.index(parent) < ORDER.index(name)
