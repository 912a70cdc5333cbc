from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import cli, contestants, cores, device_memory, latency, plain, torch_eager
from benchmarks.bilinear import bilinear_bundle
from benchmarks.cli import main
from benchmarks.contestants import BASELINE, CONTESTANTS, EAGER, REFERENCE, Contestant, Setup
from benchmarks.latency import Memory
from benchmarks.machine import machine_facts
from benchmarks.memory import measure_peak_mib
from benchmarks.pictures import BILINEAR, draw_picture, enlarge
from benchmarks.report import table
from benchmarks.result import result_head
from benchmarks.timing import WARM_UPS, Timing, summarise, take_turns
from sdk import BackendUnavailable, BundleError, OptionError, SRError, Upscaler, bundle

SHIPPED = bundle.MODELS_DIR / bundle.DEFAULT_MODEL / bundle.MANIFEST
OPENVINO = Contestant("openvino", "cpu", "fp32")


class FakeUpscaler:
    """ONNX Runtime on the CPU alone, at scale 2."""

    def __init__(self, model=None, *, backend, device, precision, stage, batch):
        if precision == "fp16":
            raise BundleError("no fp16 graph")
        if (backend, device, precision) != ("onnxruntime", "cpu", "fp32"):
            raise BackendUnavailable(f"no {backend} here")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def upscale(self, image):
        return image.repeat(2, axis=0).repeat(2, axis=1)

    def upscale_batch(self, images):
        return [self.upscale(image) for image in images]


@pytest.fixture
def fake_model(monkeypatch):
    stage = SimpleNamespace(name="96", weights=SimpleNamespace(sha256="0" * 64))
    manifest = SimpleNamespace(name="fake", scale=2, training={"parameters": 7})
    loaded = SimpleNamespace(manifest=manifest, stage=lambda name: stage)
    monkeypatch.setattr(contestants, "Upscaler", FakeUpscaler)
    monkeypatch.setattr(contestants, "Bundle", SimpleNamespace(load=lambda model: loaded))
    monkeypatch.setattr(latency, "Bundle", SimpleNamespace(load=lambda model: loaded))
    monkeypatch.setattr(latency, "measure_peak_mib", lambda *arguments: 12.34)
    offered = tuple(each for each in CONTESTANTS if each.engine in ("bilinear", "onnxruntime", "openvino"))
    monkeypatch.setattr(contestants, "CONTESTANTS", offered)


def test_summarise_known_samples():
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 102.0))
    assert summarise(samples) == Timing(median_ms=51, p95_ms=96, p99_ms=100, min_ms=1, max_ms=101)


def test_summarise_one_sample():
    assert summarise([7.5]) == Timing(7.5, 7.5, 7.5, 7.5, 7.5)


def test_rows_hold_throughput_and_ratios():
    timings = {
        BASELINE: Timing(2, 2, 2, 2, 2),
        REFERENCE: Timing(40, 50, 55, 30, 60),
        OPENVINO: Timing(10, 11, 11.5, 9, 12),
        EAGER: Timing(80, 80, 80, 80, 80),
    }
    rows = latency.make_rows(
        timings,
        dict.fromkeys(timings, Memory(100.04, None)),
        {OPENVINO: 52.567},
        {OPENVINO: 1.23456},
        size=(250, 500),
        scale=2,
    )
    assert rows[2] == {
        "size": [250, 500],
        "contestant": "openvino fp32",
        "engine": "openvino",
        "device": "cpu",
        "precision": "fp32",
        "median_ms": 10,
        "p95_ms": 11,
        "p99_ms": 11.5,
        "min_ms": 9,
        "max_ms": 12,
        "output_mp_per_s": 50,
        "times_bilinear": 5,
        "speedup_over_onnxruntime_fp32": 4,
        "speedup_over_pytorch_fp32": 8,
        "psnr_to_onnxruntime_fp32_db": 52.57,
        "peak_memory_mib": 100.0,
        "peak_device_mib": None,
        "energy_j": 1.2346,
    }
    assert rows[0]["energy_j"] is None
    assert rows[1]["speedup_over_onnxruntime_fp32"] == rows[0]["times_bilinear"] == 1


