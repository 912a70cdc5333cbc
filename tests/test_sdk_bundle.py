"""The manifest, byte for byte, and everything that is refused about a bundle."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bundles
import pytest

from sdk import Bundle, BundleError, OptionError, Upscaler, bundle
from sdk.bundle import File, Graph, HaloRow, Manifest, Parity, Stage, read_manifest

# The format as the README specifies it. A change here is a new version of the format.
SPECIMEN = """{
  "format": "sr-sdk-bundle",
  "version": 1,
  "name": "specimen",
  "scale": 2,
  "channels": 3,
  "input_layout": "NHWC",
  "output_layout": "NHWC",
  "stages": [
    {
      "name": "64",
      "training_size": 64,
      "opset": 17,
      "stride": 8,
      "activation_bytes": 144,
      "weights": {
        "name": "64.weights",
        "bytes": 3,
        "sha256": "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81"
      },
      "graphs": [
        {
          "file": {
            "name": "64.fp32.uint8.onnx",
            "bytes": 0,
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
          },
          "precision": "fp32",
          "ends": "uint8",
          "islands": []
        },
        {
          "file": {
            "name": "64.fp16.uint8.onnx",
            "bytes": 0,
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
          },
          "precision": "fp16",
          "ends": "uint8",
          "islands": [
            "body.3"
          ]
        }
      ],
      "halo": [
        {
          "context": 0,
          "error": 81.0
        },
        {
          "context": 16,
          "error": 0.5
        }
      ],
      "parity": [
        {
          "engine": "openvino 2025.1",
          "precision": "bf16",
          "psnr_db": 54.25,
          "max_error": 2.0
        }
      ]
    }
  ],
  "training": {
    "recipe": "fast",
    "figures": {
      "set5": 36.7
    }
  },
  "licence": "Apache-2.0",
  "notice": "Detail is invented."
}
"""
SPECIMEN_MANIFEST = Manifest(
    format="sr-sdk-bundle", version=1, name="specimen", scale=2, channels=3, input_layout="NHWC", output_layout="NHWC",
    stages=(
        Stage(
            name="64", training_size=64, opset=17, stride=8, activation_bytes=144,
            weights=File("64.weights", 3, "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81"),
            graphs=(
                Graph(
                    File(
                        "64.fp32.uint8.onnx", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
                    ),
                    "fp32", "uint8",
                ),
                Graph(
                    File(
                        "64.fp16.uint8.onnx", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
                    ),
                    "fp16", "uint8", ("body.3",),
                ),
            ),
            halo=(HaloRow(0, 81.0), HaloRow(16, 0.5)),
            parity=(Parity("openvino 2025.1", "bf16", 54.25, 2.0),),
        ),
    ),
    training={"recipe": "fast", "figures": {"set5": 36.7}}, licence="Apache-2.0", notice="Detail is invented.",
)  # fmt: skip


def write(folder: Path, text: str | bytes = SPECIMEN) -> Path:
    path = folder / "manifest.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def specimen(tmp_path: Path) -> Path:
    """A folder with the specimen's files, which holds no real graph."""
    write(tmp_path)
    (tmp_path / "64.weights").write_bytes(bytes([1, 2, 3]))
    for precision in ("fp32", "fp16"):
        (tmp_path / f"64.{precision}.uint8.onnx").touch()
    return tmp_path


def refused(path: Path) -> str:
    """Give the message of the BundleError, one line, that names the file."""
    with pytest.raises(BundleError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 700
    return message


def test_manifest_is_the_specified_bytes() -> None:
    assert SPECIMEN_MANIFEST.to_json() == SPECIMEN


def test_manifest_reads_back(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path)) == SPECIMEN_MANIFEST


