"""External data of ONNX graphs stays inside the bundle; what may run without end, or is not protobuf, is refused."""

from __future__ import annotations

from pathlib import Path

import bundles
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sdk import Bundle, BundleError, Upscaler
from sdk.bundle import Graph, Stage, hash_file
from sdk.onnx_locations import check_locations

ALLOWED = {"main.weights"}


def external(location: str | None, name: str = "w") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entries = [("offset", "0"), ("location", location), ("length", "2")]
    for key, value in entries:
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def graph_with(tensor: onnx.TensorProto) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", initializer=[tensor])


def attribute(**fields: object) -> onnx.AttributeProto:
    return onnx.AttributeProto(name="a", **fields)


def model_with(place: str, tensor: onnx.TensorProto) -> onnx.ModelProto:
    """Put a tensor at one of the places where ONNX takes one."""
    node = onnx.NodeProto(op_type="X")
    sparse = onnx.SparseTensorProto(values=tensor, dims=[1])
    model = onnx.ModelProto(ir_version=8, graph=onnx.GraphProto(name="main", node=[node]))
    where = model.graph.node[0].attribute
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "sparse initializer":
        model.graph.sparse_initializer.append(sparse)
    elif place == "sparse indices":
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(indices=tensor, dims=[1]))
    elif place == "attribute tensor":
        where.append(attribute(t=tensor))
    elif place == "attribute tensors":
        where.append(attribute(tensors=[tensor]))
    elif place == "attribute sparse tensor":
        where.append(attribute(sparse_tensor=sparse))
    elif place == "attribute sparse tensors":
        where.append(attribute(sparse_tensors=[sparse]))
    elif place == "training initialization":
        model.training_info.add().initialization.CopyFrom(graph_with(tensor))
    else:
        assert place == "training algorithm"
        model.training_info.add().algorithm.CopyFrom(graph_with(tensor))
    return model


PLACES = [
    "initializer", "sparse initializer", "sparse indices", "attribute tensor", "attribute tensors",
    "attribute sparse tensor", "attribute sparse tensors", "training initialization", "training algorithm",
]  # fmt: skip


def check(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    check_locations(path, ALLOWED)


def test_every_message_with_a_tensor_is_known() -> None:
    """The places above are all that onnx.proto has, in the version installed here, but for those that are refused."""
    from sdk.onnx_locations import FIELDS, FUNCTIONS, SUBGRAPHS

    names = {
        "ModelProto": "Model", "TrainingInfoProto": "Training", "GraphProto": "Graph", "NodeProto": "Node",
        "AttributeProto": "Attribute", "SparseTensorProto": "SparseTensor", "TensorProto": "Tensor",
        "StringStringEntryProto": "ExternalData",
    }  # fmt: skip
    numbers = {proto: getattr(onnx, proto).DESCRIPTOR.fields_by_name for proto in names}
    assert numbers["ModelProto"]["functions"].number == FUNCTIONS
    assert tuple(numbers["AttributeProto"][name].number for name in ("g", "graphs")) == SUBGRAPHS
    leads_to_tensor = set(names) - {"StringStringEntryProto"}
    for proto, ours in names.items():
        if proto in leads_to_tensor:
            descriptor = getattr(onnx, proto).DESCRIPTOR
            found = {
                field.number: names[field.message_type.name]
                for field in descriptor.fields
                if field.message_type is not None
                and field.message_type.name in leads_to_tensor
                and not (proto == "AttributeProto" and field.number in SUBGRAPHS)
            }
            if proto == "TensorProto":
                found[descriptor.fields_by_name["external_data"].number] = "ExternalData"
            assert FIELDS[ours] == found, proto


@pytest.mark.parametrize("place", PLACES)
def test_locations_are_found_wherever_a_tensor_may_be(tmp_path: Path, place: str) -> None:
    check(tmp_path, model_with(place, external("main.weights")).SerializeToString())
    with pytest.raises(BundleError, match="secret"):
        check(tmp_path, model_with(place, external("../secret")).SerializeToString())


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../main.weights",
        "./main.weights",
        "sub/main.weights",
        "main.weights\0",
        "MAIN.WEIGHTS",
        "",
        "other",
    ],
)
def test_only_bare_names_of_the_bundle_are_allowed(tmp_path: Path, location: str) -> None:
    with pytest.raises(BundleError, match="not a file of the bundle"):
        check(tmp_path, model_with("initializer", external(location)).SerializeToString())


def test_the_second_of_two_locations_counts_too(tmp_path: Path) -> None:
    for first, second in (("main.weights", "/etc/passwd"), ("/etc/passwd", "main.weights")):
        tensor = external(first)
        tensor.external_data.add(key="location", value=second)
        with pytest.raises(BundleError, match="passwd"):
            check(tmp_path, model_with("initializer", tensor).SerializeToString())


def test_a_graph_split_in_two_is_read_whole(tmp_path: Path) -> None:
    """Protobuf merges a field that comes twice: the second half may not hide a tensor."""
    harmless = model_with("initializer", external("main.weights")).SerializeToString()
    with pytest.raises(BundleError, match="passwd"):
        check(tmp_path, harmless + model_with("initializer", external("/etc/passwd")).SerializeToString())


