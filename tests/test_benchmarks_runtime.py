from __future__ import annotations

import json

import numpy as np
import pytest
from bundles import shared
from click.testing import CliRunner
from PIL import Image

from benchmarks import memory, readme, runtime
from benchmarks.cli import main
from benchmarks.large import run_large
from benchmarks.pictures import draw_picture, read_picture
from benchmarks.report import measured, render
from benchmarks.runtime import PARTS, Figure, Settings, run_runtime
from benchmarks.tables import tables_of
from sdk import BackendError, BackendUnavailable, Bundle, ImageError, Upscaler

pytest.importorskip("onnxruntime")

TINY = {
    "repeats": 1,
    "sizes": ((16, 24),),
    "tiled_size": (48, 40),
    "photographs": 3,
    "rounds": 1,
    "memory_sizes": ((16, 24),),
    "small_pictures": 3,
    "starts": 1,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SR_CACHE_DIR", str(tmp_path / "cache"))


def settings(*parts: str, kind: str = "unet", **options) -> Settings:
    return Settings(model=str(shared(kind)), parts=parts, **{**TINY, **options})


def only_row(result):
    (row,) = result["rows"]
    return row


def test_a_figure_knows_whether_its_target_is_met():
    row = Figure("part", "case", 1.23456, "x", 1.2, {"a_ms": 1.00004, "b": [2.00006]}).row()
    assert row == {
        "part": "part",
        "case": "case",
        "value": 1.235,
        "unit": "x",
        "target": 1.2,
        "details": {"a_ms": 1.0, "b": [2.0001]},
        "met": False,
    }
    assert Figure("part", "case", 1.2, "x", 1.2).row()["met"] is True
    assert Figure("part", "case", 1.2, "x", None).row()["met"] is None


def test_overhead_is_a_ratio_to_the_bare_engine():
    row = only_row(run_runtime(settings("overhead")))
    details = row["details"]
    assert (row["case"], row["target"], details["windows"], details["window"]) == ("24x16", 1.15, 1, [16, 24])
    assert row["value"] == pytest.approx(details["upscale_ms"] / details["bare_ms"], rel=1e-2)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_bare_engine_gives_the_pixels_of_the_upscaler(backend):
    pytest.importorskip(backend)
    lr = draw_picture((16, 24))
    with Upscaler(shared("unet"), backend=backend) as upscaler:
        expected = upscaler.upscale(lr)
        bare = runtime.open_bare(Bundle.load(shared("unet")), upscaler.info, lr)()
    found = bare if isinstance(bare, np.ndarray) else next(iter(bare.values()))
    assert np.array_equal(found[0], expected)


def test_the_bare_engine_takes_no_picture_off_the_grid():
    with pytest.raises(BackendUnavailable, match="stride grid of 8"):
        runtime.open_bare(Bundle.load(shared("unet")), {}, draw_picture((16, 20)))


def test_tiled_tells_the_halos_share(monkeypatch):
    # Windows of 20 x 20, of which one pixel on each inner side is thrown away.
    monkeypatch.setattr("sdk.memory.window_pixels", lambda *arguments, **options: 400)
    pixel, halo = run_runtime(settings("tiled", kind="blur"))["rows"]
    details = pixel["details"]
    height, width = details["window"]
    assert details["windows"] > 1 and height * width <= 400
    share = 1 - 48 * 40 / (details["windows"] * height * width)
    assert halo["value"] == pytest.approx(100 * share, abs=1e-3) and halo["unit"] == "%"
    assert details["without_halo"] == pytest.approx(pixel["value"] * (1 - share), abs=1e-3)


def test_the_plan_is_that_of_the_upscaler(monkeypatch):
    monkeypatch.setattr("sdk.memory.window_pixels", lambda *arguments, **options: 400)
    picture = draw_picture((48, 40))
    with Upscaler(shared("blur")) as upscaler:
        upscaler.upscale(picture)
        assert upscaler.stats.tiles == runtime._plan(upscaler, (48, 40)).count


def test_many_states_its_bound():
    row = only_row(run_runtime(settings("many")))
    details = row["details"]
    steps_s = details["compute_cpu_s"] + details["decode_cpu_s"] + details["encode_cpu_s"]
    assert details["bound_s"] == pytest.approx(steps_s / details["cores"], abs=1e-3)
    assert (row["case"], row["target"]) == ("3 photographs", 1.1)


def test_photographs_are_seeded_crops(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "out"
    for path in (source, folder):
        path.mkdir()
    Image.fromarray(draw_picture((410, 30))).save(source / "narrow.png")
    Image.fromarray(draw_picture((900, 900))).save(source / "wide.png")
    chosen = settings(pictures=source)
    shapes = [read_picture(path).shape for path in runtime.write_photographs(chosen, folder)]
    assert shapes == [read_picture(path).shape for path in runtime.write_photographs(chosen, folder)]
    assert all(400 <= shape[0] <= 700 for shape in shapes)
    assert shapes[0][1] == shapes[2][1] == 30 and 400 <= shapes[1][1] <= 700


def test_a_file_that_fails_ends_the_measurement(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError):
        runtime._time_files(settings(), [tmp_path / "broken.jpg"])


def test_memory_is_counted_beyond_the_canvas():
    first, again, growth = run_runtime(settings("memory"))["rows"]
    canvas_mb = 16 * 24 * 4 * 3 / 1e6
    for row in (first, again):
        assert row["value"] == pytest.approx(row["details"]["peak_mb"] - canvas_mb, abs=1e-2)
        assert row["target"] == 300
    assert again["value"] >= first["value"]
    assert (growth["case"], growth["value"], growth["target"]) == ("3 small pictures", 0, 20)


def test_growth_is_from_the_hundredth_picture(monkeypatch):
    monkeypatch.setattr(runtime, "run_fresh", lambda activity, *arguments: [100.0, 130.0, 120.0])
    *_, growth = runtime.measure_memory(settings(memory_sizes=()))
    assert growth.value == pytest.approx(30 * 2**20 / 1e6)


def test_resident_memory_is_below_its_peak():
    rss_mib = memory.own_rss_mib()
    assert rss_mib is not None and 10 < rss_mib <= memory.own_peak_mib()


def test_start_times_new_processes():
    result = run_runtime(settings("start"))
    assert [(row["case"], row["target"]) for row in result["rows"]] == [
        ("import sdk, beyond numpy and PIL", 100),
        ("sr-upscale --help", 400),
        ("first result, warm cache", 2000),
        ("first result, empty cache", 2000),
    ]
    assert all(len(row["details"]["times_ms"]) == 1 and row["value"] > 0 for row in result["rows"])


def test_a_process_that_fails_is_an_error():
    with pytest.raises(BackendError, match="ValueError: of the child"):
        runtime._time_process("raise ValueError('of the child')")


def test_a_part_that_cannot_run_is_said(monkeypatch):
    def fail(settings):
        raise BackendUnavailable("not here")

    monkeypatch.setitem(PARTS, "start", fail)
    result = run_runtime(settings("start"))
    assert result["rows"] == [] and result["skipped"] == [{"part": "start", "reason": "not here"}]
    assert "skipped start: not here" in render(result)


def test_cli_writes_json_and_a_table(tmp_path):
    out = tmp_path / "runtime.json"
    arguments = ["runtime", "many", "--model", str(shared("unet")), "--photographs", "1", "--json", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["info"]["backend"]) == (
        1,
        "runtime",
        written["info"]["backend"],
    )
    assert "figure" in done.stdout and "many files / bound" in done.stdout and "compute_cpu_s" in done.stdout
    filled = readme.fill_tables("<!-- table runtime -->\n<!-- end -->", tmp_path)
    value, target = measured(only_row(written))
    assert f"| many files / bound | 1 photographs | {value} | {target} |" in filled
    assert target == "1.10 x"


def test_large_is_measured_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("pyvips")
    memory_row, time_row = run_large(str(shared("unet")), side=700, suffix="tif")["rows"]
    assert memory_row["case"] == time_row["case"] == "700x700 jpg -> 1400x1400 tif"
    assert 10 < memory_row["value"] < memory_row["target"] == pytest.approx(1610.6, abs=0.1)
    assert memory_row["details"]["target_mb"] > 0 and time_row["value"] > 0


def test_a_latency_table_shows_the_columns_that_were_measured():
    row = {
        "size": [2, 3],
        "contestant": "openvino bf16",
        "median_ms": 1.0,
        "p95_ms": 2.0,
        "output_mp_per_s": 3.0,
        "times_bilinear": 4.0,
        "speedup_over_onnxruntime_fp32": None,
        "peak_memory_mib": 5.0,
    }
    machine = {"cpu": "a processor", "usable_cores": 2, "gpus": [], "versions": {}}
    result = {"model": {"scale": 2}, "machine": machine, "command": "sr-bench latency"}
    (old,) = tables_of({"kind": "latency"} | result | {"rows": [row]})
    assert old.rows == [["3x2 -> 6x4", "openvino bf16", "1.0", "2.0", "3.0", "4.0", "5"]]
    new = row | {"speedup_over_pytorch_fp32": 8.125, "psnr_to_onnxruntime_fp32_db": 52.57}
    other = new | {"speedup_over_onnxruntime_fp32": 1.5}
    (table,) = tables_of({"kind": "latency"} | result | {"rows": [new, other]})
    assert [line[-5:] for line in table.rows] == [["4.0", shown, "8.12", "52.6", "5"] for shown in ("-", "1.50")]
