"""The README's own words: its snippets run, its commands exist, its tables are what was measured."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import PLOTTED, RESULTS, fill_tables
from sdk.bundle import Bundle, shipped_models
from train.cli import TOOLS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = {
    "sr-upscale": "sdk.cli",
    "sr-train": "train.cli",
    "sr-export": "export.cli",
    "sr-serve": "sdk.serve.cli",
}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet, tmp_path, photo_folder):
    shutil.copy(next(iter(sorted(photo_folder.glob("*.jpg")))), tmp_path / "photo.jpg")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=tmp_path,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "SR_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"},
    )


def command_lines() -> list[str]:
    return [line.strip() for line in TEXT.splitlines() if line.startswith("    sr-")]


@pytest.mark.parametrize("line", command_lines())
def test_command_takes_the_options_shown(line):
    program, *arguments = shlex.split(line, comments=True)
    command = importlib.import_module(COMMANDS[program]).main
    if program == "sr-train" and arguments[0] in TOOLS:
        module, _, name = TOOLS[arguments.pop(0)].partition(":")
        command = getattr(importlib.import_module(module), name)
    context = command.make_context(program, arguments, resilient_parsing=False)
    assert context.params


def test_every_option_named_in_the_text_exists():
    known = set()
    for module in (*COMMANDS.values(), "benchmarks.cli"):
        main = importlib.import_module(module).main
        for command in (main, *getattr(main, "commands", {}).values()):
            known |= {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z0-9-]+)", TEXT)) <= known


def test_tables_are_what_was_measured():
    assert fill_tables(TEXT) == TEXT


def test_shipped_models_are_those_that_were_measured():
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        for model in [*result.get("models", ()), *filter(None, [result.get("model")])]:
            if model["name"] in shipped_models():
                known = {stage.weights.sha256 for stage in Bundle.load(model["name"]).manifest.stages}
                assert model["weights_sha256"] in known, f"{path.name}: {model['name']} has other weights"


def test_the_server_reaches_what_it_must():
    rows = json.loads((RESULTS / "serve.json").read_text(encoding="utf-8"))["rows"]
    assert {row["met"] for row in rows} == {True, None}


def test_plots_are_of_the_committed_results():
    plots = importlib.import_module("benchmarks.plots")
    drawn = {path.name: plots.source_of(path) for path in RESULTS.glob("*.png")}
    assert {name for name, source in drawn.items() if source == "None"} == {"panel.png", "sr-serve.png", "report.png"}
    sources = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in PLOTTED}
    sources["seams"] = plots.halo_tables()
    expected = {name: plots.fingerprint(source) for name, source in sources.items()}
    plotted = {name: source for name, source in drawn.items() if source != "None"}
    assert plotted
    for name, source in plotted.items():
        assert source == expected[re.sub(r"(-\d+)?\.png$", "", name)], f"{name}: python -m benchmarks.readme draws it"


def test_pictures_that_are_shown_exist():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)
    assert shown
    for path in shown:
        assert (ROOT / path).is_file(), path
    assert {path.name for path in RESULTS.glob("*.png")} == {Path(path).name for path in shown}


def test_pictures_and_files_named_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).is_file(), target
