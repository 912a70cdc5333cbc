from __future__ import annotations

import json
import shutil

import bundles
import pytest
from click.testing import CliRunner

from benchmarks import scaling
from benchmarks.cli import main
from sdk.errors import BackendUnavailable

SMALL = scaling.Settings(
    model=str(bundles.shared("blur")), repeats=2, sides=(32, 64, 96), side=64, tiles=(16, 32), tile=16, batches=(1, 2),
    thread_side=32, backend="openvino", precision="fp32",
)  # fmt: skip


def test_the_exponent_of_known_laws():
    assert scaling.fit_exponent({1: 3.0, 2: 6.0, 4: 12.0}) == {"exponent": 1.0, "r2": 1.0}
    assert scaling.fit_exponent({1: 8.0, 4: 2.0})["exponent"] == -1.0
    assert scaling.fit_exponent(dict.fromkeys((1, 2, 3, 4, 6, 8), 7.7)) == {"exponent": 0.0, "r2": None}
    assert scaling.fit_exponent({1: 3.0, 2: 6.0}) == {"exponent": 1.0, "r2": None}
    assert scaling.fit_exponent({2: 5.0}) == {"exponent": None, "r2": None}
    rough = scaling.fit_exponent({1: 1.0, 2: 3.0, 4: 2.0})
    # Slope and r2 of (0, 0), (1, log2 3), (2, 1): 1/2 and (1/2)**2 * 2 / sum((y - mean)**2).
    assert rough["exponent"] == pytest.approx(0.5) and rough["r2"] == pytest.approx(0.3892, abs=1e-4)


def test_counts_of_cores_rise_to_all():
    assert [scaling.rising_counts(cores) for cores in (1, 2, 3, 4, 6)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4, 6),
    ]  # fmt: skip


def test_every_axis_is_timed_and_fitted():
    result = scaling.run_scaling(SMALL)
    points = {axis: [row["value"] for row in result["rows"] if row["axis"] == axis] for axis in scaling.AXES}
    assert points["pixels"] == [1024, 4096, 9216] and points["tile"] == [16, 32] and points["batch"] == [1, 2]
    assert points["threads"][0] == 1 and result["skipped"] == []
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in result["rows"])
    assert list(result["fits"]) == list(scaling.AXES) and result["info"]["backend"] == "openvino"


def test_every_point_has_an_engine_of_its_own(monkeypatch):
    """One that served all would compile again and again for shapes that come in turns."""
    opened = []

    class Counting(scaling.Upscaler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            opened.append(options["batch"])

    monkeypatch.setattr(scaling, "Upscaler", Counting)
    assert list(scaling.time_pixels(SMALL)) == [1024, 4096, 9216] and opened == ["auto"] * 3
    assert list(scaling.time_batches(SMALL)) == [1, 2] and opened[3:] == [1, 2]


def test_an_axis_that_cannot_be_timed_is_told(monkeypatch):
    def refuse(settings):
        raise BackendUnavailable("not here")

    monkeypatch.setitem(scaling.AXES, "threads", refuse)
    result = scaling.run_scaling(scaling.Settings(**{**vars(SMALL), "axes": ("threads", "batch")}))
    assert result["skipped"] == [{"axis": "threads", "reason": "not here"}] and list(result["fits"]) == ["batch"]


def test_a_model_that_cannot_be_tiled_is_timed_whole(tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(bundles.shared("blur"), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for stage in manifest["stages"]:
        stage["halo"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    options = {**vars(SMALL), "model": str(folder), "axes": ("tile", "pixels", "pixels")}
    result = scaling.run_scaling(scaling.Settings(**options))
    assert [item["axis"] for item in result["skipped"]] == ["tile"]
    assert [row["axis"] for row in result["rows"]] == ["pixels"] * 3


def test_command_writes_json_and_a_table(monkeypatch, tmp_path):
    monkeypatch.setitem(scaling.AXES, "tile", lambda settings: {32: [4.0, 6.0], 64: [2.0, 3.0], 128: [1.0, 1.5]})
    out = tmp_path / "scaling.json"
    result = CliRunner().invoke(main, ["scaling", "tile", "--repeats", "2", "--json", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["repeats"]) == (1, "scaling", 2)
    assert written["fits"] == {"tile": {"exponent": -1.0, "r2": 1.0}}
    assert "tile: time ~ tile ** -1.00 (r2 1.000)" in result.stdout


def test_command_tells_a_wrong_model_in_one_line(tmp_path):
    result = CliRunner().invoke(main, ["scaling", "--model", str(tmp_path / "gone")])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