def test_rows_without_the_reference_have_no_speedup():
    timings = {BASELINE: Timing(2, 2, 2, 2, 2), OPENVINO: Timing(10, 11, 12, 9, 12)}
    rows = latency.make_rows(timings, dict.fromkeys(timings, Memory(1.0, None)), {}, {}, size=(16, 16), scale=2)
    for key in ("speedup_over_onnxruntime_fp32", "speedup_over_pytorch_fp32", "psnr_to_onnxruntime_fp32_db"):
        assert [row[key] for row in rows] == [None, None]


def test_contestants_have_distinct_names():
    names = [contestant.name for contestant in CONTESTANTS]
    assert len(set(names)) == len(names)
    assert names[0] == "bilinear" and {"onnxruntime fp32", "openvino bf16", "pytorch compiled bf16"} <= set(names)


def test_contestants_are_chosen_by_name_beside_the_baseline():
    assert contestants.choose(()) == CONTESTANTS
    assert contestants.choose(("openvino bf16", "lanczos")) == (
        BASELINE, Contestant("lanczos", "cpu", "uint8"), Contestant("openvino", "cpu", "bf16"),
    )  # fmt: skip
    result = CliRunner().invoke(main, ["latency", "--contestant", "opencv"])
    assert result.exit_code == 1 and "no contestant is called 'opencv'; there are bilinear, bicubic" in result.stderr


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_bilinear_through_an_engine_is_bilinear(backend, scale):
    pytest.importorskip(backend)
    pytest.importorskip("onnx")
    lr = draw_picture((70, 90))
    expected = enlarge(lr, scale, resample=BILINEAR).astype(int)
    with bilinear_bundle(scale) as folder, Upscaler(folder, backend=backend, device="cpu", precision="fp32") as made:
        for tile in (None, 32):
            assert np.abs(made.upscale(lr, tile=tile) - expected).max() <= 1
    assert not folder.exists()


def test_bilinear_in_half_precision_is_bilinear():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    lr = draw_picture((70, 90))
    with bilinear_bundle(2) as folder:
        session = onnxruntime.InferenceSession(folder / "main.fp16.uint8.onnx", providers=["CPUExecutionProvider"])
        result = session.run(None, {"picture": lr[None]})[0][0]
    assert np.abs(result - enlarge(lr, 2, resample=BILINEAR).astype(int)).max() <= 1


def test_bilinear_through_an_engine_is_a_contestant(fake_model):
    with ExitStack() as stack:
        runner = contestants.open_contestant(Contestant("bilinear through onnxruntime", "cpu", "fp32"), Setup(), stack)
        assert runner(np.zeros((4, 5, 3), np.uint8)).shape == (8, 10, 3)


class FakeGpu:
    """Has less free memory each time but the last."""

    def __init__(self):
        self.left = [900, 500, 700]
        self.looked = threading.Event()

    def current(self):
        return nullcontext()

    def free_bytes(self):
        if len(self.left) == 1:
            self.looked.set()
            return self.left[0] << 20
        return self.left.pop(0) << 20


def test_device_memory_is_what_is_gone_at_the_worst(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(device_memory, "open_device", lambda index: gpu)
    with device_memory.watch_device("cuda:1") as taken_mib:
        assert gpu.looked.wait(60)
    assert taken_mib() == 400


def test_device_memory_is_not_told_where_it_cannot_be_read(monkeypatch):
    def fail(index):
        raise BackendUnavailable("no library")

    monkeypatch.setattr(device_memory, "open_device", fail)
    for device in ("cpu", "cuda:0"):
        with device_memory.watch_device(device) as taken_mib:
            assert taken_mib() is None


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "opencv bilinear", "opencv lanczos"])
def test_interpolations_keep_a_ramp(name):
    if name.startswith("opencv"):
        pytest.importorskip("cv2")
    ramp = np.arange(0, 200, 4, np.uint8)[None, :, None].repeat(30, axis=0).repeat(3, axis=2)
    (contestant,) = (each for each in CONTESTANTS if each.name == name)
    with ExitStack() as stack:
        result = contestants.open_contestant(contestant, Setup(model="fast-x2"), stack)(ramp)
    assert result.shape == (60, 100, 3) and result.dtype == np.uint8
    inner = result[20:40, 20:80].astype(int)
    assert np.abs(np.diff(inner, axis=1) - 2).max() <= 1 and not np.ptp(inner, axis=0).any()


