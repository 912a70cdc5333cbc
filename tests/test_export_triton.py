"""Triton model repositories: held against Triton's own definition of a configuration, and run in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

from export import triton
from export.errors import ExportError
from export.triton import Options, render, write_repository
from sdk import Bundle, Upscaler, tiling
from sdk.backends.engine_cache import MAGIC, Key, read_engine, write_engine
from sdk.errors import BundleError, OptionError

ROOT = Path(__file__).parent.parent
PLAN = b"a plan" * 100


def model_config_pb2() -> Any:
    """Load Triton's definition out of tritonclient, without grpc, which that package would load with it."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    name = "tritonclient_model_config_pb2"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def parse(text: str) -> Any:
    """Read a configuration as Triton does: an unknown field or a value of another type is an error."""
    definition = model_config_pb2()
    from google.protobuf import text_format

    return text_format.Parse(text, definition.ModelConfig())


def read_config(model: Path) -> Any:
    return parse((model / "config.pbtxt").read_text(encoding="utf-8"))


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def write(bundle: Bundle, folder: Path, **options: Any) -> Path:
    """Write the repository of one stage, and give the model's folder."""
    (name,) = write_repository(bundle, folder, Options(**options))
    return folder / name


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(bundles.shared("unet"))


@pytest.fixture(scope="module")
def fast() -> Bundle:
    return Bundle.load("fast-x2")


# Configurations


def test_every_field_of_a_gpu_model(bundle, tmp_path):
    stage, halo = bundle.stage(), bundle.stage().context(error=1)
    model = write(bundle, tmp_path / "r", max_batch=4, window=96, instances=2, delay_us=500)
    config = read_config(model)
    definition = model_config_pb2()
    expected = definition.ModelConfig(
        name="unet-main", platform="onnxruntime_onnx", backend="onnxruntime", default_model_filename="model.onnx",
        max_batch_size=4,
        input=[definition.ModelInput(name="picture", data_type=definition.TYPE_UINT8, dims=[-1, -1, 3])],
        output=[definition.ModelOutput(name="result", data_type=definition.TYPE_UINT8, dims=[-1, -1, 3])],
        instance_group=[definition.ModelInstanceGroup(count=2, kind=definition.ModelInstanceGroup.KIND_GPU)],
        dynamic_batching=definition.ModelDynamicBatching(
            preferred_batch_size=[4], max_queue_delay_microseconds=500
        ),
        model_warmup=[warmup(definition, 1, 96), warmup(definition, 4, 96)],
    )  # fmt: skip
    facts = {
        "sr_bundle": "unet", "sr_stage": "main", "sr_scale": "2", "sr_stride": "8", "sr_halo": str(halo),
        "sr_window": "96", "sr_duty": triton.DUTY, "sr_precision": "fp16",
        "sr_model_sha256": stage.graph(precision="fp16", ends="uint8").file.sha256,
        "sr_weights_sha256": stage.weights.sha256, "sr_licence": "Apache-2.0", "sr_notice": "For tests.",
        "sr_sdk": triton.__version__, "cudnn_conv_algo_search": "1", "arena_extend_strategy": "1",
    }  # fmt: skip
    for key, value in facts.items():
        expected.parameters[key].string_value = value
    assert config == expected
    assert model.name == config.name


def warmup(definition: Any, batch: int, side: int) -> Any:
    data = definition.ModelWarmup.Input(data_type=definition.TYPE_UINT8, dims=[side, side, 3], random_data=True)
    return definition.ModelWarmup(name=f"{batch} of {side}x{side}", batch_size=batch, inputs={"picture": data})


def test_a_cpu_model_is_the_fp32_graph(bundle, tmp_path):
    config = read_config(write(bundle, tmp_path / "r", device="cpu"))
    assert config.instance_group[0].kind == model_config_pb2().ModelInstanceGroup.KIND_CPU
    facts = parameters(config)
    assert facts["sr_precision"] == "fp32" and facts["enable_mem_pattern"] == "0"
    assert facts["sr_model_sha256"] == bundle.stage().graph(precision="fp32", ends="uint8").file.sha256
    assert "cudnn_conv_algo_search" not in facts


