"""`sr-bench report`: the page, its plots, and the files that it refuses."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import page, plots
from benchmarks.cli import main
from benchmarks.tables import tables_of

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MACHINE = {"cpu": "a processor", "usable_cores": 2, "gpus": [], "versions": {"openvino": "1"}}
HEAD = {"schema": 1, "command": "sr-bench x <y>", "machine": MACHINE, "protocol": "As & how."}
ROOFLINE = HEAD | {
    "kind": "roofline",
    "rows": [
        {
            "stage": "96", "size": [64, 48], "engine": engine, "device": "cpu", "precision": engine.split()[1],
            "gigaoperations": 1.5, "layer_mb": 3.0, "intensity": 500.0, "matrix_gops": 900.0, "copy_gb_per_s": 10.0,
            "floor_ms": 1.67, "median_ms": 4.0, "reached_gops": 375.0, "share_of_floor": 0.417,
        }
        for engine in ("openvino fp32", "openvino bf16")
    ],
}  # fmt: skip
SCALING = HEAD | {
    "kind": "scaling",
    "rows": [{"axis": "pixels", "value": n, "median_ms": float(n), "min_ms": 1.0, "max_ms": 9.0} for n in (4, 8)]
    + [{"axis": "threads", "value": 1, "median_ms": 5.0, "min_ms": 1.0, "max_ms": 9.0}],
    "fits": {"pixels": {"exponent": 1.0, "r2": 1.0}, "threads": {"exponent": None, "r2": None}},
}  # fmt: skip
SOAK = HEAD | {
    "kind": "soak", "clients": 2, "growth_mib": None, "totals": {"right": 9, "refused": 1, "wrong": 0, "error": 0},
    "rows": [{"kind": "rgb", "first": 2.0, "last": 3.0, "drift": 1.5}],
    "intervals": [{"seconds": 60.0 * n, "rss_mib": None, "latency": {"rgb": 2.0} if n else {}} for n in range(3)],
}  # fmt: skip
KINDS = {"roofline": ROOFLINE, "scaling": SCALING, "soak": SOAK}


class Reader(HTMLParser):
    """Collects what a page loads, its headings, and its cells."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.texts: dict[str, list[str]] = {"h2": [], "td": [], "em": [], "p": []}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open in self.texts:
            self.texts[self._open].append(data)


@pytest.fixture
def files(tmp_path):
    found = []
    for name, result in KINDS.items():
        found.append(tmp_path / f"{name}.json")
        found[-1].write_text(json.dumps(result))
    return found


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_page_holds_everything(files, tmp_path):
    out = tmp_path / "made" / "page"
    result = run(*files, RESULTS / "quality.json", "--out", out)
    assert result.exit_code == 0, result.output
    reader = Reader((out / "report.html").read_text())
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources) and len(reader.sources) == 6
    assert [heading.split(" (")[0] for heading in reader.texts["h2"]] == [
        "Quality", "Share of what the processor could do", "How time grows", "Hours of mixed requests", "Seams",
    ]  # fmt: skip
    assert {"SRCNN", "VDSR"} <= set(reader.texts["em"]) and "*SRCNN*" not in reader.texts["td"]
    assert "As & how." in reader.texts["p"] and any("sr-bench x <y>" in text for text in reader.texts["p"])
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html", "quality-1.png", "quality-2.png", "roofline.png", "scaling.png", "soak.png", "seams.png",
    }  # fmt: skip
    with Image.open(out / "roofline.png") as opened:
        assert opened.info["Source"] == plots.fingerprint(ROOFLINE) and opened.getextrema()[0][0] < 255


def test_every_shipped_result_has_tables():
    for path in RESULTS.glob("*.json"):
        for table in tables_of(page.read_result(path)):
            assert table.rows and all(len(row) == len(table.headings) for row in table.rows), path


def test_pictures_of_ones_own_are_shown_without_published_figures():
    means = {"psnr_y_db": 30.0, "ssim_y": 0.9, "colour_drift": 0.1, "grid_db": 0.2}
    rows = [{"dataset": "mine", "scale": 2, "method": "fast-x2", "means": means}]
    (table,) = tables_of({"kind": "quality", "rows": rows, "models": []})
    assert [row[0] for row in table.rows] == ["fast-x2"]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_every_kind_are_whole(kind):
    for table in tables_of(KINDS[kind]):
        assert table.rows and all(len(row) == len(table.headings) for row in table.rows)


def test_a_fingerprint_is_of_the_content():
    assert plots.fingerprint({"a": 1, "b": [2]}) == plots.fingerprint({"b": [2], "a": 1})
    assert plots.fingerprint({"a": 1}) != plots.fingerprint({"a": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "not a result of sr-bench"),
        ('{"kind": "other", "schema": 1}', "not a result of sr-bench quality"),
        ('{"kind": "soak", "schema": 2}', "has schema 2, this version reads 1"),
    ],
)
def test_other_files_are_one_line(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    result = run(path, "--out", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {path}") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_names_and_places_that_do_not_do_are_one_line(files, tmp_path):
    twice = tmp_path / "b"
    twice.mkdir()
    (twice / "soak.json").write_text(json.dumps(SOAK))
    result = run(*files, twice / "soak.json", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "soak: two results of one name" in result.stderr
    result = run(files[0], "--out", files[1])
    assert result.exit_code == 1 and "cannot be written" in result.stderr


def test_without_matplotlib_it_says_so(files, tmp_path, monkeypatch):
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run(files[0], "--out", tmp_path / "out")
    assert result.exit_code == 1 and "install sr-sdk[train]" in result.stderr
