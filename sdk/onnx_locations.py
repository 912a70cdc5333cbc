"""Refuse ONNX graphs that would make an engine read files outside their bundle.

A tensor may name a file that holds its data. This walks the protobuf encoding (https://protobuf.dev/programming-guides/
encoding/) of an ONNX file with the standard library only, before any engine opens it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import BundleError

MAX_DEPTH = 100  # as protobuf's own parsers
MAX_GRAPH_BYTES = 256 << 20  # read into memory; weights lie in a file of their own

# Message -> {field number: message in it}, from onnx.proto: every way that leads to a TensorProto.
FIELDS = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "ExternalData"},
    "ExternalData": {},
}
KEY, VALUE = 1, 2  # fields of ExternalData
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def check_locations(path: Path, allowed: Collection[str]) -> None:
    """Require that every external tensor of an ONNX file lies in one of the files `allowed`, bare names.

    Raises: BundleError if one does not, or if the file is not well-formed protobuf.
    """
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise BundleError(f"{path}: larger than {MAX_GRAPH_BYTES} bytes; export it with external weights")
        data = path.read_bytes()
    except OSError as exc:
        raise BundleError(f"{path}: cannot be read ({exc.strerror})") from exc
    try:
        locations = list(_locations(memoryview(data), "Model", 0))
    except ValueError as exc:
        raise BundleError(f"{path}: not an ONNX graph ({exc}); export the bundle again") from exc
    for location in locations:
        if location not in allowed:
            raise BundleError(f"{path}: a tensor lies in {location[:300]!r}, which is not a file of the bundle")


def _locations(data: memoryview, message: str, depth: int) -> Iterator[str]:
    """Give the locations of all external data inside one encoded message."""
    if depth > MAX_DEPTH:
        raise ValueError(f"messages are nested deeper than {MAX_DEPTH}")
    inner = FIELDS[message]
    entry = {KEY: b"", VALUE: b""}
    for number, wire_type, value in _fields(data):
        if number not in inner and not (message == "ExternalData" and number in entry):
            continue
        if wire_type != BYTES:
            raise ValueError(f"field {number} of {message} has wire type {wire_type}")
        if message == "ExternalData":
            entry[number] = bytes(value)
        else:
            yield from _locations(value, inner[number], depth + 1)
    if entry[KEY] == b"location":
        yield entry[VALUE].decode("utf-8")


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
