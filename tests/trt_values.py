"""Values as `Scan` knows them: sets of what an expression may be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Whether a constant decides a branch: answers of the API do, literals where they stand, and others do not.
FACT, LOCAL, LOOSE = "fact", "local", "loose"


class Atom(NamedTuple):
    """One thing that a value may be.

    kind: module, class, object or method of TensorRT; const; function, ours (a class) or self (its object);
    items (of known number) or many (of a container); builtin; other, which is none of these; unknown.
    """

    kind: str
    what: Any = None
    more: Any = None


Value = frozenset[Atom]
NOTHING: Value = frozenset()
UNKNOWN: Value = frozenset({Atom("unknown")})
OTHER: Value = frozenset({Atom("other")})
MODULE: Value = frozenset({Atom("module")})
API = {"module", "class", "object"}


def one(kind: str, what: Any, more: Any = None) -> Value:
    return frozenset({Atom(kind, what, more)})


def union(values: Iterable[Value]) -> Value:
    return NOTHING.union(*values)


def many(values: Iterable[Value]) -> Value:
    return one("many", union(values))


def fold(function: Callable[..., Any], *values: Value) -> Value | None:
    """Compute with constants; None if these are not, or if it fails."""
    atoms = [atom for value in values for atom in value]
    if len(atoms) != len(values) or any(atom.kind != "const" for atom in atoms):
        return None
    with contextlib.suppress(Exception):  # the code's own tests meet it
        result = function(*(atom.what for atom in atoms))
        trust = next((trust for trust in (LOOSE, FACT) if any(atom.more == trust for atom in atoms)), LOCAL)
        return one("const", tuple(result) if isinstance(result, list) else result, trust)
    return None


def pack(values: Iterable[Value]) -> Value:
    """Make a sequence of known length."""
    parts = tuple(values)
    return fold(lambda *constants: constants, *parts) or one("items", parts)


def constants(value: Value, kind: type) -> list[Any]:
    """Give the constants of a type that a value may be; True is not a number here."""
    return [atom.what for atom in sorted(value, key=repr) if atom.kind == "const" and type(atom.what) is kind]


def outside(value: Value, levels: int = 4) -> Value:
    """Give what a value is beyond its function: literals are loose, and what is nested deeply is unknown."""
    atoms = set()
    for kind, what, more in value if levels else UNKNOWN:
        if kind == "many":
            what = outside(what, levels - 1)
        elif kind == "items":
            what = tuple(outside(part, levels - 1) for part in what)
        atoms.add(Atom(kind, what, LOOSE if kind == "const" and more == LOCAL else more))
    return frozenset(atoms)


def is_known(value: Value) -> bool:
    return any(atom.kind not in ("unknown", "const") for atom in value)
