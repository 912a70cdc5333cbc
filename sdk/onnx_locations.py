"""Refuse ONNX graphs that would make an engine read files outside their bundle, or compute without end.

A tensor may name a file that holds its data, and a loop may run 2^62 times. This walks the protobuf encoding
(https://protobuf.dev/programming-guides/encoding/) of an ONNX file with the standard library only, before any engine
opens it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import BundleError

MAX_GRAPH_BYTES = 256 << 20  # read into memory; weights lie in a file of their own

# Message -> {field number: message in it}, from onnx.proto: every way that leads to a TensorProto, but for the refused.
FIELDS = {
    "Model": {7: "Graph", 20: "Training"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 10: "Tensor", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
    "ExternalData": {},
}
FUNCTIONS = 25  # field of Model
OP_TYPE, ATTRIBUTE, DOMAIN = 4, 5, 7  # fields of Node
SUBGRAPHS = (6, 11)  # fields of Attribute
KEY, VALUE = 1, 2  # fields of ExternalData
CONTROL_FLOW = {b"If", b"Loop", b"Scan", b"SequenceMap"}
DOMAINS = {b"", b"ai.onnx"}  # both are the default one
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def check_locations(path: Path, allowed: Collection[str]) -> None:
    """Require that every external tensor of an ONNX file lies in one of the files `allowed`, bare names.

    Raises: BundleError if one does not, if the graph has control flow, functions or operators of other domains than
    ONNX's own, or if the file is not well-formed protobuf.
    """
    try:
        if path.exists() and not path.is_file():
            raise BundleError(f"{path}: not a file")
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise BundleError(f"{path}: larger than {MAX_GRAPH_BYTES} bytes; export it with external weights")
        data = path.read_bytes()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read ({exc.strerror})") from exc
    locations: list[str] = []
    try:
        for message, encoded in _messages(memoryview(data), "Model"):
            if message == "Model" and any(number == FUNCTIONS for number, _, _ in _fields(encoded)):
                raise BundleError(f"{path}: functions are not run; export the model without")
            if message == "Node":
                _check_operator(path, encoded)
            if message == "ExternalData":
                locations += _location(encoded)
    except ValueError as exc:
        raise BundleError(f"{path}: not an ONNX graph ({exc}); export the bundle again") from exc
    for location in locations:
        if location not in allowed:
            raise BundleError(f"{path}: a tensor lies in {location[:300]!r}, which is not a file of the bundle")


def _messages(data: memoryview, message: str) -> Iterator[tuple[str, memoryview]]:
    """Give (name, content) of an encoded message and of all that it holds, each before what is inside it."""
    yield message, data
    inner = FIELDS[message]
    for number, wire_type, value in _fields(data):
        if number in inner:
            _check_bytes(number, message, wire_type)
            yield from _messages(value, inner[number])


def _check_operator(path: Path, node: memoryview) -> None:
    """Raise BundleError if a node's operator may run without end, or is not one of ONNX's own."""
    # The last of a repeated field counts for an engine; here any of them does.
    values: dict[int, list[memoryview]] = {OP_TYPE: [], ATTRIBUTE: [], DOMAIN: []}
    for number, wire_type, value in _fields(node):
        if number in values:
            _check_bytes(number, "Node", wire_type)
            values[number].append(value)
    kinds, domains = ({bytes(value) for value in values[number]} for number in (OP_TYPE, DOMAIN))
    has_subgraph = any(number in SUBGRAPHS for value in values[ATTRIBUTE] for number, _, _ in _fields(value))
    if has_subgraph or kinds & CONTROL_FLOW or domains - DOMAINS:
        kind, domain = (b", ".join(sorted(names)).decode("utf-8", "replace")[:100] for names in (kinds, domains))
        name = f"{kind!r} of the domain {domain!r}" if domain else repr(kind)
        raise BundleError(f"{path}: the operator {name} is not run: no control flow and no custom operators are")


def _location(entry: memoryview) -> list[str]:
    """Give the location that an entry of external data holds: one or none."""
    last = {KEY: b"", VALUE: b""}
    for number, wire_type, value in _fields(entry):
        if number in last:
            _check_bytes(number, "ExternalData", wire_type)
            last[number] = bytes(value)
    return [last[VALUE].decode("utf-8")] if last[KEY] == b"location" else []


def _check_bytes(number: int, message: str, wire_type: int) -> None:
    if wire_type != BYTES:
        raise ValueError(f"field {number} of {message} has wire type {wire_type}")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Give (number, wire type, content) of each field of a message.

    Raises: ValueError for anything that is cut short or not a valid encoding.
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("a field has number 0")
        start = position
        if wire_type == VARINT:
            _, position = _varint(data, position)
        elif wire_type == FIXED64:
            position += 8
        elif wire_type == FIXED32:
            position += 4
        elif wire_type == BYTES:
            length, start = _varint(data, position)
            position = start + length
        else:
            raise ValueError(f"a field has wire type {wire_type}")
        if position > len(data):
            raise ValueError("it ends inside a field")
        yield number, wire_type, data[start:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Decode a base-128 number: (value, position behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is longer than ten bytes")
