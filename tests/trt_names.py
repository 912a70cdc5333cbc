"""The names of TensorRT's Python API, version by version, from the extracts in tests/data."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).parent / "data"
PARTS = ("enum", "methods", "settable", "read_only", "values", "nested")


class Signature(NamedTuple):
    """Parameters as (name, class or "", whether there is a default), and the class that is returned, or ""."""

    parameters: tuple[tuple[str, str, bool], ...]
    returns: str

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read "(flag: BuilderFlag, more=...) -> Class"."""
        inner, _, returns = text.rpartition(")")
        parameters = []
        for piece in filter(None, inner.removeprefix("(").split(", ")):
            bare = piece.removesuffix("=...")
            name, _, kind = bare.partition(": ")
            parameters.append((name, kind, bare != piece))
        return cls(tuple(parameters), returns.removeprefix(" -> "))

    def classes_of(self, count: int, keywords: Iterable[str], *, may_have_more: bool) -> list[str] | None:
        """Give the class that each argument of a call should have, or ""; None if the arguments do not fit."""
        left = {name: (kind, optional) for name, kind, optional in self.parameters[count:]}
        needed = {name for name, (_, optional) in left.items() if not optional}.difference(keywords)
        if count > len(self.parameters) or set(keywords) - left.keys() or (needed and not may_have_more):
            return None
        return [kind for _, kind, _ in self.parameters[:count]] + [left[name][0] for name in keywords]


class Api:
    """The names of one version."""

    def __init__(self, data: Mapping[str, Any]):
        self.version: str = data["version"]
        self.functions, self.values, self.classes = data["functions"], data["values"], data["classes"]
        parts = [facts.get(part, ()) for facts in self.classes.values() for part in PARTS]
        self.names = {name for part in (self.functions, self.values, self.classes, *parts) for name in part}
        self.settable = {name for facts in self.classes.values() for name in facts.get("settable", ())}

    def member(self, owner: str, name: str) -> tuple[str, Any] | None:
        """Find a member of a class or its bases: in which part of the extract, and what stands there."""
        for facts in (self.classes[line] for line in (owner, *self.classes[owner].get("bases", ()))):
            for part in PARTS:
                if name in facts.get(part, ()):
                    return part, owner if part == "enum" else facts[part][name]
        if hasattr(object, name) and name != "__init__":
            return "read_only", None
        return ("read_only", None) if self.is_enum(owner) and name in ("name", "value", "__int__") else None

    def is_enum(self, name: str) -> bool:
        """Tell whether a class is an enum."""
        return "enum" in self.classes.get(name, ())

    def public_methods(self, owner: str) -> dict[str, list[Signature]]:
        """Give the methods of a class and its bases."""
        lines = [*self.classes[owner].get("bases", ())[::-1], owner]
        found = {name: texts for line in lines for name, texts in self.classes[line].get("methods", {}).items()}
        return {name: [*map(Signature.parse, texts)] for name, texts in found.items() if not name.startswith("_")}


@functools.cache
def apis() -> dict[str, Api]:
    """Load every extract: version -> names."""
    found = [Api(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(DATA.glob("tensorrt-*.json"))]
    return {api.version: api for api in found}
