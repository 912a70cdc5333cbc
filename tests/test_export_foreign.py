"""Import of other people's ONNX files: what is probed, the bundle's pixels, and what is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_models import Foreign, Nodes, run_directly, write_graph
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import sdk
from export import verify
from export.errors import ExportError
from export.foreign import import_onnx, importing, probing, reading
from export.foreign.converting import convert
from export.foreign.session import Session
from sdk import Bundle, SRError, Upscaler
from sdk.errors import BackendError

MODELS = Path(sdk.__file__).parent / "models"
PICTURE = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
F = np.float32
ANY = ["n", 3, "h", "w"]
MEAN_OF_TWO = (np.eye(3, 6) + np.eye(3, 6, 3))[:, :, None, None] / 2  # of a convolution: pictures side by side


def resize_down_and_up(graph: Nodes, y: str) -> str:
    """Mix with blocks of two by two, whose size is computed in floats: any size runs, even ones shift."""
    small = graph.add("Resize", y, "", graph.tensor([1, 1, 0.5, 0.5]), mode="nearest")
    floats = graph.add("Mul", graph.add("Cast", graph.add("Shape", y), to=TensorProto.FLOAT), graph.tensor(1))
    large = graph.add("Resize", small, "", "", graph.add("Cast", floats, to=TensorProto.INT64), mode="nearest")
    return graph.add("Conv", graph.add("Concat", y, large, axis=1), graph.tensor(MEAN_OF_TWO))


def through_single(graph: Nodes, y: str) -> str:
    """Cast fp16 to fp32 and back, as converters leave it around operators without fp16."""
    return graph.add("Cast", graph.add("Cast", y, to=TensorProto.FLOAT), to=TensorProto.FLOAT16)


# What the file is -> what must be found: (layout, scale, white, stride).
VARIANTS = {
    "x2": (Foreign(), ("NCHW", 2, 1, 1)),
    "x3 nhwc 255 opset 13": (Foreign(scale=3, layout="NHWC", white=255, opset=13), ("NHWC", 3, 255, 1)),
    "x4 stride 4 fixed size": (Foreign(scale=4, downsampling=4, size=(40, 48), batch=1), ("NCHW", 4, 1, 4)),
    "x1 opset 11": (Foreign(scale=1, downsampling=2, opset=11), ("NCHW", 1, 1, 2)),
    "x2 opset 9": (Foreign(opset=9, upsampling="Upsample"), ("NCHW", 2, 1, 1)),
    "x3 opset 20 computed sizes": (Foreign(scale=3, opset=20, tail=resize_down_and_up), ("NCHW", 3, 1, 2)),
    "x2 half 255": (Foreign(half=True, white=255, tail=through_single), ("NCHW", 2, 255, 1)),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Measure halos of a few pixels on small pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "FIRST_SIDE", 96)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """One small photograph."""
    folder = tmp_path_factory.mktemp("photos")
    source = Path(verify.__file__).parent / "pictures" / "chelsea.webp"
    Image.open(source).convert("RGB").resize((96, 96)).save(folder / "cat.png")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, photos):
    """Give (file, bundle, lines that were reported) of a variant, imported once."""
    made = {}

    def get(variant: str) -> tuple[Path, Bundle, list[str]]:
        if variant not in made:
            folder = tmp_path_factory.mktemp("foreign")
            path, lines = VARIANTS[variant][0].write(folder / "model.onnx"), []
            import_onnx(path, folder / "bundle", pictures=photos, report=lines.append)
            made[variant] = path, Bundle.load(folder / "bundle"), lines
        return made[variant]

    return get


@pytest.fixture
def refusal(tmp_path, photos):
    """Import a file that must be refused, without leaving anything; give the message."""

    def refuse(path: Path, **options) -> str:
        options = {"pictures": photos} | options
        with pytest.raises(SRError) as refused:
            import_onnx(path, tmp_path / "refused", **options)
        assert isinstance(refused.value, (ExportError, BackendError))
        assert not [entry.name for entry in tmp_path.iterdir() if "refused" in entry.name]
        return str(refused.value)

    return refuse


# What is found


@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_scale_range_and_stride_are_found(bundles, variant):
    layout, scale, white, stride = VARIANTS[variant][1]
    _, bundle, _ = bundles(variant)
    (stage,) = bundle.manifest.stages
    probed = bundle.manifest.training["probed"]
    assert (probed["input_layout"], probed["output_layout"]) == (layout, layout)
    assert (bundle.manifest.scale, probed["white"], stage.stride) == (scale, white, stride)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_are_those_of_the_file(bundles, variant):
    foreign, _ = VARIANTS[variant]
    path, bundle, _ = bundles(variant)
    expected = run_directly(path, PICTURE, foreign).astype(np.int16)
    # An import of an fp16 file computes in fp32, which its author's engine rounds: one code value more.
    limit = 2 if foreign.half else 1
    for backend in ("onnxruntime", "openvino"):
        with Upscaler(bundle.folder, backend=backend, precision="fp32") as upscaler:
            eight = upscaler.upscale(PICTURE)
            sixteen = upscaler.upscale(PICTURE.astype(np.uint16) * 257)
        assert np.abs(eight - expected).max() <= limit
        assert np.abs(sixteen / 257 - expected).max() <= limit  # half a code value of rounding in `expected`


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_are_exact_at_every_size(bundles, variant):
    _, bundle, _ = bundles(variant)
    rng = np.random.default_rng(2)
    for backend in ("onnxruntime", "openvino"):
        with Upscaler(bundle.folder, backend=backend, precision="fp32") as upscaler:
            for size in ((1, 1), (1, 9), (37, 53)):
                picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                whole, tiled = upscaler.upscale(picture), upscaler.upscale(picture, tile=8)
                assert whole.shape == (size[0] * upscaler.scale, size[1] * upscaler.scale, 3)
                assert np.abs(whole.astype(np.int16) - tiled).max() <= 1


@pytest.mark.parametrize("variant", ["x2", "x4 stride 4 fixed size"])
def test_the_halo_is_what_the_convolutions_reach(bundles, variant):
    foreign, (_, _, _, stride) = VARIANTS[variant]
    _, bundle, _ = bundles(variant)
    # Two 3x3 convolutions see two pixels of their own size; what the second step adds may be less than a code value.
    assert bundle.manifest.stages[0].context(error=1) in (stride, 2 * foreign.downsampling)
    assert bundle.manifest.stages[0].halo[0].error > 1


def test_activations_are_those_of_the_run(bundles):
    # Floats of one LR pixel that live at PRelu: the enlarged picture, what goes in and what comes out.
    _, bundle, _ = bundles("x2")
    assert bundle.manifest.stages[0].activation_bytes == 4 * (12 + 12 + 12)
    # At Concat, whose size inference does not tell: two enlarged pictures, and both side by side.
    _, bundle, _ = bundles("x3 opset 20 computed sizes")
    assert bundle.manifest.stages[0].activation_bytes == 4 * (27 + 27 + 54)


def test_a_trained_network_gets_the_stride_and_halo_it_was_exported_with(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(verify, "FIRST_SIDE", 208)  # more than three times its halo
    ours = Bundle.load(MODELS / "fast-x2")
    stage = ours.manifest.stages[-1]
    file = stage.graph(precision="fp32", ends="float32").file.name
    manifest = import_onnx(ours.folder / file, tmp_path / "again", name="again", scale=2, pictures=photos)
    again = manifest.stages[0]
    assert (again.stride, again.context(error=1)) == (stage.stride, stage.context(error=1))
    assert manifest.training["probed"]["brightness_error"] < 0.001
    with Upscaler(ours.folder, precision="fp32") as one, Upscaler(tmp_path / "again", precision="fp32") as other:
        assert np.abs(one.upscale(PICTURE).astype(np.int16) - other.upscale(PICTURE)).max() <= 1


def test_a_network_with_deep_borders_is_not_taken_for_a_coarser_one():
    # Its border is seen 48 pixels inside, and shifts by 32 happen to look better than those by 8.
    stage = Bundle.load(MODELS / "fast-x2").manifest.stages[-1]
    foreign = reading.read(MODELS / "fast-x2" / stage.graph(precision="fp32", ends="float32").file.name)
    session = Session(foreign.model)
    findings = probing.probe(foreign, session)
    run = probing.as_pictures(session, findings)
    assert probing._shift_error(run, 8, 2, probing.CONTEXTS[0]) > probing.MAX_SHIFT_ERROR
    assert findings.stride == 8


def test_blue_first_is_taken_at_its_word(tmp_path, photos):
    def redden(graph: Nodes, y: str) -> str:
        return graph.add("Mul", y, graph.tensor(np.array([0.97, 1, 1])[:, None, None]))

    for layout in ("NCHW", "NHWC"):
        foreign = Foreign(tail=redden, layout=layout)
        path = foreign.write(tmp_path / "model.onnx")
        manifest = import_onnx(path, tmp_path / layout, bgr=True, pictures=photos)
        assert manifest.training["told"] == {"bgr": True}
        with Upscaler(tmp_path / layout, backend="onnxruntime") as upscaler:
            result = upscaler.upscale(PICTURE).astype(np.int16)
        assert np.abs(result - run_directly(path, PICTURE, foreign, bgr=True)).max() <= 1
        assert np.abs(result - run_directly(path, PICTURE, foreign)).max() > 1


def test_a_range_that_no_probe_tells_is_asked_for(tmp_path, photos, refusal):
    foreign = Foreign(white=255, knee=0.0)
    path = foreign.write(tmp_path / "model.onnx")
    assert "0 to 1 as from 0 to 255" in refusal(Foreign(knee=0.0).write(tmp_path / "other.onnx"))
    import_onnx(path, tmp_path / "bundle", value_range=255, pictures=photos)
    with Upscaler(tmp_path / "bundle", backend="onnxruntime") as upscaler:
        assert np.abs(upscaler.upscale(PICTURE) - run_directly(path, PICTURE, foreign).astype(np.int16)).max() <= 1


def test_a_network_that_changes_brightness_is_taken_with_its_range(tmp_path, photos, refusal):
    path = simple(tmp_path / "m.onnx", ("Mul", [None, F(0.5)], {}))
    assert "not a super-resolution network" in refusal(path)
    import_onnx(path, tmp_path / "bundle", value_range=1, pictures=photos)
    with Upscaler(tmp_path / "bundle", backend="onnxruntime") as upscaler:
        assert np.abs(upscaler.upscale(PICTURE) - PICTURE / 2).max() <= 1


def test_a_wrong_range_is_not_believed(tmp_path, refusal):
    path = Foreign(white=255).write(tmp_path / "model.onnx")
    assert "--value-range 1 is wrong" in refusal(path, value_range=1)


def test_networks_that_divide_by_zero_are_refused(tmp_path, refusal):
    """White alone makes NaN of 0/0, which would come out as black."""

    def spoil(graph, y):
        dark = graph.add("Sub", graph.tensor(1.0), y)
        mean = graph.add("AveragePool", dark, kernel_shape=[9, 9], pads=[4] * 4)
        return graph.add("Sub", graph.tensor(1.0), graph.add("Mul", dark, graph.add("Div", mean, mean)))

    path = tmp_path / "white.onnx"
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    graph.add("Identity", spoil(graph, y), output="out put")
    write_graph(path, graph, shape_in=ANY, shape_out=["n", 3, "H", "W"])
    assert "gives NaN or infinite values" in refusal(path)


def test_what_engines_do_not_survive_is_refused(tmp_path, refusal):
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    graph.nodes.append(helper.make_node("Split", [y], ["a", "", "c"], axis=1))
    graph.add("Concat", "a", "a", "c", output="out put", axis=1)
    path = write_graph(tmp_path / "split.onnx", graph, shape_in=ANY, shape_out=["n", 3, "H", "W"])
    assert "a Split without a name for a part" in refusal(path)
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    coarse = graph.add("Cast", y, to=TensorProto.BFLOAT16)
    graph.add("Cast", coarse, output="out put", to=TensorProto.FLOAT)
    path = write_graph(tmp_path / "bf16.onnx", graph, shape_in=ANY, shape_out=["n", 3, "H", "W"])
    assert "computes in bfloat16" in refusal(path)
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    parts = graph.add("SplitToSequence", y, axis=1)
    graph.add("ConcatFromSequence", parts, output="out put", axis=1)
    path = write_graph(tmp_path / "list.onnx", graph, shape_in=ANY, shape_out=["n", 3, "H", "W"])
    assert "computes with lists" in refusal(path)


def test_a_pipe_is_not_waited_for(tmp_path, refusal):
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a file" in refusal(tmp_path / "pipe.onnx")


def test_a_range_that_makes_no_difference_is_zero_to_one(tmp_path, photos):
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    graph.add("Add", y, graph.tensor(0.0004), output="out put")  # a tenth of a code value, or nothing from 0 to 255
    path = write_graph(tmp_path / "nearest.onnx", graph, shape_in=ANY, shape_out=["n", 3, "H", "W"])
    manifest = import_onnx(path, tmp_path / "bundle", pictures=photos)
    assert manifest.training["probed"]["white"] == 1
    assert manifest.stages[0].context(error=1) == 0
    with Upscaler(tmp_path / "bundle", backend="onnxruntime") as upscaler:
        assert (upscaler.upscale(PICTURE) == PICTURE.repeat(2, axis=0).repeat(2, axis=1)).all()


def test_layouts_that_the_file_leaves_open_are_tried(tmp_path, photos):
    graph = Nodes()
    y = graph.add("Resize", "in put", "", graph.tensor([1, 1, 2, 2]), mode="nearest")
    y = graph.add("Conv", y, graph.tensor(np.eye(3)[:, :, None, None]))
    graph.add("Transpose", y, perm=[0, 2, 3, 1], output="out put")
    free = ["a", "b", "c", "d"]
    path = write_graph(tmp_path / "open.onnx", graph, shape_in=free, shape_out=["e", "f", "g", "h"])
    probed = import_onnx(path, tmp_path / "bundle", pictures=photos).training["probed"]
    assert (probed["input_layout"], probed["output_layout"]) == ("NCHW", "NHWC")


def test_a_network_whose_reflection_needs_two_pixels_gets_a_stride_of_two(tmp_path, photos):
    def reflect(graph: Nodes, y: str) -> str:
        y = graph.add("Pad", y, graph.tensor([0, 0, 1, 1, 0, 0, 1, 1], np.int64), mode="reflect")
        return graph.add("Conv", y, graph.tensor(np.full((3, 1, 3, 3), 1 / 9)), group=3)

    path = Foreign(scale=1, tail=reflect).write(tmp_path / "model.onnx")
    assert import_onnx(path, tmp_path / "bundle", pictures=photos).stages[0].stride == 2
    with Upscaler(tmp_path / "bundle", backend="onnxruntime") as upscaler:
        assert upscaler.upscale(PICTURE[:1, :1]).shape == (1, 1, 3)


# What is written


def test_the_manifest_says_where_the_network_comes_from(bundles):
    path, bundle, lines = bundles("x4 stride 4 fixed size")
    manifest = bundle.manifest
    source = manifest.training["source"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source["files"] == [{"name": "model.onnx", "bytes": path.stat().st_size, "sha256": digest}]
    assert (source["opset"], source["precision"], source["fixed_size"]) == (17, "fp32", [40, 48])
    assert manifest.licence == "not stated" and "invents detail" in manifest.notice
    assert manifest.stages[0].name == "foreign" and manifest.name == "bundle"
    assert [line for line in lines if "parity with PyTorch skipped" in line] == ["stage foreign: " + importing.SKIPPED]
    assert importing.SKIPPED in manifest.training["parity"]


def test_parity_rows_are_among_engines_alone(bundles):
    _, bundle, _ = bundles("x2")
    rows = bundle.manifest.stages[0].parity
    assert {row.engine.split()[0] for row in rows} == {"openvino"} and rows[0].precision == "fp32"
    assert all(row.max_error <= 1 for row in rows if row.precision == "fp32")
    assert all(row.psnr_db >= 45 for row in rows if row.precision == "bf16")


def test_name_and_licence_are_kept(tmp_path, photos):
    path = Foreign().write(tmp_path / "model.onnx")
    manifest = import_onnx(
        path, tmp_path / "b", name="compact", licence="BSD-3-Clause", summary="Small.", scale=2, pictures=photos
    )
    assert manifest.stages[0].name == "compact" and manifest.licence == "BSD-3-Clause"
    assert manifest.training["summary"] == "Small."
    assert {entry.name for entry in (tmp_path / "b").iterdir()} == {
        "manifest.json", "compact.weights", "compact.fp32.uint8.onnx", "compact.fp32.float32.onnx"
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_are_as_engines_take_them(bundles, variant):
    _, bundle, _ = bundles(variant)
    (stage,) = bundle.manifest.stages
    assert [(graph.precision, graph.ends) for graph in stage.graphs] == [("fp32", "uint8"), ("fp32", "float32")]
    for graph in stage.graphs:
        model = onnx.load(bundle.folder / graph.file.name, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)] and model.ir_version == 8
        (picture,), (result,) = model.graph.input, model.graph.output
        assert (picture.name, result.name) == ("picture", "result")
        dimensions = [d.dim_param or d.dim_value for d in picture.type.tensor_type.shape.dim]
        assert dimensions == ["batch", "height", "width", 3]
        assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}
        for tensor in model.graph.initializer:
            assert (tensor.data_location == TensorProto.EXTERNAL) == (
                np.prod(tensor.dims) * 4 > 4096 and tensor.data_type == TensorProto.FLOAT
            )
        if graph.ends == "uint8":
            ends = [n.op_type for n in model.graph.node if "picture" in n.input or "result" in n.output]
            assert ends == ["Cast", "Cast"]
        data = (bundle.folder / graph.file.name).read_bytes()
        assert b"somebody" not in data


def test_large_weights_lie_once_in_a_file_that_both_graphs_read(bundles):
    _, bundle, _ = bundles("x4 stride 4 fixed size")
    (stage,) = bundle.manifest.stages
    second = 48 * 16 * 12 * 9 * 4  # bytes of the second convolution; the first has more than 4 KiB too
    first = 12 * 48 * 9 * 4
    assert first + second <= stage.weights.bytes < first + second + 64
    places = []
    for graph in stage.graphs:
        model = onnx.load(bundle.folder / graph.file.name, load_external_data=False)
        external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        places.append({(t.name, *((e.key, e.value) for e in t.external_data)) for t in external})
    assert len(places[0]) == 2 and places[0] == places[1]


def test_weights_beside_the_file_are_read(tmp_path, photos):
    path = Foreign(downsampling=4).write(tmp_path / "whole.onnx")
    model = onnx.load(path)
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=64)
    manifest = import_onnx(tmp_path / "split.onnx", tmp_path / "bundle", pictures=photos)
    assert [entry["name"] for entry in manifest.training["source"]["files"]] == ["split.onnx", "split.data"]
    with Upscaler(tmp_path / "bundle", backend="onnxruntime") as upscaler:
        expected = run_directly(path, PICTURE, Foreign()).astype(np.int16)
        assert np.abs(upscaler.upscale(PICTURE) - expected).max() <= 1


# What is refused


def simple(path: Path, *nodes: tuple, **options) -> Path:
    """Write a x1 network of nodes (kind, inputs, attributes); None among the inputs is what came before."""
    graph, y = Nodes(), "in put"
    for kind, inputs, attributes in nodes:
        names = [y if i is None else i if isinstance(i, str) else graph.tensor(i, i.dtype.type) for i in inputs]
        y = graph.add(kind, *names, **attributes)
    graph.add("Identity", y, output="out put")
    return write_graph(path, graph, **({"shape_in": ANY, "shape_out": ["n", 3, "H", "W"]} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"more_inputs": ["noise level"]}, "has 2 inputs, expected one picture"),
        ({"more_outputs": ["mask"]}, "has 2 results, expected one picture"),
        ({"shape_in": ["n", 1, "h", "w"]}, "takes one channel, brightness alone"),
        ({"shape_in": ["n", "h", "w", 1]}, "takes one channel, brightness alone"),
        ({"shape_in": ["n", 4, "h", "w"]}, "takes 4 channels"),
        ({"shape_in": [1, 64, 64, 64]}, "no axis has the 3 channels"),
        ({"shape_in": [3, "h", "w"]}, "inputs of 3 dimensions, a picture has 4"),
    ],
)
def test_other_ends_than_one_rgb_picture_are_refused(tmp_path, refusal, options, words):
    graph = Nodes()
    for name in options.get("more_outputs", ()):
        graph.add("Identity", "in put", output=name)
    graph.add("Identity", "in put", output="out put")
    shape = options.get("shape_in", ANY)
    path = write_graph(tmp_path / "m.onnx", graph, **({"shape_in": ANY, "shape_out": shape} | options))
    assert words in refusal(path)


def test_a_classifier_is_refused(tmp_path, refusal):
    path = simple(
        tmp_path / "m.onnx",
        ("GlobalAveragePool", [None], {}), ("Flatten", [None], {}), ("Gemm", [None, np.ones((3, 10), F)], {}),
        shape_out=["n", 10],
    )  # fmt: skip
    assert "2 dimensions, a picture has 4: not a super-resolution network" in refusal(path)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("Sigmoid", [None], {})], "not a super-resolution network: smooth pictures change by"),
        ([("Sub", [None, F(500)], {}), ("Log", [None], {})], "NaN or infinite"),
        ([("AveragePool", [None], {"kernel_shape": [2, 2], "strides": [2, 2]})], "gives a result of 1 x 3 x 24 x 48"),
        ([("Conv", [None, np.ones((3, 3, 3, 3), F) / 27], {})], "gives a result of 1 x 3 x 46 x 94"),
        ([("ReduceMean", [None], {"axes": [1], "keepdims": 1})], "gives a result of 1 x 1 x 48 x 96"),
        ([("Resize", [None, "", "", np.array([1, 3, 96, 96])], {})], "gives a result of 1 x 3 x 96 x 96"),
        ([("Transpose", [None], {"perm": [0, 1, 3, 2]})], "gives a result of 1 x 3 x 96 x 48"),
    ],
)
def test_what_is_no_super_resolution_is_refused(tmp_path, refusal, nodes, words):
    path = simple(tmp_path / "m.onnx", *nodes, shape_out=["n", "c", "H", "W"])
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (("InstanceNormalization", [None, np.ones(3, F), np.zeros(3, F)], {}), "looks at the whole picture"),
        (("RandomNormalLike", [None], {}), "gives another result each time"),
        (("DynamicQuantizeLinear", [None], {}), "before quantisation"),
    ],
)
def test_operators_that_tiles_cannot_run_are_named(tmp_path, refusal, node, words):
    if node[0] == "DynamicQuantizeLinear":
        graph = Nodes()
        graph.nodes.append(helper.make_node(node[0], ["in put"], ["q", "scale", "zero"]))
        graph.add("DequantizeLinear", "q", "scale", "zero", output="out put")
        path = write_graph(tmp_path / "m.onnx", graph, shape_in=ANY, shape_out=ANY)
    else:
        path = simple(tmp_path / "m.onnx", node)
    message = refusal(path)
    assert node[0].removeprefix("Dynamic").removesuffix("QuantizeLinear") in message and words in message


def by_mean(graph: Nodes, y: str) -> str:
    """Brighten by a tenth of the mean of all pixels, as squeezing blocks do."""
    mean = graph.add("ReduceMean", y, axes=[1, 2, 3], keepdims=1)
    factor = graph.add("Add", graph.add("Mul", mean, graph.tensor(0.1)), graph.tensor(0.95))
    return graph.add("Mul", y, factor)


def by_attention(graph: Nodes, y: str) -> str:
    """Mix in what each pixel finds by its likeness to all others."""
    columns = graph.add("Reshape", y, graph.tensor([0, 3, -1], np.int64))
    rows = graph.add("Transpose", columns, perm=[0, 2, 1])
    likeness = graph.add("Softmax", graph.add("MatMul", rows, columns), axis=2)
    found = graph.add("Transpose", graph.add("MatMul", likeness, rows), perm=[0, 2, 1])
    found = graph.add("Reshape", found, graph.add("Shape", y))
    return graph.add("Add", graph.add("Mul", y, graph.tensor(0.9)), graph.add("Mul", found, graph.tensor(0.1)))


def test_a_network_that_averages_the_picture_is_refused(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(verify, "MAX_SIDE", 96)
    message = refusal(Foreign(scale=1, tail=by_mean).write(tmp_path / "m.onnx"))
    assert "cannot be tiled" in message and "pooling over the picture" in message


def test_attention_is_refused_before_it_fills_the_memory(tmp_path, refusal):
    message = refusal(Foreign(scale=1, tail=by_attention).write(tmp_path / "m.onnx"))
    assert "each pixel with all others" in message


def test_a_network_that_looks_at_places_is_refused(tmp_path, refusal):
    def vignette(graph: Nodes, y: str) -> str:
        light = graph.tensor(1 + 0.04 * np.sign(np.random.default_rng(0).normal(size=(1, 1, 32, 32))))
        size = graph.add("Shape", y, start=2)
        size = graph.add("Concat", graph.tensor([1, 1], np.int64), size, axis=0)
        return graph.add("Mul", y, graph.add("Resize", light, "", "", size, mode="linear"))

    assert "no shift of the picture" in refusal(Foreign(scale=1, tail=vignette).write(tmp_path / "m.onnx"))


def test_a_size_that_is_declared_alone_is_freed_however_large(tmp_path, photos):
    path = Foreign(size=(100_000, 100_000), batch=1).write(tmp_path / "m.onnx")
    manifest = import_onnx(path, tmp_path / "bundle", pictures=photos)
    assert manifest.training["source"]["fixed_size"] == [100_000, 100_000]


@pytest.mark.parametrize(
    ("shape_in", "reshape", "words"),
    [
        ([1, 3, 40, 48], [1, 3, 40, 48], "was exported for pictures of 40 x 48 alone"),
        (ANY, [-1, 3, 48, 96], "does not run on pictures of all sizes"),
        ([1, 3, 100000, 100000], [1, 3, 100000, 100000], "makes 1.2e+11 bytes of a picture of 48 x 96 pixels"),
    ],
)
def test_sizes_that_cannot_be_freed_are_refused(tmp_path, refusal, shape_in, reshape, words):
    node = ("Reshape", [None, np.array(reshape)], {})
    assert words in refusal(simple(tmp_path / "m.onnx", node, shape_in=shape_in, shape_out=shape_in))


def test_a_batch_that_cannot_be_freed_is_refused(tmp_path, refusal):
    node = ("Reshape", [None, np.array([1, 3, -1, 96])], {})
    message = refusal(simple(tmp_path / "m.onnx", node, shape_in=[1, 3, "h", "w"], shape_out=[1, 3, "H", 96]))
    assert "free batch" in message


def test_control_flow_is_refused(tmp_path, refusal):
    def value(name: str, kind: int = TensorProto.FLOAT, shape: tuple = tuple(ANY)) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, ()), value("on", TensorProto.BOOL, ()), value("x")],
        [value("still on", TensorProto.BOOL, ()), value("y")],
    )
    graph = Nodes()
    many = graph.tensor(1 << 62, np.int64)
    graph.add("Loop", many, "", "in put", body=body, output="out put")
    path = write_graph(tmp_path / "m.onnx", graph, shape_in=ANY, shape_out=ANY)
    assert "'Loop' is not run" in refusal(path)


@pytest.mark.parametrize("opset", [17, 23])
def test_an_opset_that_cannot_be_brought_down_is_refused(tmp_path, refusal, opset):
    nodes = {17: [], 23: [("RMSNormalization", [None, np.ones(1, F)], {})]}[opset]
    path = simple(tmp_path / "m.onnx", *nodes, opset=opset)
    if opset == 17:
        convert(reading.read(path).model)  # the same graph without the operator is taken
        return
    with pytest.raises(ExportError, match=r"opset 23 is above 17 .* opset_version=17"):
        convert(reading.read(path).model)


def test_a_conversion_that_computes_something_else_is_refused(tmp_path, refusal, monkeypatch):
    def wrong(model):
        model = convert(model)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * F(1.1), tensor.name))
        return model

    monkeypatch.setattr(importing, "convert", wrong)
    assert "became another network" in refusal(Foreign(opset=13).write(tmp_path / "m.onnx"))


def test_engines_that_disagree_are_refused(tmp_path, refusal, monkeypatch):
    opened = importing.open_backend

    def open_backend(name, request):
        backend = opened(name, request)
        if name == "openvino":
            run = backend.run
            backend.run = lambda batch: np.where(batch.mean() < 1e9, run(batch) // 2, 0)
        return backend

    monkeypatch.setattr(importing, "open_backend", open_backend)
    assert "differs from ONNX Runtime fp32" in refusal(Foreign().write(tmp_path / "m.onnx"))


# Hostile and damaged files


def with_location(path: Path, location: str, **entries: object) -> Path:
    """Write a network whose first weights claim to lie elsewhere."""
    model = onnx.load(Foreign().write(path))
    tensor = model.graph.initializer[1]
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": length, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "folder/secret", "link", "missing"])
def test_weights_elsewhere_are_refused(tmp_path, refusal, location):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    for place in (tmp_path / "secret", folder / "folder" / "secret"):
        place.write_bytes(bytes(1 << 16))
    (folder / "link").symlink_to(tmp_path / "secret")
    assert "a tensor lies in" in refusal(with_location(folder / "m.onnx", location))


@pytest.mark.parametrize(
    ("size", "entries"),
    [
        (8, {}),
        (1 << 16, {"length": 8}),
        (1 << 16, {"offset": 1 << 40}),
        (1 << 16, {"offset": -4}),
        (1 << 16, {"length": "x"}),
    ],
)
def test_weights_of_another_length_are_refused(tmp_path, refusal, size, entries):
    (tmp_path / "data").write_bytes(bytes(size))
    assert "damaged" in refusal(with_location(tmp_path / "m.onnx", "data", **entries))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder", "missing"])
def test_damaged_files_are_refused(tmp_path, refusal, damage):
    path = Foreign().write(tmp_path / "m.onnx")
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"ir_version: 8"}[damage])
    message = refusal(path)
    assert str(path) in message
    words = {"cut": "not an ONNX graph", "empty": "not a valid ONNX model", "text": "not an ONNX graph"}
    words["folder"] = "not a file"
    assert words.get(damage, "cannot be read") in message


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 40], [-12, -3, 3, 3], [12, 3, 3, 4]])
def test_tensors_without_the_data_of_their_shape_are_refused(tmp_path, refusal, dims):
    path = Foreign().write(tmp_path / "m.onnx")
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    del tensor.dims[:]
    tensor.dims.extend(dims)
    path.write_bytes(model.SerializeToString())
    message = refusal(path)
    assert "larger than" in message if dims[0] == 1 << 40 else "damaged" in message


@pytest.mark.parametrize("bomb", ["constant", "resize"])
def test_small_files_that_fill_the_memory_are_refused(tmp_path, refusal, bomb):
    def constant(graph: Nodes, y: str) -> str:
        huge = graph.add("ConstantOfShape", graph.tensor([1 << 20, 1 << 20], np.int64))
        return graph.add("Add", y, graph.add("ReduceMax", huge, keepdims=0))

    def resize(graph: Nodes, y: str) -> str:
        return graph.add(
            "Resize", graph.add("Resize", y, "", graph.tensor([1, 1, 1e4, 1e4])), "", graph.tensor([1, 1, 1e-4, 1e-4])
        )

    path = Foreign(tail={"constant": constant, "resize": resize}[bomb]).write(tmp_path / "m.onnx")
    assert "is the limit" in refusal(path)


def test_files_above_the_limit_are_refused(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(reading, "MAX_WEIGHTS_BYTES", 1000)
    assert "larger than 1000 bytes" in refusal(Foreign().write(tmp_path / "m.onnx"))


def test_messages_cannot_give_orders_to_the_terminal(tmp_path):
    path = simple(tmp_path / "m.onnx", ("Reshape", [None, np.array([1, 3, 7, 7])], {}))
    model = onnx.load(path)
    model.graph.node[0].name = "\x1b]0;owned\x07"
    with pytest.raises(BackendError) as failed:
        Session(model).run(np.zeros((1, 3, 8, 8), F))
    assert "owned" in str(failed.value) and str(failed.value).isprintable()


# Options and places


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 4}, "--scale 4: this network enlarges by 2"),
        ({"name": "../x"}, "name '../x'"),
        ({"value_range": 7}, "value range 7"),
        ({"pictures": Path("missing")}, "no pictures"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, refusal, options, words):
    assert words in refusal(Foreign().write(tmp_path / "m.onnx"), **options)


def test_an_existing_folder_is_left_alone(tmp_path, photos):
    path = Foreign().write(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="exists already"):
        import_onnx(path, tmp_path, pictures=photos)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_a_full_disk_is_told(tmp_path, refusal, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    path = Foreign().write(tmp_path / "m.onnx")
    monkeypatch.setattr(importing.onnx, "save", full)
    assert "No space left" in refusal(path)