def test_without_opencv_it_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendUnavailable, match="OpenCV is not installed"), ExitStack() as stack:
        contestants.open_contestant(Contestant("opencv bicubic", "cpu", "uint8"), Setup(), stack)


@pytest.mark.parametrize(("engine", "precision"), [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")])
def test_a_plain_engine_gives_the_pixels_of_the_sdk(engine, precision):
    picture = draw_picture((45, 70))
    results = []
    with ExitStack() as stack:
        for name in (engine, f"plain {engine}"):
            try:
                run = contestants.open_contestant(Contestant(name, "cpu", precision), Setup(model="fast-x2"), stack)
            except BackendUnavailable as exc:
                pytest.skip(str(exc))
            results.append(run(picture).astype(int))
    assert results[0].shape == (90, 140, 3)
    # Padded in another way, so the last pixels before the padding see something else.
    inner = [result[:40, :40] for result in results]
    assert np.abs(inner[0] - inner[1]).max() <= (1 if precision == "fp32" else 3)


@pytest.mark.parametrize(
    "name",
    ["bilinear", "opencv bicubic", "onnxruntime fp32", "openvino fp32", "plain onnxruntime fp32", "plain openvino fp32",
     "pytorch fp32"],
)  # fmt: skip
def test_a_batch_gives_the_pixels_of_its_pictures(name):
    (contestant,) = (each for each in CONTESTANTS if each.name == name)
    pictures = np.stack([draw_picture((45, 70), seed=seed) for seed in range(3)])
    with ExitStack() as stack:
        try:
            run = contestants.open_contestant(contestant, Setup(model="fast-x2", batch=3), stack)
        except BackendUnavailable as exc:
            pytest.skip(str(exc))
        together, alone = run(pictures), [run(picture) for picture in pictures]
    assert together.shape == (3, 90, 140, 3)
    # An engine may add in another order.
    assert np.abs(together - np.stack(alone).astype(int)).max() <= 1


def test_batches_and_stages_are_axes(fake_model, tmp_path):
    out = tmp_path / "latency.json"
    command = ["latency", "--size", "16x16", "--repeats", "1", "--batch", "1", "--batch", "3", "--json", str(out)]
    result = CliRunner().invoke(main, [*command, "--stage", "96"])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["stage"], row["batch"], row["contestant"]) for row in rows] == [
        ("96", 1, "bilinear"), ("96", 1, "onnxruntime fp32"), ("96", 3, "bilinear"), ("96", 3, "onnxruntime fp32"),
    ]  # fmt: skip
    assert rows[2]["output_mp_per_s"] == pytest.approx(3 * 32 * 32 / 1e6 / rows[2]["median_ms"] * 1e3, rel=0.01)
    assert "16x16 -> 32x32, 3 at once" in result.output


def test_turns_are_interleaved():
    calls = []
    runners = {contestant: partial(calls.append, contestant.name) for contestant in (BASELINE, REFERENCE)}
    samples = take_turns(runners, repeats=3, pause_s=0)
    warm_up = ["bilinear"] * WARM_UPS + ["onnxruntime fp32"] * WARM_UPS
    assert calls == warm_up + (["bilinear"] * 2 + ["onnxruntime fp32"] * 2) * 3
    assert [len(times_ms) for times_ms in samples.values()] == [3, 3]


