from __future__ import annotations

import json
import threading

import bundles
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import soak
from benchmarks.cli import main
from sdk import ImageError, Upscaler

SHORT = soak.Settings(
    seconds=0.6, intervals=4, model=str(bundles.shared("blur")), backend="onnxruntime", precision="fp32"
)


def test_every_kind_is_asked_for_and_right():
    result = soak.run_soak(SHORT)
    totals = result["totals"]
    assert totals["wrong"] == totals["error"] == 0 and totals["right"] > 0
    assert result["first_error"] is None and len(result["intervals"]) == 4 and not result["interrupted"]
    kinds = {"rgb", "grey", "alpha", "uint16", "float32", "tiled", "factor"}
    assert {row["kind"] for row in result["rows"]} <= kinds and kinds | {"empty"} == {
        request.kind for request in soak.make_requests()
    }
    assert sum(each["requests"] for each in result["intervals"]) == sum(totals.values())
    assert result["intervals"][-1]["seconds"] >= 0.6


class Faulty(Upscaler):
    """From a moment on: wrong pixels of grey pictures, errors of those with alpha, and empty ones taken."""

    spoilt = threading.Event()

    def upscale(self, image, tile=None, **options):
        if not self.spoilt.is_set():
            return super().upscale(image, tile, **options)
        if image.size == 0:
            return image
        if image.ndim == 3 and image.shape[2] == 4:
            raise MemoryError("all gone")
        if image.ndim == 2:
            return super().upscale(image, tile, **options) ^ np.uint8(1)
        return super().upscale(image, tile, **options)


@pytest.mark.parametrize(("kind", "outcome"), [("grey", "wrong"), ("alpha", "error"), ("empty", "error")])
def test_faults_are_counted(kind, outcome, monkeypatch):
    monkeypatch.setattr(soak, "Upscaler", Faulty)
    requests = [each for each in soak.make_requests() if each.kind in (kind, "rgb")]
    monkeypatch.setattr(soak, "make_requests", lambda tiles: requests)
    Faulty.spoilt.clear()
    # The requests alone come first, then progress is told of each interval.
    result = soak.run_soak(SHORT, progress=lambda news: Faulty.spoilt.set() if "wrong" in news else None)
    assert result["totals"][outcome] > 0 and result["totals"]["right"] > 0
    expected = {"grey": None, "alpha": "alpha: MemoryError: all gone", "empty": "empty: was not refused"}
    assert result["first_error"] == expected[kind]


def test_a_refusal_of_a_good_picture_is_an_error(monkeypatch):
    class Refusing(Faulty):
        def upscale(self, image, tile=None, **options):
            if self.spoilt.is_set():
                raise ImageError("no")
            return super().upscale(image, tile, **options)

    monkeypatch.setattr(soak, "Upscaler", Refusing)
    requests = [each for each in soak.make_requests() if each.kind == "rgb"]
    monkeypatch.setattr(soak, "make_requests", lambda tiles: requests)
    Faulty.spoilt.clear()
    result = soak.run_soak(SHORT, progress=lambda news: Faulty.spoilt.set() if "wrong" in news else None)
    assert result["totals"]["error"] > 0 and result["first_error"] == "rgb: no"


def test_an_interrupted_soak_tells_what_it_found(monkeypatch):
    def interrupted(work):
        if not calls:
            calls.append(1)
            raise KeyboardInterrupt
        return wait(work)

    calls, wait = [], soak.wait
    monkeypatch.setattr(soak, "wait", interrupted)
    result = soak.run_soak(soak.Settings(**{**vars(SHORT), "seconds": 3600.0}))
    assert result["interrupted"] and len(result["intervals"]) == 1 and result["totals"]["error"] == 0


def test_a_model_that_cannot_be_tiled_is_asked_for_whole_pictures():
    assert "tiled" not in {request.kind for request in soak.make_requests(tiles=False)}


def test_drift_and_growth_by_hand():
    intervals = [
        {"rss_mib": rss, "latency": times}
        for rss, times in (
            (100, {"a": 2.0}), (130, {"a": 4.0, "b": 1.0}), (500, {"a": 90.0}), (500, {"b": 90.0}),
            (500, {"a": 90.0}), (500, {"a": 90.0}), (140, {"a": 6.0}), (151, {"a": 3.0}),
        )
    ]  # fmt: skip
    assert soak.growth(intervals) == 21
    assert soak.drift(intervals) == [
        {"kind": "a", "first": 3.0, "last": 4.5, "drift": 1.5},
        {"kind": "b", "first": 1.0, "last": None, "drift": None},
    ]
    assert soak.growth([{"rss_mib": None}]) is None


def test_command_writes_json_and_a_table(tmp_path):
    out = tmp_path / "soak.json"
    options = ["soak", "--minutes", 0.005, "--clients", 2, "--model", bundles.shared("blur"), "--json", out]
    result = CliRunner().invoke(main, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["clients"]) == (1, "soak", 2)
    assert "0 wrong, 0 error" in result.stdout and "growth of resident memory" in result.stdout


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-1"])
def test_command_ends_one_day(minutes):
    result = CliRunner().invoke(main, ["soak", f"--minutes={minutes}"])
    assert result.exit_code == 2 and "--minutes" in result.stderr
