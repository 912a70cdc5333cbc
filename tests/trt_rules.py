"""What is wrong with a use of TensorRT's API in one version, once it is known what is used."""

from __future__ import annotations

import ast
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from trt_names import Signature, apis
from trt_values import API, FACT, LOOSE, OTHER, UNKNOWN, Atom, Value, constants, is_known, one, union

PYTHON_NAMES = {
    name for thing in (str, bytes, dict, list, np.ndarray, Path, io.BytesIO, threading.Lock()) for name in dir(thing)
}
MASKS = {"create_network", "set_tactic_sources", "flags", "quantization_flags"}  # take 1 << int(member)


def is_common(name: str) -> bool:
    """Tell whether a name says nothing about a value that nothing is known of: others may well have it too."""
    return name in PYTHON_NAMES or (name.islower() and "_" not in name)


class Finding(NamedTuple):
    """A use of what the version does not have."""

    path: str
    line: int
    message: str


class Arguments(NamedTuple):
    """Of a call. may_have_more: from * or **, or because the caller is not seen."""

    positional: tuple[Value, ...] = ()
    named: Mapping[str, Value] = {}
    may_have_more: bool = False


class Rules:
    """Judges uses. findings: what is wrong. checked: what was found to exist, like "IBuilderConfig.set_flag"."""

    def __init__(self, version: str):
        self.api = apis()[version]
        self.vocabulary = {name for api in apis().values() for name in api.names if not name.startswith("__")}
        self.missing = {name for name in self.vocabulary - self.api.names if not is_common(name)}
        once_settable = {name for api in apis().values() for name in api.settable}
        self.unsettable = {name for name in once_settable - self.api.settable if not is_common(name)}
        self.path = ""  # of the file that is being read
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.findings: set[Finding] = set()
        self.checked: set[str] = set()
        self.forgiven: tuple[str, ...] = ()  # what the handlers of the try blocks around catch

    def report(self, node: ast.AST, message: str, error: str = "AttributeError") -> None:
        """Note a finding, unless the code catches the error that it is."""
        if not any(error in caught for caught in self.forgiven):
            self.findings.add(Finding(self.path, getattr(node, "lineno", 0), message))

    def is_member(self, atom: Atom) -> bool:
        """Tell whether a thing is a member of an enum."""
        return atom.kind == "object" and self.api.is_enum(atom.what)

    def member(self, atom: Atom, name: str) -> Value | None:
        """Find an attribute of TensorRT's module or of a class or object of it; None if there is none."""
        api = self.api
        if atom.kind == "module":
            if name in api.classes:
                return one("class", name)
            if name in api.functions:
                return one("method", name, tuple(api.functions[name]))
            if name == "__version__":
                return one("const", api.version, FACT)
            return one("object", api.values[name]) if name in api.values else None
        if name == "__members__" and api.is_enum(atom.what):
            return one("const", tuple(api.classes[atom.what]["enum"]), FACT)
        part, what = api.member(atom.what, name) or (None, None)
        if part is None:
            return None
        if part == "methods":
            return one("method", f"{atom.what}.{name}", tuple(what) if atom.kind == "object" else ())
        if part == "nested":
            return one("class", what)
        return one("object", what) if what and (part in ("enum", "values") or atom.kind == "object") else OTHER

    def check_attribute(self, owner: Value, name: str, node: ast.AST, error: str = "AttributeError") -> None:
        """Report an attribute that is missing; what may be something else too must have a name of TensorRT's."""
        for atom in owner:
            if atom.kind in API and self.member(atom, name) is not None:
                self.checked.add(name if atom.kind == "module" else f"{atom.what}.{name}")
            elif atom.kind in API and (not owner & OTHER or name in self.vocabulary):
                self.report(node, f"{'tensorrt' if atom.kind == 'module' else atom.what} has no {name}", error)
        if not is_known(owner) and name in self.missing:
            self.report(node, f"nothing has {name}")

    def check_setting(self, owner: Value, name: str, value: Value, node: ast.AST) -> None:
        """Report an attribute that is missing or cannot be set."""
        if not is_known(owner) and name in self.unsettable:
            self.report(node, f"nothing has .{name} to be set")
        for kind in [atom.what for atom in owner if atom.kind == "object"]:
            self.check_attribute(one("object", kind), name, node)
            part, wanted = self.api.member(kind, name) or ("settable", None)
            if part != "settable":
                self.report(node, f"{kind}.{name} cannot be set")
            self.check_numbers(f"{kind}.{name}", [wanted or ""], [value], node)

    def check_call(self, label: str, texts: Sequence[str], args: Arguments, node: ast.AST) -> Value:
        """Hold a call against a method's signatures; give what it returns."""
        signatures = [*map(Signature.parse, texts)]
        more = args.may_have_more
        fits = [each.classes_of(len(args.positional), args.named, may_have_more=more) for each in signatures]
        kinds = next((kinds for kinds in fits if kinds is not None), None)
        if kinds is not None:
            self.check_numbers(label, kinds, [*args.positional, *args.named.values()], node)
        elif texts:
            self.report(node, f"{label} takes {' or '.join(texts)}", "TypeError")
        return union(one("object", each.returns) if each.returns else OTHER for each in signatures) or UNKNOWN

    def check_constructor(self, name: str, args: Arguments, node: ast.AST) -> Value:
        """Hold the making of an object against its class."""
        kind, texts = self.api.member(name, "__init__") or ("", None)
        if self.api.is_enum(name):
            self.check_numbers(name, [name], args.positional, node)
        elif kind:
            self.check_call(name, texts, args, node)
        else:
            self.report(node, f"{name} cannot be made by calling it", "TypeError")
        return one("object", name)

    def check_numbers(self, label: str, kinds: Sequence[str], values: Sequence[Value], node: ast.AST) -> None:
        """Report numbers, which differ between versions, and members of other enums, where an enum is due."""
        for kind, value in zip(kinds, values):
            is_mask = label.rpartition(".")[2] in MASKS
            for number in constants(value, int):
                if self.api.is_enum(kind) or (is_mask and number):
                    self.report(node, f"{label}: the number {number} instead of a member's name", "TypeError")
            for atom in value:
                if self.api.is_enum(kind) and self.is_member(atom) and atom.what != kind:
                    self.report(node, f"{label}: a {atom.what} instead of a {kind}", "TypeError")

    def check_overrides(self, node: ast.ClassDef, base: str) -> None:
        """Check a class of ours whose methods TensorRT calls."""
        own = {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
        methods = self.api.public_methods(base)
        for name in methods.keys() - own.keys() if base.startswith("I") else ():
            self.report(node, f"{node.name} does not define {base}.{name}")
        for name, inner in own.items():
            most = len(inner.args.args) - 1
            counts = {len(signature.parameters) for signature in methods.get(name, ())}
            if counts and not inner.args.vararg and not counts & {*range(most - len(inner.args.defaults), most + 1)}:
                self.report(inner, f"{base}.{name} is called with {counts} arguments")
            if methods and name not in methods and not name.startswith("_"):
                self.report(inner, f"{base} has no {name} to override")
        if "__init__" in own and ".__init__(" not in ast.unparse(own["__init__"]):
            self.report(own["__init__"], f"{base}.__init__ is not called")

    def has(self, owner: Value, key: Value) -> Value:
        """Answer hasattr with what the version has; a name alone may answer it too."""
        verdicts: set[bool] = set()
        for name in constants(key, str):
            verdicts |= {self.member(atom, name) is not None for atom in owner if atom.kind in API}
            if not is_known(owner) and name in self.vocabulary and not is_common(name):
                verdicts.add(name in self.api.names)
        return union(one("const", verdict, FACT) for verdict in verdicts) or OTHER

    def truth(self, value: Value) -> bool | None:
        """Tell whether a value is true; None if that depends on more than the version."""
        verdicts: set[bool | None] = set()
        for atom in value:
            if atom.kind == "const":
                verdicts.add(bool(atom.what) if atom.more != LOOSE else None)
            else:
                is_true = atom.kind in ("module", "class", "method", "function", "ours")
                verdicts.add(True if is_true or self.is_member(atom) else None)
        return verdicts.pop() if len(verdicts) == 1 else None
