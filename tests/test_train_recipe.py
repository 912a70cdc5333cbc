"""Recipes: what loads, what is refused and how the refusal reads."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from train.errors import CheckpointError, RecipeError, ResourceError
from train.models import BUILDERS
from train.recipe import PhaseConfig, Recipe, differences, load_recipe, recipe_from_dict, recipe_names
from train.run_folder import append_log, cut_log, hold, load_run, read_log, write_run


def test_shipped_recipes() -> None:
    assert recipe_names() == [
        "autoencoder", "autoencoder-hfen", "autoencoder-ssim", "fast", "fast-fine", "fast-perceptual", "fast-restore",
        "fast-wide", "fast-x4", "perceptual-unet", "resnet18-residual", "srgan", "srgan-mse", "unet-gan", "unet-mse",
        "unet-transpose", "vae",
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.name in BUILDERS


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_perceptual_unet_follows_the_lesson() -> None:
    recipe = load_recipe("perceptual-unet")
    assert [(stage.size, stage.batch) for stage in recipe.stages] == [(128, 32), (256, 12), (512, 4)]
    assert [[phase.learning_rate for phase in stage.phases] for stage in recipe.stages] == [
        [1e-2, 1e-3],
        [1e-3, 1e-4],
        [1e-3, 1e-4],
    ]
    assert all([phase.freeze_encoder for phase in stage.phases] == [True, False] for stage in recipe.stages)
    assert recipe.stages[0].phases[1].encoder_learning_rate == 1e-5
    assert (recipe.loss.pixel, recipe.loss.feature_net) == ("l1_normalised", "vgg16_bn")
    assert (recipe.loss.feature_weights, recipe.loss.style_weight) == ((5.0, 15.0, 2.0), 5e3)
    assert (recipe.optimizer.div, recipe.optimizer.final_div, recipe.optimizer.weight_decay) == (25.0, 2.5e5, 1e-3)
    assert (recipe.degrade.resize, recipe.degrade.jpeg_quality) == ("bilinear", (10, 70))


def test_fast_perceptual_goes_on_from_fast() -> None:
    fast, tuned = load_recipe("fast"), load_recipe("fast-perceptual")
    assert tuned.model == fast.model and tuned.degrade == fast.degrade
    assert tuned.loss.pixel_weight and tuned.loss.colour_weight
    assert tuned.loss.feature_net != "squeezenet1_1"  # which measures the result
    assert tuned.loss.grid_weight and tuned.loss.feature_shift


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 7\n[[stages]]\nname = 'a'\nphases = [{ epochs = 2 }]\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.seed) == ("mine", 7)
    assert recipe.stages[0].phases == (PhaseConfig(epochs=2.0),)


def test_a_recipe_changes_its_base(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "fast-wide"\nseed = 7\n[loss]\npixel = "l1"\n')
    (tmp_path / "more.toml").write_text('base = "mine.toml"\n[loss]\nluma_weight = 3.0\n')
    wide, more = load_recipe("fast-wide"), load_recipe(str(tmp_path / "more.toml"))
    assert more == replace(
        wide, name="more", seed=7, loss=replace(wide.loss, pixel="l1", luma_weight=3.0)
    )  # fmt: skip
    (tmp_path / "mine.toml").write_text('base = "more.toml"\n')
    with pytest.raises(RecipeError, match="at most 8 deep"):
        load_recipe(str(tmp_path / "more.toml"))
    (tmp_path / "more.toml").write_text("base = 3\n")
    with pytest.raises(RecipeError, match="base is the name of a recipe"):
        load_recipe(str(tmp_path / "more.toml"))
    (tmp_path / "more.toml").write_text('base = "fsat"\n')
    with pytest.raises(RecipeError, match="did you mean 'fast'"):
        load_recipe(str(tmp_path / "more.toml"))


def test_overrides() -> None:
    recipe = load_recipe(
        "fast", overrides=("loss.pixel=l1", "stages.1.batch=4", "stages.0.phases.0.epochs=2", "model.scales=[4]")
    )
    assert recipe.loss.pixel == "l1"
    assert recipe.stages[1].batch == 4 and recipe.stages[0].batch == 16
    assert recipe.stages[0].phases[0].epochs == 2.0
    assert recipe.model.scales == (4,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.pixl=l1", r"recipe.loss: unknown key 'pixl', did you mean 'pixel'\?"),
        ("sede=1", r"recipe: unknown key 'sede', did you mean 'seed'\?"),
        ("seed=one", "recipe.seed: expected int, got 'one'"),
        ("seed=1.5", "recipe.seed: expected int, got 1.5"),
        ("seed=true", "recipe.seed: expected int, got True"),
        ("seed=-1", "seed: expected a number that is not negative"),
        ("loss.pixel=3", "recipe.loss.pixel: expected str, got 3"),
        ("loss=3", "recipe.loss: expected a table, got 3"),
        ("stages=3", "recipe.stages: expected a list, got 3"),
        ("degrade.jpeg_quality=[1,2,3]", "recipe.degrade.jpeg_quality: expected 2 values, got 3"),
        ("degrade.jpeg_quality=[70,10]", r"degrade.jpeg_quality: expected \[lowest, highest\]"),
        ("degrade.jpeg_quality=[10,101]", "degrade.jpeg_quality: expected .* from 0 to 100"),
        ("degrade.noise_probability=2", "degrade.noise_probability: expected a share from 0 to 1"),
        ("degrade.resize=lanczos", "degrade.resize: expected one of bicubic, bilinear"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay: expected 0 <= ema_decay < 1"),
        ("stages.5.batch=1", "--set stages.5.batch: '5' is not an index below 2"),
        ("stages.x.batch=1", "'x' is not an index below 2"),
        ("name.a.b=1", "--set name.a.b: name.a has no named values"),
        ("seed", "--set seed: expected key=value"),
        ("stages.0.name=192", "stages.0.name: expected str, got 192"),
        ("stages.0.name='192'", "stages need distinct names"),
        ("stages.0.name=../up", "expected a name of letters, digits"),
        ("stages.0.size=97", "size 97 is not a multiple of"),
        ("stages.0.batch=0", "expected a batch from 1 to 65536, got 0"),
        ("stages.0.size=8", "expected a size from 16 to 65536, got 8"),
        ("stages.0.phases=[]", "expected a phase at least"),
        ("stages.0.phases.0.epochs=0", "stage '96', phase 'all': expected epochs > 0 and learning_rate > 0"),
        ("stages.0.phases.0.learning_rate=nan", "learning_rate: expected a number up to 1e[+]18, got nan"),
        ("stages.0.phases.0.epochs=inf", "epochs: expected a number up to 1e[+]18, got inf"),
        ("degrade.noise_sigma=[1.0,inf]", "noise_sigma.1: expected a number up to"),
        ("seed=99999999999999999999", "recipe.seed: expected a number up to"),
        ("optimizer.div=1" + "0" * 400, "recipe.optimizer.div: expected float, got 1000"),
        ("optimizer.beta2=2", "optimizer.beta2: expected 0 <= beta2 < 1"),
        ("adversarial.beta1=-0.1", "adversarial.beta1: expected 0 <= beta1 < 1"),
        ("optimizer.gradient_clip=-1", "optimizer.gradient_clip: expected a number that is not negative"),
        ("loss.pixel_weight=-1", "loss.pixel_weight: expected a number that is not negative"),
        ("loss.feature_weights=[1.0, -1.0]", "loss.feature_weights: expected none negative"),
        ("stages.-1.batch=1", "'-1' is not an index below 2"),
        ("model.options.channels=0", "model.options.channels: expected 1 to 8192"),
        ("model.options.growth=-1", "model.options.growth: expected 0 to 8192"),
        ("adversarial.options.blocks=-3", "adversarial.options.blocks: expected 0 to 8192"),
        ("model.scales=[]", "model.scales: expected at least one scale"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("fast", overrides=(override,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.batch=10000000", "a batch from 1 to 65536, got 10000000"),
        ("stages.0.name=" + "s" * 65, "a name of letters"),
        ("stages.1.name=S96", "distinct names"),
        ("degrade.holes=[1000000,1000000]", "from 0 to 1000"),
        ("degrade.blur_sigma=[1.0,1e18]", "from 0 to 100"),
        ("model.options.blocks=[100000000,2,2]", "0 to 8192"),
        ("model.options.blocks=[-1,2,2]", "0 to 8192"),
        ("model.options.channels=1000000000", "1 to 8192"),
        ("seed=" + "9" * 5000, "expected int"),
        ("seed=" + "9" * 400, "expected a number up to 1e+18"),
        ("seed=" + "[" * 3000, "expected int"),
        ("seed=1\nx=2", "expected int"),
    ],
)
def test_numbers_without_sense_are_refused_at_once(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("fast", overrides=("stages.0.name=s96", override))
    assert message in str(caught.value) and len(str(caught.value)) < 500


def test_unknown_and_broken_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'fsat': one of autoencoder, .*; did you mean 'fast'\?"):
        load_recipe("fsat")
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 1")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load_recipe(str(broken))


def test_differences_name_keys_with_both_values() -> None:
    before = asdict(load_recipe("fast"))
    after = asdict(load_recipe("fast", overrides=("seed=2", "stages.0.batch=8", "loss.pixel=l1")))
    assert differences(before, before) == []
    assert differences(json.loads(json.dumps(before)), json.loads(json.dumps(after))) == [
        "seed: 1 before, 2 now",
        'loss.pixel: "charbonnier" before, "l1" now',
        "stages.0.batch: 16 before, 8 now",
    ]
    assert differences({"a": 1}, {"b": [1]}) == ["a: 1 before, null now", "b: null before, [1] now"]


def test_a_run_folder_gives_its_recipe_back(tmp_path: Path) -> None:
    recipe = replace(Recipe(), seed=5)
    write_run(tmp_path / "run", recipe, {"steps": 3})
    assert load_run(tmp_path / "run") == recipe
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["recipe.json", "run.json"]


@pytest.mark.parametrize("content", [None, "{", '{"sede": 1}', "[]"])
def test_a_folder_that_is_no_run_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"not a run of sr-train"):
        load_run(tmp_path)


def test_the_log_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    for steps in (1, 5, 9):
        append_log(tmp_path, {"done_steps": steps})
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"done_steps": 1')  # a killed process
    assert [entry["done_steps"] for entry in read_log(tmp_path)] == [1, 5, 9]
    cut_log(tmp_path, 5)
    append_log(tmp_path, {"done_steps": 6})
    assert (tmp_path / "log.jsonl").read_text() == '{"done_steps": 1}\n{"done_steps": 5}\n{"done_steps": 6}\n'


def test_lines_of_a_log_that_are_none_are_left_out(tmp_path: Path) -> None:
    whole = b'{"done_steps": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + b'3\nnull\n{}\n\xff\xfe{\n\0\0\n{"done_steps"\n' + whole)
    assert read_log(tmp_path) == [{"done_steps": 1}] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"log.jsonl: cannot be written \(No space left on device\)"):
        append_log(tmp_path, {"done_steps": 1})


def test_an_unwritable_run_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"recipe.json: cannot be written \(.*\); free space or choose --out"):
        write_run(tmp_path / "file" / "run", Recipe(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "line",
    [
        '{"done_steps": "x"}', '{"done_steps": null}', '{"done_steps": [1]}', '{"done_steps": true}', "[" * 100_000,
        '{"done_steps": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_lines_without_a_step_are_left_out(line: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(line + '\n{"done_steps": 3}\n')
    assert read_log(tmp_path) == [{"done_steps": 3}]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with hold(tmp_path / "run"):
        with pytest.raises(ResourceError, match="another sr-train writes here"), hold(tmp_path / "run"):
            pass
        with hold(tmp_path / "other"):
            pass
    assert not (tmp_path / "run").exists()  # nothing was written there
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "log.jsonl").touch()
    with hold(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]
