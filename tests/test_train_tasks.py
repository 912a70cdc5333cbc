"""Tasks combine with every recipe, and say all that is wrong with a picture."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
import torch

from train.errors import RecipeError
from train.models import build_model
from train.recipe import DegradeConfig, load_recipe, recipe_from_dict, recipe_names
from train.tasks import DAMAGES, load_task, merge, task_names

SCALES = {
    "colourise": (1,), "deblur": (1,), "denoise": (1,), "inpaint": (1,), "jpeg": (1,), "real": None, "text": (1,),
    "x2": (2,), "x4": (4,), "x8": (2,),
}  # fmt: skip
# The damages that a task is about.
ABOUT = {
    "colourise": {"grey"}, "deblur": {"blur"}, "denoise": {"noise"}, "inpaint": {"holes"}, "jpeg": {"jpeg"},
    "real": {"blur", "noise", "jpeg"}, "text": {"text"}, "x2": set(), "x4": set(), "x8": set(),
}  # fmt: skip


def test_the_tasks_are_these() -> None:
    assert task_names() == sorted(SCALES)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("recipe_name", recipe_names())
def test_a_task_combines_with_every_recipe(recipe_name: str, name: str) -> None:
    before = load_recipe(recipe_name)
    recipe = recipe_from_dict(merge(asdict(before), load_task(name)))
    assert recipe.model.scales == (SCALES[name] or before.model.scales)
    shares = {damage: getattr(recipe.degrade, f"{damage}_probability") for damage in DAMAGES}
    assert {damage for damage, share in shares.items() if share} == ABOUT[name]
    if name != "real":
        assert set(shares.values()) <= {0.0, 1.0}
    assert recipe.degrade.rounds == (2 if name == "real" else 1)
    # Nothing else is touched.
    changed = {f.name for f in fields(recipe) if getattr(recipe, f.name) != getattr(before, f.name)}
    assert changed <= {"model", "degrade"}
    assert (recipe.model.name, recipe.model.options) == (before.model.name, before.model.options)


@pytest.mark.parametrize("name", SCALES)
def test_a_task_stands_on_its_own(name: str) -> None:
    assert recipe_from_dict(load_task(name)).degrade != DegradeConfig() or name in ("x2", "x4")


def test_every_damage_can_be_switched_off() -> None:
    shares = {f.name for f in fields(DegradeConfig) if f.name.endswith("_probability")}
    assert shares == {f"{damage}_probability" for damage in DAMAGES}


def test_jpeg_is_of_the_promised_quality() -> None:
    assert recipe_from_dict(load_task("jpeg")).degrade.jpeg_quality == (10, 70)


@pytest.mark.parametrize("recipe_name", recipe_names())
def test_a_tasks_network_can_be_built_or_says_why_not(recipe_name: str) -> None:
    refusals = {
        ("srgan", "jpeg"): "enlarges by 2 or 4, not 1", ("srgan-mse", "jpeg"): "enlarges by 2 or 4, not 1",
        ("fast-restore", "x4"): "a cell is a multiple of the scale, 4, not 2",
        ("fast-fine", "x4"): "a cell is a multiple of the scale, 4, not 2",
    }  # fmt: skip
    for name in ("jpeg", "x2", "x4"):  # of every scale that tasks ask for
        model = load_recipe(recipe_name, task=name).model
        with torch.device("meta"):  # of the right shape is enough
            if message := refusals.get((recipe_name, name)):
                with pytest.raises(RecipeError, match=message):
                    build_model(model, weights="random")
            else:
                assert build_model(model, weights="random").scales == model.scales


@pytest.mark.parametrize(("typo", "near"), [("colorise", "colourise"), ("jpg", "jpeg"), ("denoize", "denoise")])
def test_a_typo_is_told_the_nearest_name(typo: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown task '{typo}': one of .*; did you mean '{near}'"):
        load_task(typo)


@pytest.mark.parametrize("name", ["", "../recipes/fast", "zzzzzz"])
def test_an_unknown_task_is_told_all_names(name: str) -> None:
    with pytest.raises(RecipeError, match=r"one of colourise, deblur, .*, x8"):
        load_task(name)


def test_merge_replaces_values_and_merges_tables() -> None:
    values = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    overlay = {"a": {"c": [9], "e": {"f": 4}}, "g": 5}
    assert merge(values, overlay) == {"a": {"b": 1, "c": [9], "e": {"f": 4}}, "d": 3, "g": 5}
    assert values == {"a": {"b": 1, "c": [1, 2]}, "d": 3} and overlay == {"a": {"c": [9], "e": {"f": 4}}, "g": 5}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
    merged = merge({}, overlay)
    merged["a"]["e"]["f"] = 7
    assert overlay["a"] == {"c": [9], "e": {"f": 4}}


def test_two_loads_share_nothing() -> None:
    first = load_task("jpeg")
    first["degrade"]["jpeg_probability"] = 0.1
    assert load_task("jpeg")["degrade"]["jpeg_probability"] == 1.0