def test_specimen_loads(specimen: Path) -> None:
    loaded = Bundle.load(specimen)
    assert loaded.folder == specimen and loaded.manifest == SPECIMEN_MANIFEST
    assert Bundle.load(str(specimen)) == loaded


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Walk JSON: the path of every field and list item; `training` is free-form and not entered."""
    if path:
        yield path
    if path != ("training",):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from places(item, (*path, key))


def edited(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> str:
    """Give the specimen with `change(container, key)` applied at a path."""
    values = copy.deepcopy(json.loads(SPECIMEN))
    container = values
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return json.dumps(values)


PLACES = list(places(json.loads(SPECIMEN)))
FIELDS = [path for path in PLACES if isinstance(path[-1], str)]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_required(tmp_path: Path, path: tuple[Any, ...]) -> None:
    message = refused(write(tmp_path, edited(path, lambda container, key: container.pop(key))))
    assert path[-1] in message


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_every_field_has_its_type(tmp_path: Path, path: tuple[Any, ...]) -> None:
    value = json.loads(SPECIMEN)
    for key in path:
        value = value[key]
    for wrong in (None, True, "text", 7, 7.5, [], {}, [7], {"a": 7}):
        same = type(wrong) is type(value) or (isinstance(value, float) and wrong == 7)
        if not same:
            refused(
                write(
                    tmp_path,
                    edited(
                        path,
                        lambda container, key, wrong=wrong: (
                            container.update({key: wrong})
                            if isinstance(container, dict)
                            else container.__setitem__(key, wrong)
                        ),
                    ),
                )
            )


def test_unknown_fields_are_refused_everywhere(tmp_path: Path) -> None:
    seen = 0
    for path in [(), *PLACES]:
        values = json.loads(SPECIMEN)
        target = values
        for key in path:
            target = target[key]
        if isinstance(target, dict) and path != ("training",):
            target["surprise"] = 1
            assert "surprise" in refused(write(tmp_path, json.dumps(values)))
            seen += 1
    assert seen == 10


@pytest.mark.parametrize(
    "path,value",
    [
        (("format",), "other"), (("version",), 2), (("version",), 0), (("scale",), 0), (("scale",), 17),
        (("channels",), 1), (("input_layout",), "NCHW"), (("output_layout",), "NCHW"), (("stages",), []),
        (("stages", 0, "stride"), 0), (("stages", 0, "stride"), -8), (("stages", 0, "stride"), 4096),
        (("stages", 0, "activation_bytes"), 0), (("stages", 0, "activation_bytes"), 1 << 40),
        (("stages", 0, "graphs"), []),
        (("stages", 0, "halo", 1, "context"), 12), (("stages", 0, "halo", 1, "context"), 0),
        (("stages", 0, "halo", 1, "context"), -8), (("stages", 0, "halo", 1, "context"), 8 << 20),
        (("stages", 0, "halo", 1, "error"), -1), (("stages", 0, "halo", 1, "error"), 10**400),
        (("stages", 0, "graphs", 0, "precision"), "int4"), (("stages", 0, "graphs", 0, "ends"), "float16"),
        (("stages", 0, "graphs", 0, "islands"), ["head"]), (("stages", 0, "graphs", 1, "islands"), [""]),
        (("stages", 0, "graphs", 1, "islands"), ["x" * 101]), (("stages", 0, "graphs", 1, "islands"), ["\x1b[2J"]),
        (("stages", 0, "graphs", 1, "islands"), [7]), (("stages", 0, "graphs", 1, "islands"), ["a", None]),
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    refused(write(tmp_path, edited(path, lambda container, key: container.__setitem__(key, value))))


def test_stages_with_equal_names(tmp_path: Path) -> None:
    values = json.loads(SPECIMEN)
    values["stages"] *= 2
    assert "equal names" in refused(write(tmp_path, json.dumps(values)))


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "null\0byte",
        "line\nbreak",
        "\ud800",
        "\x1b[2J",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("path", [("weights", "name"), ("graphs", 0, "file", "name")], ids=lambda path: path[0])
def test_file_names_stay_inside_the_bundle(tmp_path: Path, path: tuple[Any, ...], name: str) -> None:
    text = edited(("stages", 0, *path), lambda container, key: container.__setitem__(key, name))
    assert "bare name" in refused(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", "{", "{}", '{"format": "sr-sdk-bundle"}', "\ufeff" + SPECIMEN, SPECIMEN + "x",
        b"\xff\xfe",
        SPECIMEN.encode("utf-16"), SPECIMEN.replace("Apache", "\u00e9").encode("latin-1"), "[" * 200_000,
        '{"format":' * 100_000, SPECIMEN.replace("81.0", "NaN"), SPECIMEN.replace("81.0", "Infinity"),
        SPECIMEN.replace("54.25", "-Infinity"), SPECIMEN.replace("54.25", "1e999"), SPECIMEN.replace("36.7", "NaN"),
        SPECIMEN.replace("144", "9" * 5000),
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_not_json_is_refused(tmp_path: Path, text: str | bytes) -> None:
    refused(write(tmp_path, text))


def test_huge_manifests_are_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(bundle.MAX_MANIFEST_BYTES + 1)
    assert "larger" in refused(path)


def test_deep_free_form_facts_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, SPECIMEN.replace('"fast"', "[" * 100_000 + "]" * 100_000)))


def loading_fails(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["64.weights", "64.fp32.uint8.onnx"])
def test_missing_files(specimen: Path, name: str) -> None:
    (specimen / name).unlink()
    assert name in loading_fails(specimen)


def test_wrong_size(specimen: Path) -> None:
    (specimen / "64.weights").write_bytes(bytes([1, 2, 3, 4]))
    assert "4 bytes, the manifest says 3" in loading_fails(specimen)


def test_wrong_hash(specimen: Path) -> None:
    (specimen / "64.weights").write_bytes(bytes([1, 2, 4]))
    assert "SHA-256" in loading_fails(specimen)


def test_a_folder_or_pipe_in_place_of_a_file(specimen: Path) -> None:
    import os

    graph = specimen / "64.fp32.uint8.onnx"
    graph.unlink()
    os.mkfifo(graph)
    assert graph.name in loading_fails(specimen)
    graph.unlink()
    graph.mkdir()
    assert graph.name in loading_fails(specimen)


def test_a_file_name_too_long_for_the_system(specimen: Path) -> None:
    write(specimen, SPECIMEN.replace("64.weights", "w" * 300))
    assert "not there" in loading_fails(specimen)


@pytest.mark.parametrize("model", ["no-such-model", "", "../x", "null\0", "x" * 5000, "manifest.json"])
def test_models_that_are_not_there(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="neither a folder"):
        Upscaler(model)


def test_shipped_names_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b-x2", "a-x4"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / "no-manifest").mkdir()
    monkeypatch.setattr(bundle, "MODELS_DIR", tmp_path)
    assert bundle.shipped_models() == ["a-x4", "b-x2"]
    assert bundle.find_bundle("b-x2") == tmp_path / "b-x2"
    with pytest.raises(BundleError, match="a-x4, b-x2"):
        Bundle.load("c-x2")


def test_stages_are_found_by_name() -> None:
    first, last = SPECIMEN_MANIFEST.stages[0], Stage(**vars(SPECIMEN_MANIFEST.stages[0]) | {"name": "128"})
    loaded = Bundle(Path(), Manifest(**vars(SPECIMEN_MANIFEST) | {"stages": (first, last)}))
    assert loaded.stage() == loaded.stage("128") == last and loaded.stage("64") == first
    with pytest.raises(OptionError, match="64, 128"):
        loaded.stage("32")


def test_context_and_graph_are_found() -> None:
    stage = SPECIMEN_MANIFEST.stages[0]
    assert stage.context(error=1.0) == 16 and stage.context(error=100.0) == 0
    with pytest.raises(BundleError, match=r"best 0\.5"):
        stage.context(error=0.1)
    assert stage.graph(precision="fp32", ends="uint8").file.name == "64.fp32.uint8.onnx"
    assert stage.has_graph(precision="fp16", ends="uint8") and not stage.has_graph(precision="fp16", ends="float32")
    with pytest.raises(BundleError, match=r"fp32/uint8, fp16/uint8.*with --int8 CALIB_DIR$"):
        stage.graph(precision="int8", ends="uint8")


@pytest.mark.parametrize("name", bundle.shipped_models() or [
    pytest.param(None, marks=pytest.mark.skip(reason="no model is shipped in sdk/models"))
])  # fmt: skip
def test_shipped_bundles_are_sound(name: str) -> None:
    loaded = Bundle.load(name)
    assert loaded.manifest.name == name
    assert loaded.manifest.to_json() == (loaded.folder / "manifest.json").read_text(encoding="utf-8")
    assert loaded.manifest.licence not in ("", "not stated") and loaded.manifest.notice
    listed = {file.name for stage in loaded.manifest.stages for file in stage.files()} | {"manifest.json"}
    assert {path.name for path in loaded.folder.iterdir()} == listed
    assert sum(path.stat().st_size for path in loaded.folder.iterdir()) <= 8 << 20


@pytest.mark.parametrize("kind", ["blur", "identity", "unet"])
def test_test_bundles_are_sound(kind: str) -> None:
    stage = Bundle.load(bundles.shared(kind)).stage()
    assert stage.context(error=1.0) == {"blur": 1, "identity": 0, "unet": 40}[kind]
