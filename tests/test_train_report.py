"""A run's report: one file, whole for every run, however hostile what was logged is."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from train.errors import CheckpointError, ResourceError
from train.plots import write_panel
from train.recipe import Recipe, load_recipe
from train.report import in_words, report_command, run_state, write_report
from train.report_page import element, table
from train.run_folder import append_log, read_log, write_run

MakePhoto = Callable[..., np.ndarray]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='a()'> \" ' & $x^ \ud800 \u4e2d"
VOID = {"img", "meta", "wbr"}


class Page(HTMLParser):
    """Checks that every element is closed, and keeps elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def find(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def make_run(run: Path, recipe: Recipe, *, steps: int = 6, **facts: Any) -> Path:
    """Write a run's folder of two stages' log, the first of them written."""
    known = {"recipe": asdict(recipe), "device": "cpu", "precision": "fp32", "commit": "abc1234", "pictures": 24}
    write_run(run, recipe, known | {"versions": {"torch": "2.6"}, "fingerprint": "0123456789abcdef"} | facts)
    for step in range(1, steps + 1):
        stage = recipe.stages[0 if step <= 3 else -1].name
        entry: dict[str, Any] = {"stage": stage, "step": step, "done_steps": step, "all_steps": 6}
        entry |= {"terms": {"pixel": 1 / step, "luma": 0.5}, "images_per_second": 10.0 * step, "skipped": step // 3}
        if step % 2:
            entry["validation"] = {"psnr_y": 36.0 - abs(step - 3), "colour_drift": 0.25, "pixel": 1 / step, "luma": 0.5}
        append_log(run, entry)
    return run


def write_stage(run: Path, name: str, *, complete: bool = True) -> None:
    folder = run / "stages" / name
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"complete": complete}))


@pytest.fixture
def run(tmp_path: Path, make_photo: MakePhoto) -> Path:
    folder = make_run(tmp_path / "my-run", load_recipe("fast", overrides=("stages.0.batch=7",)))
    hr = make_photo(128, 128, 0)
    for step in (1, 3, 5):
        write_panel([(hr[::2, ::2], hr, hr)] * 2, folder / "panels" / f"{step:08d}.png")
    return folder


def test_a_report_is_one_file_that_loads_nothing(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    assert not [child.name for child in run.iterdir() if child.name.startswith(".")]
    text = path.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "url(http" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "a", "base", "form"}
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        # Clip paths and markers of the drawings are the only references, and stay in the file.
        assert all(attributes[key].startswith(("data:image/", "#")) for key in ("src", "href") if key in attributes), (
            tag
        )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_pictures_in_it_are_those_of_the_panels(run: Path, make_photo: MakePhoto) -> None:
    images = read_page(write_report(run)).find("img")
    decoded = []
    for attributes in images:
        head, _, data = attributes["src"].partition(",")
        assert head == "data:image/png;base64" and attributes["alt"]
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            decoded.append(np.asarray(image.convert("RGB")))
    with Image.open(run / "panels" / "00000005.png") as newest:
        assert np.array_equal(decoded[0], np.asarray(newest))
    assert len(decoded) == 1 + 3 + 1  # the newest, three predictions over time, and the target
    assert all(np.array_equal(picture, make_photo(128, 128, 0)) for picture in decoded[1:])


def test_a_recipe_in_words() -> None:
    same_size = in_words(load_recipe("fast-restore"))[0]
    assert "which keeps the size, with seed 1. The input has the photographs' size, damaged: jpeg on 100%" in same_size
    doubling = in_words(load_recipe("fast"))[0]
    assert "to enlarge x2, with seed 1. The input is a bicubic reduction, not damaged otherwise." in doubling
    assert "comes from the folder 'lr', as it is." in in_words(load_recipe("fast"), paired="lr")[0]


def test_it_tells_what_is_trained_and_measured(run: Path) -> None:
    page = read_page(write_report(run))
    text = page.text
    assert "Recipe 'fast' trains the network 'fast'" in text and "to enlarge x2" in text
    assert "Stage 96: crops of 96 pixels in batches of 7, 18 epochs at rates up to 0.001" in text
    assert "1 value differs from the shipped recipe 'fast'" in text
    assert "stages.0.batch 7 16 (differs)" in text.replace(". ", ".")
    assert len([attributes for attributes in page.find("tr") if attributes.get("class") == "changed"]) == 1
    assert "96 3 36.000 3 36.000 0.25 20 1 not written yet" in text
    assert "192 3 34.000 5 34.000 0.25 50 1 not written yet" in text
    assert "0123456789abcdef" in text and "abc1234" in text and "torch 2.6" in text