def test_results_are_compared_with_the_reference():
    def runner(value):
        return lambda lr: np.full_like(lr, value)

    runners = {BASELINE: runner(0), REFERENCE: runner(10), OPENVINO: runner(15), EAGER: runner(200)}
    found = latency.compare_results(runners, draw_picture((16, 16)))
    assert found == {OPENVINO: pytest.approx(10 * np.log10(255**2 / 25), abs=1e-9)}
    del runners[REFERENCE]
    assert latency.compare_results(runners, draw_picture((16, 16))) == {}


def test_who_fails_at_a_size_is_left_out_there():
    def fail(lr: np.ndarray) -> np.ndarray:
        if len(lr) > 16:
            raise MemoryError if lr.shape[1] > 16 else RuntimeError("std::bad_alloc\nand more")
        return lr

    runners = {BASELINE: lambda lr: lr, OPENVINO: fail}
    assert latency.try_all(runners, draw_picture((16, 16))) == (runners, [])
    for size, reason in (((32, 16), "32x16: std::bad_alloc"), ((32, 32), "32x32: MemoryError")):
        able, unable = latency.try_all(runners, draw_picture(size))
        assert able == {BASELINE: runners[BASELINE]}
        assert unable == [{"contestant": "openvino fp32", "reason": reason}]


def test_drawn_picture_is_seeded_and_detailed():
    picture = draw_picture((40, 56))
    assert picture.shape == (40, 56, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, draw_picture((40, 56)))
    assert not np.array_equal(picture, draw_picture((40, 56), seed=2))
    assert picture.std() > 20


def allocate(mib: int) -> None:
    bytearray(b"x") * (mib << 20)


def fail() -> None:
    raise OptionError("from the child")


def test_peak_memory_is_that_of_the_activity_alone():
    held = bytearray(b"x") * (300 << 20)  # by this process, not by the measured one
    small, large = measure_peak_mib(allocate, 1), measure_peak_mib(allocate, 200)
    assert len(held) and small < 300
    # Pages of the interpreter itself differ by a few MiB from one process to the next.
    assert large - small == pytest.approx(199, abs=20)


def test_peak_memory_passes_errors_on():
    with pytest.raises(OptionError, match="from the child"):
        measure_peak_mib(fail)


def test_machine_facts_are_json_without_paths():
    facts = machine_facts()
    text = json.dumps(facts)
    assert facts["cores"] >= 1 and facts["versions"]["numpy"] == np.__version__
    assert os.uname().nodename not in (facts["cpu"], facts["system"]) and str(cores.__file__) not in text


def test_result_names_the_command_without_folders(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "sr-bench"), "latency", "--json", str(tmp_path / "out.json")])
    assert result_head("latency", protocol="")["command"] == "sr-bench latency --json out.json"


def test_table_aligns_columns():
    assert table(["name", "ms"], [["a", "1.5"], ["longer", "20"]]) == "name     ms\na       1.5\nlonger   20"