def test_a_bundle_without_fp16_serves_fp32_on_gpus(bundle, tmp_path):
    stage = bundle.stage()
    graphs = tuple(graph for graph in stage.graphs if graph.precision == "fp32")
    bundle = replace(bundle, manifest=replace(bundle.manifest, stages=(replace(stage, graphs=graphs),)))
    assert parameters(read_config(write(bundle, tmp_path / "r")))["sr_precision"] == "fp32"


def test_a_batch_of_one_has_no_batcher(bundle, tmp_path):
    config = read_config(write(bundle, tmp_path / "r", max_batch=1))
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")
    assert [sample.batch_size for sample in config.model_warmup] == [1]


def test_what_triton_requires_of_batches_and_warm_ups_holds(fast, tmp_path):
    # ValidateModelConfig and GenerateWarmupData in triton-inference-server/core.
    names = write_repository(fast, tmp_path / "r", Options())
    for name in names:
        config = read_config(tmp_path / "r" / name)
        assert all(1 <= size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)
        for sample in config.model_warmup:
            assert 1 <= sample.batch_size <= config.max_batch_size
            assert set(sample.inputs) == {tensor.name for tensor in config.input}
            assert all(side > 0 and side % 8 == 0 for side in sample.inputs["picture"].dims[:2])


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_batches_and_windows_fit_into_the_budget(fast, device):
    stage = fast.stage()
    max_batch, window = triton._choose_sizes(stage, Options(device=device))
    assert max_batch == 8 and window % stage.stride == 0
    used = max_batch * window**2 * stage.activation_bytes * 1.5
    assert 0.95 * triton.BUDGET_BYTES[device] < used <= triton.BUDGET_BYTES[device]
    heavy = replace(stage, activation_bytes=100 * stage.activation_bytes)
    max_batch, window = triton._choose_sizes(heavy, Options(device=device))
    assert max_batch < 8 and window >= 2 * heavy.context(error=1) + 2 * heavy.stride
    assert triton._choose_sizes(heavy, Options(device=device, max_batch=8))[0] == 8
    assert triton._choose_sizes(stage, Options(device=device, window=64)) == (8, 64)


# Names and texts