def test_it_can_be_read_without_seeing(run: Path) -> None:
    page = read_page(write_report(run))
    assert ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert len(page.find("caption")) == len(page.find("table"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.find("th"))
    drawings = [attributes for attributes in page.find("div") if attributes.get("role") == "img"]
    assert len(drawings) == len(page.find("svg")) == 2 + 3 * 2  # PSNR-Y, drift; loss, luma and pixel on two axes
    assert all("over the steps" in attributes["aria-label"] for attributes in drawings)


def test_hostile_names_and_values_stay_text(tmp_path: Path) -> None:
    recipe = replace(load_recipe("fast"), name=HOSTILE)
    facts = {"command": HOSTILE, "init": {HOSTILE: HOSTILE, "stage": HOSTILE}, HOSTILE: [HOSTILE], "versions": HOSTILE}
    run = make_run(tmp_path / "<b>&amp;'\" onload=x", recipe, **facts)
    append_log(run, {"stage": HOSTILE, "step": 1, "done_steps": 7, "terms": {HOSTILE: 1.0}, "all_steps": HOSTILE})
    append_log(run, {"done_steps": HOSTILE, "terms": HOSTILE, "validation": HOSTILE, "images_per_second": [HOSTILE]})
    append_log(run, {"done_steps": 8, "validation": {HOSTILE: 3.0}})
    page = read_page(write_report(run))
    assert not page.find("script") and not page.find("b") and not page.find("img")
    assert "</script><script>alert(1)</script><img src=x onerror='a()'> \" ' & $x^ ? \u4e2d" in page.text
    assert page.text.startswith("<b>&amp;'\" onload=x")


@pytest.mark.parametrize(
    "lines", ["", "\n\n", '{"done_steps": 1', "[]\n7\nnull\n{}\n", '{"done_steps": NaN, "terms": {"a": Infinity}}\n']
)
def test_a_log_that_tells_nothing_makes_a_report_too(tmp_path: Path, lines: str) -> None:
    write_run(tmp_path / "run", load_recipe("fast"), {})
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "log.jsonl").write_text(lines)
    assert "Nothing is logged yet." in read_page(write_report(tmp_path / "run")).text


def test_a_panel_that_is_cut_short_is_told(run: Path) -> None:
    newest = run / "panels" / "00000005.png"
    newest.write_bytes(newest.read_bytes()[:500])
    page = read_page(write_report(run))
    assert "The newest panel, 00000005.png, cannot be read." in page.text
    assert len(page.find("img")) == 2 + 1


def test_the_state_of_a_run(tmp_path: Path) -> None:
    recipe = load_recipe("fast")
    run = make_run(tmp_path / "run", recipe)

    def state() -> str:
        return run_state(run, recipe, read_log(run))[0]

    assert state() == "running"
    (run / "checkpoints" / "step-000000004").mkdir(parents=True)
    assert state() == "running"
    (run / "checkpoints" / "step-000000006").mkdir()  # who is stopped saves where it ends
    assert state() == "stopped"
    (run / "checkpoints" / "step-000000006").rmdir()
    long_ago = time.time() - 3600
    os.utime(run / "log.jsonl", (long_ago, long_ago))
    assert state() == "stopped"
    write_stage(run, "96")
    write_stage(run, "192", complete=False)
    assert state() == "stopped"
    (run / "stages" / "192" / "state.json").write_text('{"complete": true}')
    assert state() == "finished"


def test_an_unknown_recipe_is_compared_with_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(load_recipe("fast"), name="../recipes/fast"))
    page = read_page(write_report(run))
    assert "No recipe named '../recipes/fast' is shipped" in page.text
    assert not [attributes for attributes in page.find("tr") if attributes.get("class") == "changed"]


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run of sr-train"):
        write_report(tmp_path)
    result = CliRunner().invoke(report_command, [str(tmp_path)])
    assert result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1


def test_a_report_that_cannot_be_written_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_report(run, tmp_path / "file" / "report.html")


def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(report_command, [str(run), "--out", str(tmp_path / "deep" / "page.html")])
    assert result.exit_code == 0 and "page.html" in result.output
    assert (tmp_path / "deep" / "page.html").is_file() and not (run / "report.html").exists()


def test_elements_escape_text_and_attributes() -> None:
    assert element("p", "<&>", title='"<') == '<p title="&quot;&lt;">&lt;&amp;&gt;</p>'
    assert element("p", element("b", "<"), "<") == "<p><b>&lt;</b>&lt;</p>"
    assert "<td>&lt;i&gt;</td>" in table(["<a>"], [["<b>", "<i>"]], caption="<c>")


def test_pairs_are_not_said_to_be_damaged(tmp_path: Path) -> None:
    recipe = load_recipe("fast", task="jpeg")
    assert "damaged: jpeg on 100%" in write_report(make_run(tmp_path / "a", recipe)).read_text(encoding="utf-8")
    page = write_report(make_run(tmp_path / "b", recipe, low_resolution="lr")).read_text(encoding="utf-8")
    assert "The input comes from the folder &#x27;lr&#x27;, as it is." in page and "damaged" not in page