def test_cli_writes_json_and_a_table(fake_model, tmp_path):
    out = tmp_path / "latency.json"
    arguments = ["latency", "--size", "16x24", "--size", "32x32", "--repeats", "2", "--json", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert (written["schema"], written["kind"], written["repeats"]) == (1, "latency", 2)
    assert written["model"] == {
        "name": "fake", "scale": 2, "stage": "96", "weights_sha256": "0" * 64, "parameters": 7, "kmac_per_pixel": None,
    }  # fmt: skip
    assert written["torch_weights"].startswith("random")
    assert [row["size"] for row in written["rows"]] == [[16, 24], [16, 24], [32, 32], [32, 32]]
    assert [row["contestant"] for row in written["rows"][:2]] == ["bilinear", "onnxruntime fp32"]
    assert all(row["peak_memory_mib"] == 12.3 for row in written["rows"])
    assert {"contestant": "openvino fp32", "reason": "no openvino here"} in written["skipped"]
    assert {"contestant": "onnxruntime fp16 cuda:0", "reason": "no fp16 graph"} in written["skipped"]
    assert "24x16 -> 48x32" in result.stdout
    assert "skipped openvino fp32: no openvino here" in result.stdout


def test_memory_that_cannot_be_measured_loses_no_time(fake_model, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory\nand so on")

    monkeypatch.setattr(latency, "measure_peak_mib", fail)
    result = latency.run_latency(latency.Settings(sizes=((16, 16),), repeats=1))
    assert [row["peak_memory_mib"] for row in result["rows"]] == [None, None]
    assert {"contestant": "bilinear", "reason": "peak memory: out of memory"} in result["skipped"]


@pytest.mark.parametrize("loaded", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_plain_onnxruntime_never_runs_on_the_cpu_for_a_gpu(monkeypatch, loaded):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = SimpleNamespace(get_providers=lambda: loaded, get_inputs=lambda: [SimpleNamespace(name="x")])
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda graph, providers: asked.append(providers) or session)
    if len(loaded) == 1:
        with pytest.raises(BackendUnavailable, match="cannot be loaded"):
            plain.open_onnxruntime(bundle.Bundle.load(None), device="cuda:1", precision="fp16")
    else:
        plain.open_onnxruntime(bundle.Bundle.load(None), device="cuda:1", precision="fp16")
    assert asked == [[("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]]


def test_references_are_those_of_the_same_device():
    here, there = REFERENCE, Contestant("onnxruntime", "cuda:0", "fp32")
    half = Contestant("tensorrt", "cuda:0", "fp16")
    timings = {each: Timing(*(5 * [ms])) for each, ms in ((BASELINE, 2.0), (here, 40.0), (there, 4.0), (half, 1.0))}
    memory = dict.fromkeys(timings, Memory(1.0, 2.0))
    rows = latency.make_rows(timings, memory, {}, {}, size=(16, 16), scale=2)
    assert [row["speedup_over_onnxruntime_fp32"] for row in rows] == [20, 1, 1, 4]


@pytest.mark.parametrize("size", ["256", "256x", "8x256", "256x9000", "axb", "-16x16"])
def test_cli_refuses_a_bad_size(size):
    result = CliRunner().invoke(main, ["latency", f"--size={size}"])
    assert result.exit_code == 2
    assert "is not a size such as 256x256" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "no-such-model"],
        ["--json", "no/such/folder/out.json"],
        ["--threads", "100000"],
    ],
)
def test_cli_tells_an_error_in_one_line(arguments):
    result = CliRunner().invoke(main, ["latency", *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")


def test_cli_tells_a_missing_picture(fake_model):
    result = CliRunner().invoke(main, ["latency", "--picture", "missing.png"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: missing.png")


def test_cli_limits_threads_before_it_measures(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "limit_threads", lambda count: calls.append(count))

    def run_latency(settings, *, progress):
        calls.append(settings.setup.threads)
        raise SRError("enough")

    monkeypatch.setattr(latency, "run_latency", run_latency)
    assert CliRunner().invoke(main, ["latency", "--threads", "1"]).exit_code == 1
    assert calls == [1, 1]


def test_engines_that_leave_their_cores_are_skipped(fake_model, monkeypatch):
    threads = itertools.count()
    monkeypatch.setattr(contestants, "strays", lambda: {next(threads)})
    monkeypatch.setattr(FakeUpscaler, "close", lambda self: None, raising=False)
    result = latency.run_latency(latency.Settings(sizes=((16, 16),), repeats=1, setup=Setup(threads=1)))
    reasons = {item["contestant"]: item["reason"] for item in result["skipped"]}
    assert "does not keep to the cores" in reasons["onnxruntime fp32"]
    assert result["rows"][0]["speedup_over_onnxruntime_fp32"] is None


@pytest.mark.skipif(not os.path.isdir(cores.TASKS), reason="only Linux ties a process to cores")
def test_limit_threads_holds_every_thread_of_a_process():
    measure_peak_mib(check_limit)


def check_limit() -> None:
    cores.limit_threads(1)
    assert len(os.sched_getaffinity(0)) == 1 and os.environ["SR_THREADS"] == "1"
    assert not cores.strays()


def network_bundle():
    model = {"name": "fast", "scales": [2], "options": {"channels": 4, "blocks": [1, 1, 1]}}
    stage = SimpleNamespace(name="96")
    manifest = SimpleNamespace(scale=2, training={"recipe": {"model": model}})
    return SimpleNamespace(manifest=manifest, stage=lambda name: stage)


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_torch_network_enlarges_any_size(precision, compiled):
    pytest.importorskip("torch")
    upscale = torch_eager.open_network(network_bundle(), run=None, device="cpu", precision=precision, compiled=compiled)
    flat = np.full((37, 50, 3), 130, np.uint8)
    # An untrained fast U-Net interpolates: a flat picture stays flat.
    assert np.array_equal(upscale(flat), np.full((74, 100, 3), 130, np.uint8))


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    torch = pytest.importorskip("torch")

    def compile(network, **options):
        def fail(*inputs):
            raise RuntimeError("no C++ compiler\nsecond line")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(BackendUnavailable, match=r"^torch.compile failed: no C\+\+ compiler$"):
        torch_eager.open_network(network_bundle(), run=None, device="cpu", precision="bf16", compiled=True)


def test_torch_network_with_batch_norm_is_folded():
    pytest.importorskip("torch")
    bundle = network_bundle()
    bundle.manifest.training["recipe"]["model"] = {"name": "perceptual-unet", "scales": [2]}
    upscale = torch_eager.open_network(bundle, run=None, device="cpu", precision="fp32")
    assert upscale(np.full((16, 24, 3), 130, np.uint8)).shape == (32, 48, 3)


def test_torch_network_takes_the_weights_of_a_run(tmp_path):
    torch = pytest.importorskip("torch")
    from train.checkpoint import Checkpoint, save_checkpoint, stage_folder
    from train.models import build_model
    from train.recipe import recipe_from_dict

    bundle = network_bundle()
    network = build_model(recipe_from_dict(bundle.manifest.training["recipe"]).model, weights="random")
    torch.nn.init.constant_(network.tail.bias, 10 / 255)
    tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
    save_checkpoint(stage_folder(tmp_path, "96"), Checkpoint(tensors, bundle.manifest.training))
    upscale = torch_eager.open_network(bundle, run=tmp_path, device="cpu", precision="fp32")
    assert np.array_equal(upscale(np.full((16, 16, 3), 100, np.uint8)), np.full((32, 32, 3), 110, np.uint8))
    assert torch_eager.describe_weights(tmp_path) == f"run {tmp_path.name}"


def test_torch_network_needs_a_run_that_fits(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(OptionError, match="does not fit this model"):
        torch_eager.open_network(network_bundle(), run=tmp_path, device="cpu", precision="fp32")


def test_torch_network_needs_a_recipe():
    pytest.importorskip("torch")
    bundle = network_bundle()
    bundle.manifest.training.clear()
    with pytest.raises(BackendUnavailable, match="give --run"):
        torch_eager.open_network(bundle, run=None, device="cpu", precision="fp32")


@pytest.mark.skipif(not SHIPPED.is_file(), reason="sdk/models/fast-x2 is not there")
def test_shipped_model_is_timed_on_every_engine():
    pytest.importorskip("onnxruntime")
    chosen = tuple(each.name for each in CONTESTANTS if "compiled" not in each.name)  # its compiler takes long
    result = latency.run_latency(latency.Settings(sizes=((32, 48),), repeats=1, contestants=chosen))
    names = {row["contestant"] for row in result["rows"]}
    assert {"bilinear", "lanczos", "onnxruntime fp32", "plain onnxruntime fp32"} <= names
    assert len(result["rows"]) + len(result["skipped"]) == len(chosen)
    # The same graph on the same engine: what the SDK adds does not touch the pixels.
    psnr_db = {row["contestant"]: row["psnr_to_onnxruntime_fp32_db"] for row in result["rows"]}
    assert psnr_db["plain onnxruntime fp32"] > 90
    assert all(row["median_ms"] > 0 and row["peak_memory_mib"] > 10 for row in result["rows"])