def test_the_last_key_and_value_of_an_entry_count(tmp_path: Path) -> None:
    """Protobuf takes the last of a repeated scalar: an entry that ends as a location is one."""
    tensor = external(None)
    entry = b"\x0a\x06offset" + b"\x12\x0cmain.weights" + b"\x0a\x08location" + b"\x12\x06/other"
    tensor.external_data.add(key="KEY", value="VALUE")
    plain = tensor.external_data[-1].SerializeToString()
    outer = model_with("initializer", tensor)

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    assert plain in outer.SerializeToString()
    encoded = field(7, field(5, field(13, entry)))
    parsed = onnx.ModelProto.FromString(encoded).graph.initializer[0].external_data[0]
    assert (parsed.key, parsed.value) == ("location", "/other")
    with pytest.raises(BundleError, match="/other"):
        check(tmp_path, encoded)


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a", b"\x3a\x05ab", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x00", b"\x02\x00", b"\x08",
        b"\x09\x00", b"\x0d\x00", b"\x3b", b"\x3c", b"\x3e", b"\x3f", b"\x38\x01", b"\x3a\x02\x2a\x05", b"not protobuf",
        b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", b"\x80" * 11,
        b"\x3a\x0c\x2a\x0a\x6a\x08\x0a\x01k\x12\x08xy", b"\x3a\x04\x2a\x02\x68\x01",
    ],
    ids=lambda data: data.hex(),
)  # fmt: skip
def test_malformed_protobuf_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX graph"):
        check(tmp_path, data)


def test_locations_that_are_not_text(tmp_path: Path) -> None:
    data = (
        model_with("initializer", external("secretsecret")).SerializeToString().replace(b"secretsecret", b"\xff" * 12)
    )
    with pytest.raises(BundleError):
        check(tmp_path, data)


@pytest.mark.parametrize("kind", ["Loop", "If", "Scan", "SequenceMap"])
def test_control_flow_is_refused(tmp_path: Path, kind: str) -> None:
    """A loop may run 2^62 times, and an engine cannot be interrupted."""
    check(tmp_path, onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(op_type="Conv")])).SerializeToString())
    body = onnx.GraphProto(name="body")
    for node in (
        onnx.NodeProto(op_type=kind),
        onnx.NodeProto(op_type=kind, domain="ai.onnx"),
        onnx.NodeProto(op_type=kind, attribute=[attribute(g=body)]),
    ):
        for place in ("graph", "training"):
            model = onnx.ModelProto()
            (model.graph if place == "graph" else model.training_info.add().algorithm).node.append(node)
            with pytest.raises(BundleError, match=f"operator '{kind}' is not run|'{kind}' of the domain"):
                check(tmp_path, model.SerializeToString())


@pytest.mark.parametrize("fields", [{"g": onnx.GraphProto()}, {"graphs": [onnx.GraphProto()]}])
def test_an_operator_with_a_subgraph_is_refused_whatever_its_name(tmp_path: Path, fields: dict[str, object]) -> None:
    node = onnx.NodeProto(op_type="Later", attribute=[attribute(**fields)])
    with pytest.raises(BundleError, match="'Later'"):
        check(tmp_path, onnx.ModelProto(graph=onnx.GraphProto(node=[node])).SerializeToString())


def test_operators_of_other_domains_are_refused(tmp_path: Path) -> None:
    node = onnx.NodeProto(op_type="Evil", domain="com.microsoft")
    with pytest.raises(BundleError, match=r"'Evil' of the domain 'com.microsoft'"):
        check(tmp_path, onnx.ModelProto(graph=onnx.GraphProto(node=[node])).SerializeToString())


def test_functions_are_refused(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.functions.add(name="f", domain="x").node.add(op_type="Conv")
    with pytest.raises(BundleError, match="functions"):
        check(tmp_path, model.SerializeToString())


def test_a_name_given_twice_hides_no_operator(tmp_path: Path) -> None:
    """Protobuf takes the last one, another parser might take the first."""
    for kinds in ((b"Conv", b"Loop"), (b"Loop", b"Conv")):
        node = b"".join(b"\x22" + bytes([len(kind)]) + kind for kind in kinds)
        graph = b"\x0a" + bytes([len(node)]) + node
        assert onnx.ModelProto.FromString(b"\x3a" + bytes([len(graph)]) + graph).graph.node[0].op_type
        with pytest.raises(BundleError, match="Loop"):
            check(tmp_path, b"\x3a" + bytes([len(graph)]) + graph)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    data = b""
    for depth in range(3000):
        number = (1, 5, 6)[(2 - depth) % 3]  # Attribute.g <- Node.attribute <- Graph.node, inside out
        length = len(data)
        size = b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        data = bytes([number << 3 | 2]) + size + bytes([length]) + data
    model = b"\x3a" + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    with pytest.raises(BundleError, match="control flow"):
        check(tmp_path, model)


def test_random_damage_ends_in_an_answer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = (bundles.shared("unet") / "main.fp32.uint8.onnx").read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(source)
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            check(tmp_path, bytes(data[: int(rng.integers(1, len(data) + 1))]))
        except BundleError:
            refused += 1
    assert refused > 100


def test_a_bundle_that_reaches_outside_is_refused_before_any_engine(tmp_path: Path) -> None:
    """Sizes and hashes agree with the manifest: only the graph's inside tells."""
    folder = bundles.copy("blur", tmp_path)
    stage = Bundle.load(folder).stage()
    graphs = []
    for graph in stage.graphs:
        path = folder / graph.file.name
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../secret"
        path.write_bytes(model.SerializeToString())
        graphs.append(Graph(hash_file(path), graph.precision, graph.ends))
    (tmp_path / "secret").write_bytes((folder / "main.weights").read_bytes())
    bundles.write_manifest(folder, Stage(**vars(stage) | {"graphs": tuple(graphs)}))
    with pytest.raises(BundleError, match=r"\.\./secret"):
        Upscaler(folder)


def test_real_graphs_pass() -> None:
    for kind in ("blur", "unet"):
        for path in bundles.shared(kind).glob("*.onnx"):
            check_locations(path, ALLOWED)
            with pytest.raises(BundleError):
                check_locations(path, set())


def test_helper_made_models_pass(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    check(tmp_path, helper.make_model(helper.make_graph([node], "g", [value], [result])).SerializeToString())
