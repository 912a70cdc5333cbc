"""Writes the names that tests hold our code against: TensorRT's Python API, and the operators of its ONNX parser.

    python tests/data/extract.py SOURCE_DIR

SOURCE_DIR holds trt-VERSION.json, dumped from NVIDIA's wheels, and onnx-operators.json. Of these only names stay:
classes, members, parameters, and the class that a method returns or a property has.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMESPACES = re.compile(r"^(tensorrt(_bindings)?\.tensorrt\.|nvinfer1::(v_\d_\d::)?|nvonnxparser::)")
CALL = re.compile(r"^\w+\((?P<parameters>.*)\) -> (?P<returns>.+)$")
PARAMETER = re.compile(r"^(?P<name>\*{0,2}\w+)(: (?P<type>[^=]+?))?(?P<default> = .*)?$")
SEVERITY = "ILogger.Severity"  # the only class inside another


def api_names(full: dict[str, Any]) -> dict[str, Any]:
    """Reduce the dump of one version."""
    classes = full["classes"]
    return {
        "version": full["version"],
        "functions": {name: signatures(lines, classes) for name, lines in full["functions"].items()},
        "values": {name: value_type(text, classes) for name, text in full["values"].items()},
        "classes": {name: class_names(facts, classes) for name, facts in classes.items()},
    }


def class_names(facts: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """Reduce one class; what it has none of is left away, and so is what every enum has."""
    if "enum" in facts:
        return {"enum": sorted(facts["enum"])}
    properties: dict[bool, dict[str, str | None]] = {True: {}, False: {}}
    for name, told in facts["properties"].items():
        properties[told["settable"]][name] = class_of(told["doc"].rpartition("-> ")[2], classes)
    methods = {name: signatures(lines, classes) for name, lines in facts["methods"].items()}
    if not methods.get("__init__"):
        methods.pop("__init__", None)  # pybind11's, which raises TypeError: others make the objects
    reduced = {
        "bases": facts["bases"],
        "methods": methods,
        "settable": properties[True],
        "read_only": properties[False],
        "values": {name: value_type(text, classes) for name, text in facts.get("values", {}).items()},
        "nested": {name: SEVERITY for name in facts.get("nested", ())},
    }
    return {key: value for key, value in reduced.items() if value}


def signatures(lines: list[str], classes: dict[str, Any]) -> list[str]:
    """Write each overload as "(flag: BuilderFlag, more=...) -> Class", without self; none if it is not known."""
    written = []
    for line in lines:
        if not (call := CALL.match(line)):
            return []
        parameters = [parameter(text, classes) for text in split(call["parameters"])]
        if parameters and parameters[0].startswith("self"):
            del parameters[0]
        returned = class_of(call["returns"], classes)
        written.append(f"({', '.join(parameters)})" + (f" -> {returned}" if returned else ""))
    return written


def split(parameters: str) -> list[str]:
    """Split at the commas that stand outside brackets; a bare "/" is dropped."""
    parts, depth = [""], 0
    for char in parameters:
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip() not in ("", "/")]


def parameter(text: str, classes: dict[str, Any]) -> str:
    """Write a parameter with its type if that is a class of the module, and "=..." if it has a default."""
    found = PARAMETER.match(text)
    if not found:
        raise ValueError(f"a parameter of another form: {text!r}")
    kind = class_of(found["type"] or "", classes)
    return found["name"] + (f": {kind}" if kind else "") + ("=..." if found["default"] else "")


def class_of(text: str, classes: dict[str, Any]) -> str | None:
    """Find the class of the module that a type's text names; C++ names have an I in front that Python's may lack."""
    name = NAMESPACES.sub("", text)
    return next((found for found in (name, name.removeprefix("I")) if found in classes), None)


def value_type(text: str, classes: dict[str, Any]) -> str | None:
    """Find the class of a value from its repr, like "<DataType.HALF: 1>"."""
    name = text.removeprefix("<").partition(".")[0]
    return SEVERITY if name == "Severity" else class_of(name, classes)


def operator_names(full: dict[str, Any]) -> dict[str, Any]:
    """Reduce the parser's tables to the supported operators and their types."""
    return {
        version: {
            "opset_max": table["opset_max"],
            "operators": {name: facts["types"] for name, facts in table["operators"].items() if facts["supported"]},
        }
        for version, table in full["versions"].items()
    }


def write(path: Path, data: dict[str, Any], *, rows: str | None = None) -> None:
    """Write JSON with one class, or one operator, a line."""
    lines = [f" {json.dumps(key)}: {table(value, key == rows)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table(value: Any, in_rows: bool) -> str:
    """Write a value in one line, or an object with a line for each member."""
    if not in_rows:
        return json.dumps(value)
    rows = (f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
    return "{\n" + ",\n".join(rows) + "\n }"


def main(source: Path) -> None:
    """Write every extract."""
    for path in sorted(source.glob("trt-*.json")):
        names = api_names(json.loads(path.read_text(encoding="utf-8")))
        write(HERE / f"tensorrt-{names['version']}.json", names, rows="classes")
    operators = operator_names(json.loads((source / "onnx-operators.json").read_text(encoding="utf-8")))
    write(HERE / "onnx-operators.json", operators)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