TEXTS = ['"', "\\", "a\nb\r\t\0c", "'", "ü 照片 \U0001f600", "{ } [ ] # :", "\x7f\x85\u2028", '\\"\\n', "1\x001"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive(text):
    config = parse(render({"name": text, "parameters": [{"key": text, "value": {"string_value": text}}]}))
    assert config.name == text and parameters(config) == {text: text}


def test_values_of_all_kinds_survive():
    config = parse(
        render(
            {
                "max_batch_size": 3,
                "input": [{"name": "a", "dims": (-1, 2)}, {"name": "b", "dims": ()}],
                "optimization": {"cuda": {"graphs": True, "busy_wait_events": False}},
            }
        )
    )
    assert config.max_batch_size == 3 and [list(tensor.dims) for tensor in config.input] == [[-1, 2], []]
    assert config.optimization.cuda.graphs and not config.optimization.cuda.busy_wait_events


def test_wild_names_become_tame_ones(bundle, tmp_path):
    name, licence = '../a/b "c" ü', 'said "no"\\\nat all\tü'
    stages = tuple(replace(bundle.stage(), name=stage) for stage in ("1/2", "1:2", "照"))
    bundle = replace(bundle, manifest=replace(bundle.manifest, name=name, licence=licence, stages=stages))
    names = write_repository(bundle, tmp_path / "r", Options())
    assert names == ["a_b_c_-1_2", "a_b_c_-1_2_", "a_b_c"]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(names)
    for model, stage in zip(names, stages):
        config = read_config(tmp_path / "r" / model)
        facts = parameters(config)
        assert (config.name, facts["sr_bundle"], facts["sr_stage"]) == (model, name, stage.name)
        assert facts["sr_licence"] == licence


# The model


def test_every_stage_becomes_a_model(fast, tmp_path):
    assert write_repository(fast, tmp_path / "all", Options()) == ["fast-x2-96", "fast-x2-192"]
    assert write_repository(fast, tmp_path / "last", Options(stage="auto")) == ["fast-x2-192"]
    assert write_repository(fast, tmp_path / "one", Options(stage="96")) == ["fast-x2-96"]
    files = sorted(path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.*"))
    assert files == ["fast-x2-96/1/96.safetensors", "fast-x2-96/1/model.onnx", "fast-x2-96/config.pbtxt"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_model_gives_the_pixels_of_the_bundle(bundle, tmp_path, device):
    # Moved, so that only what stands in the repository can be read.
    model = write(bundle, tmp_path / "r", device=device, window=64).rename(tmp_path / "moved")
    precision = {"gpu": "fp16", "cpu": "fp32"}[device]
    graph = bundle.folder / bundle.stage().graph(precision=precision, ends="uint8").file.name
    served, original = session(model / "1" / "model.onnx"), session(graph)
    (picture,), (result,) = served.get_inputs(), served.get_outputs()
    assert (picture.name, picture.type, picture.shape[3]) == ("picture", "tensor(uint8)", 3)
    assert (result.name, result.type, result.shape[3]) == ("result", "tensor(uint8)", 3)
    assert all(isinstance(size, str) for size in (*picture.shape[:3], *result.shape[:3]))  # free, as the -1 says
    for shape in ((1, 8, 16, 3), (3, 64, 64, 3)):
        batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        (output,) = served.run(["result"], {"picture": batch})
        assert np.array_equal(output, original.run(None, {"picture": batch})[0])


def test_warm_ups_run_on_the_model(bundle, tmp_path):
    model = write(bundle, tmp_path / "r", max_batch=3, window=64)
    served = session(model / "1" / "model.onnx")
    for sample in read_config(model).model_warmup:
        shape = (sample.batch_size, *sample.inputs["picture"].dims)
        (output,) = served.run(["result"], {"picture": np.zeros(shape, np.uint8)})
        assert output.shape == (sample.batch_size, 128, 128, 3)


def test_a_client_that_does_its_duty_gets_what_the_runtime_gives(bundle, tmp_path, make_photo):
    model = write(bundle, tmp_path / "r", device="cpu", window=128)
    facts = parameters(read_config(model))
    scale, stride, halo, side = (int(facts[f"sr_{name}"]) for name in ("scale", "stride", "halo", "window"))
    picture = make_photo(203, 171)
    served = session(model / "1" / "model.onnx")
    plan = tiling.plan(picture.shape[:2], window=(side, side), overlap=tiling.Overlap(halo, stride))
    assert plan.count > 1
    padded = tiling.pad_to(picture[None], plan.padded)
    canvas = np.empty((1, plan.padded[0] * scale, plan.padded[1] * scale, 3), np.uint8)
    windows = [(0, columns) for columns in plan.columns]
    for rows in plan.rows:
        pieces = tiling.gather(padded[:, rows.start : rows.stop], windows)
        (outputs,) = served.run(["result"], {"picture": pieces})
        strip = canvas[:, rows.keep_start * scale : rows.keep_stop * scale]
        tiling.place(strip, outputs, windows, rows=rows, scale=scale)
    with Upscaler(bundle.folder, backend="onnxruntime", device="cpu", precision="fp32") as upscaler:
        whole = upscaler.upscale(picture)
    assert np.abs(canvas[0, :406, :342].astype(int) - whole).max() <= 1


# Engines


def engine_key(bundle: Bundle, **changes: Any) -> Key:
    stage = bundle.stage()
    key = Key(
        onnx=stage.graph(precision="fp16", ends="uint8").file.sha256, weights=stage.weights.sha256,
        library="tensorrt 10.9.0.34", gpu="NVIDIA L4", capability="8.9", precision="fp16", ends="uint8",
        profile=((1, 8, 8, 3), (1, 256, 256, 3), (4, 256, 256, 3)), flags=(),
    )  # fmt: skip
    return replace(key, **changes)


def write_own_engine(bundle: Bundle, folder: Path, **changes: Any) -> Path:
    write_engine(folder / "main.engine", engine_key(bundle, **changes), PLAN, built={})
    return folder / "main.engine"


def test_an_engine_of_the_cache_becomes_a_plan(bundle, tmp_path):
    model = write(bundle, tmp_path / "r", engine=write_own_engine(bundle, tmp_path))
    assert [path.name for path in (model / "1").iterdir()] == ["model.plan"]
    assert (model / "1" / "model.plan").read_bytes() == PLAN
    config = read_config(model)
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.default_model_filename == "model.plan"
    assert config.max_batch_size == 4 and list(config.dynamic_batching.preferred_batch_size) == [4]
    for message in (config.model_warmup, config.optimization.cuda.graph_spec):
        assert [sample.batch_size for sample in message] == [1, 4]
    assert all(list(sample.inputs["picture"].dims) == [256, 256, 3] for sample in config.model_warmup)
    cuda = config.optimization.cuda
    assert cuda.graphs and all(list(spec.input["picture"].dim) == [256, 256, 3] for spec in cuda.graph_spec)
    facts = parameters(config)
    assert facts["sr_engine"] == "tensorrt 10.9.0.34, NVIDIA L4, compute capability 8.9"
    assert facts["sr_precision"] == "fp16" and "cudnn_conv_algo_search" not in facts


def test_an_engine_is_used_inside_its_profile(bundle, tmp_path):
    engine = write_own_engine(bundle, tmp_path)
    config = read_config(write(bundle, tmp_path / "small", engine=engine, max_batch=2, window=64))
    assert config.max_batch_size == 2 and list(config.model_warmup[1].inputs["picture"].dims) == [64, 64, 3]
    for options in ({"max_batch": 5}, {"window": 264}):
        with pytest.raises(ExportError, match="at most 4 windows of 256 pixels"):
            write(bundle, tmp_path / "r", engine=engine, **options)


def test_an_engine_of_something_else_is_refused(bundle, tmp_path):
    for changes in ({"onnx": "0" * 64}, {"weights": "0" * 64}):
        with pytest.raises(ExportError, match="built for something else"):
            write(bundle, tmp_path / "r", engine=write_own_engine(bundle, tmp_path, **changes))
    float_graph = bundle.stage().graph(precision="fp32", ends="float32").file.sha256
    with pytest.raises(ExportError, match="8-bit graphs of stage main"):
        write(bundle, tmp_path / "r", engine=write_own_engine(bundle, tmp_path, onnx=float_graph))


def test_damaged_engines_are_refused(bundle, tmp_path):
    engine = write_own_engine(bundle, tmp_path)
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match="SHA-256 differs"):
        write(bundle, tmp_path / "r", engine=engine)
    header = b'{"key": {}, "sha256": ""}'
    for data in (whole[: len(MAGIC) + 10], MAGIC, MAGIC + len(header).to_bytes(4, "little") + header):
        engine.write_bytes(data)
        with pytest.raises(ExportError, match=r"damaged header|another format"):
            write(bundle, tmp_path / "r", engine=engine)
    profiles = asdict(engine_key(bundle))["profile"]
    for profile in (profiles[:2], ((1, 2), (1, 2), (1, 2)), (("a",) * 4,) * 3):
        with pytest.raises(ExportError, match="a key of another format"):
            write(bundle, tmp_path / "r", engine=write_own_engine(bundle, tmp_path, profile=profile))
    with pytest.raises(ExportError, match="cannot be read"):
        write(bundle, tmp_path / "r", engine=tmp_path / "missing.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["main.engine"]


def test_a_plan_of_others_needs_its_sizes(bundle, tmp_path):
    plan = tmp_path / "trtexec.plan"
    plan.write_bytes(PLAN)
    with pytest.raises(ExportError, match="give max_batch and window"):
        write(bundle, tmp_path / "r", engine=plan, window=64)
    model = write(bundle, tmp_path / "r", engine=plan, window=64, max_batch=2)
    assert (model / "1" / "model.plan").read_bytes() == PLAN
    assert "sr_engine" not in parameters(read_config(model))


def test_an_engine_is_of_one_stage(fast, tmp_path):
    plan = tmp_path / "trtexec.plan"
    plan.write_bytes(PLAN)
    with pytest.raises(ExportError, match="does not say of which stage it is; name one of 96, 192"):
        write_repository(fast, tmp_path / "r", Options(engine=plan))
    stage = fast.stage("192")
    graph = stage.graph(precision="fp16", ends="uint8").file.sha256
    changes = {"onnx": graph, "weights": stage.weights.sha256}
    engine = write_own_engine(fast, tmp_path, **changes)
    assert write_repository(fast, tmp_path / "r", Options(engine=engine)) == ["fast-x2-192"]


@pytest.mark.parametrize(
    "name,value",
    [
        ("profile", [[1, 8, 8, 3], [1, 8, 8, 3], [1, float("inf"), 8, 3]]),
        ("profile", [[-4, -5, -5, 3]] * 3),
        ("profile", [[0, 0, 0, 3]] * 3),
        ("profile", [[1, 8, 8, 3], [1, 8, 8, 3], [10**12, 8, 8, 3]]),
        ("profile", [[2, 8, 8, 3], [1, 8, 8, 3], [1, 8, 8, 3]]),
        ("onnx", []),
        ("precision", {"a": 1}),
        ("flags", [1]),
    ],
)
def test_headers_that_make_no_sense_are_refused(bundle, tmp_path, name, value):
    """Their plan is whole: the hash is of that alone."""
    engine = write_own_engine(bundle, tmp_path)
    data = engine.read_bytes()[len(MAGIC) :]
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    header["key"][name] = value
    text = json.dumps(header).encode()
    engine.write_bytes(MAGIC + len(text).to_bytes(4, "little") + text + data[4 + length :])
    with pytest.raises(ExportError, match="a key of another format"):
        write(bundle, tmp_path / "r", engine=engine)
    assert read_engine(engine, engine_key(bundle)) is None


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"}, {"max_batch": 0}, {"max_batch": 5000}, {"window": 0}, {"window": 12}, {"window": 1 << 20},
        {"instances": 0}, {"delay_us": -1}, {"stage": "none"}, {"device": "cpu", "engine": Path("x")},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(bundle, tmp_path, options):
    with pytest.raises(OptionError):
        write(bundle, tmp_path / "r", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(bundle, tmp_path):
    with pytest.raises(ExportError, match="exists already"):
        write(bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(bundle, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton.shutil, "copyfile", full)
    with pytest.raises(ExportError, match="No space left on device"):
        write(bundle, tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_told(bundle, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written"):
        write(bundle, tmp_path / "file" / "r")


def test_a_bundle_that_changed_since_it_was_opened_is_refused(tmp_path):
    bundle = Bundle.load(bundles.copy("blur", tmp_path))
    weights = bundle.folder / bundle.stage().weights.name
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ExportError, match="changed since the bundle was opened"):
        write(bundle, tmp_path / "r")


def test_a_graph_on_the_weights_of_another_stage_is_refused(tmp_path):
    bundle = Bundle.load(bundles.copy("blur", tmp_path))
    stage = bundle.stage()
    (bundle.folder / "other.weights").write_bytes((bundle.folder / stage.weights.name).read_bytes())
    other = replace(stage, weights=replace(stage.weights, name="other.weights"))
    bundle = replace(bundle, manifest=replace(bundle.manifest, stages=(other,)))
    with pytest.raises(BundleError, match=r"a tensor lies in 'main\.weights'"):
        write(bundle, tmp_path / "r")
    clash = replace(stage, weights=replace(stage.weights, name="model.onnx"))
    with pytest.raises(ExportError, match=r"called model\.onnx"):
        write(replace(bundle, manifest=replace(bundle.manifest, stages=(clash,))), tmp_path / "r")


def test_writing_takes_neither_torch_nor_onnx_nor_tritonclient(tmp_path):
    blocked = ["torch", "onnx", "onnxruntime", "google", "tritonclient", "tensorrt", "click"]
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from pathlib import Path\nfrom sdk import Bundle\nfrom export.triton import Options, write_repository\n"
        f"write_repository(Bundle.load(), Path({str(tmp_path / 'r')!r}), Options())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "r" / "fast-x2-192" / "config.pbtxt").is_file()
