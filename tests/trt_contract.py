"""Proves, without TensorRT, that code uses only what a version of TensorRT's Python API has.

`Scan` runs sources abstractly for one version. A value is the set of what it may be: TensorRT's module, its classes and
their objects, constants, and our own functions, classes and objects. A call of our function runs its body with the
values that it gets. What code asks about the API (`hasattr`, `getattr`, the version) has that version's answer, so that
only the branches which live there are checked, and every attribute in them must exist.

Where nothing is known of a value the name decides: what other versions have, and no class of this one, is reported.
Functions whose callers are not seen run with what their annotations say; a parameter named trt is the module. A literal
decides a branch only in the function in which it stands, because others may call with other values.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trt_names import apis
from trt_rules import Arguments, Rules
from trt_values import (
    API,
    FACT,
    LOCAL,
    LOOSE,
    MODULE,
    NOTHING,
    OTHER,
    UNKNOWN,
    Atom,
    Value,
    constants,
    fold,
    is_known,
    many,
    one,
    outside,
    pack,
    union,
)

MODULE_NAMES = {"tensorrt", "trt", "_trt"}  # also of parameters and attributes
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.LShift: operator.lshift, ast.BitOr: operator.or_, ast.Add: operator.add,
}  # fmt: skip
PLAIN = {"int": int, "str": str, "bool": bool, "len": len, "bytes": bytes, "sum": sum, "range": range}
FOLDED = {**PLAIN, "tuple": tuple}
IMPORTERS = {"import_module", "__import__", "importorskip"}
COPIES = {"replace", "copy", "deepcopy"}
GROWING = {"append", "appendleft", "add", "insert", "extend", "update"}
ROUNDS = 20
DEPTH = 2  # of a function that calls itself


class Scope:
    """Names of a module, a class body or a call, and what the call returns."""

    def __init__(self, path: str, above: Scope | None = None, *, is_class: bool = False):
        self.path, self.above, self.is_class = path, above, is_class
        self.names: dict[str, Value] = {}
        self.returned = NOTHING


class Function(NamedTuple):
    """One of ours. me: the object of a method."""

    node: Any  # ast.FunctionDef, AsyncFunctionDef or Lambda
    scope: Scope
    me: Value | None = None


class Class:
    """One of ours."""

    def __init__(self, node: ast.ClassDef):
        self.node, self.bases = node, NOTHING
        self.names: dict[str, Value] = {}


def decorators(node: Any) -> set[str]:
    """Name a function's decorators, without their modules."""
    return {ast.unparse(each).rpartition(".")[2] for each in getattr(node, "decorator_list", ())}


def mentions(nodes: Iterable[ast.AST]) -> set[str]:
    """Give the names that are read in nodes."""
    inner = [node for outer in nodes for node in ast.walk(outer)]
    return {str(getattr(node, "id", getattr(node, "attr", None))) for node in inner} - {"None"}


class Scan(Rules):
    """One abstract run over files; its findings are complete when it is made."""

    def __init__(self, sources: Mapping[str, str], version: str):
        """Check files, path -> text, that may import each other."""
        super().__init__(version)
        self.trees = {path: ast.parse(text, path) for path, text in sources.items()}
        self.dotted = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
        self.mentioned = mentions(self.trees.values())
        self.modules = {path: Scope(path) for path in sources}
        self.classes: dict[ast.ClassDef, Class] = {}
        self.scopes: dict[Any, Scope] = {}
        self.stored: dict[tuple[Class, str], Value] = {}  # attributes of our objects
        for _ in range(ROUNDS):  # what one method stores another one reads
            before = dict(self.stored)
            self.forget()
            self._run_everything()
            if before == self.stored:
                return
        raise RecursionError("the attributes of our objects never come to an end")

    def _run_everything(self) -> None:
        self.loaded: set[str] = set()
        self.defined: dict[Any, Function] = {}
        self.results: dict[Any, Value] = {}
        self.entered: set[Any] = set()
        self.live: set[str] = set()
        self.dead: set[str] = set()
        self.branches = 0
        self.running: list[Any] = []
        for path in self.trees:
            self._load(path)
        done: set[Any] = set()
        while waiting := [node for node in self.defined if node not in done and self._rank(node) is not None]:
            node = min(waiting, key=self._rank)
            done.add(node)
            self._run(self.defined[node], Arguments(may_have_more=True))

    def _rank(self, node: Any) -> int | None:
        """Tell how soon a function is run without a caller: what dead code alone mentions never is."""
        if node.name not in self.mentioned:
            return 0
        if node.name in self.live:
            is_public = self.defined[node].scope.above is None and not node.name.startswith("_")
            return 1 if is_public or node not in self.entered else None
        return 2 if node.name not in self.dead else None

    @contextlib.contextmanager
    def _within(self, scope: Scope) -> Iterator[Scope]:
        before = getattr(self, "scope", scope), self.path, self.branches
        self.scope, self.path, self.branches = scope, scope.path, 0
        yield scope
        self.scope, self.path, self.branches = before

    def _load(self, path: str) -> Scope:
        if path not in self.loaded:
            self.loaded.add(path)
            with self._within(self.modules[path]):
                self.scope.names = {}
                self._block(self.trees[path].body)
        return self.modules[path]

    # Statements. Each tells whether the next one is reached.

    def _block(self, body: Sequence[ast.stmt]) -> bool:
        for number, node in enumerate(body, 1):
            if not self._statement(node):
                self.dead |= mentions(body[number:])
                return False
        return True

    def _statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._name(node.name, self._function(node))
            case ast.ClassDef():
                self._name(node.name, self._class(node))
            case ast.Return():
                self.scope.returned |= self._eval(node.value) if node.value else OTHER
                return False
            case ast.Raise() | ast.Break() | ast.Continue():
                self._inside(node)
                return False
            case ast.Assert():
                return self.truth(self._eval(node.test)) is not False
            case ast.If():
                verdict = self.truth(self._eval(node.test))
                if verdict is None:
                    return self._branch(node.body, node.orelse)
                self.dead |= mentions(node.orelse if verdict else node.body)
                return self._block(node.body if verdict else node.orelse)
            case ast.While():
                if self.truth(self._eval(node.test)) is not False:
                    self._branch(node.body, node.body, node.orelse)
            case ast.For() | ast.AsyncFor():
                self._for(node)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    value = self._eval(item.context_expr)
                    self._assign(item.optional_vars, value)
                return self._block(node.body)
            case ast.Try():
                return self._try(node)
            case ast.Assign():
                value = self._eval(node.value)
                for target in node.targets:
                    self._assign(target, value)
            case ast.AugAssign():
                self._assign(node.target, self._compute(node.op, self._eval(node.target), self._eval(node.value)))
            case ast.AnnAssign():
                told, value = self._annotation(node.annotation), self._eval(node.value) if node.value else UNKNOWN
                self._assign(node.target, value if is_known(value) else told)
            case _:
                self._inside(node)
        return True

    def _branch(self, *ways: list[ast.stmt]) -> bool:
        """Run what may or may not be run: names that it gives keep their old values too."""
        self.branches += 1
        ends = [self._block(way) for way in ways]
        self.branches -= 1
        return any(ends)

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        for element in self._elements(self._eval(node.iter)):
            before, self.branches = self.branches, 0
            self._assign(node.target, element)
            self.branches = before
            self._branch(node.body)
        self._branch(node.orelse)

    def _try(self, node: ast.Try) -> bool:
        before = self.forgiven
        self.forgiven += tuple(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        reached = self._branch(node.body)
        self.forgiven = before
        ends = [reached and self._branch(node.orelse), *(self._branch(handler.body) for handler in node.handlers)]
        return self._block(node.finalbody) and any(ends)

    def _name(self, name: str, value: Value) -> None:
        self.scope.names[name] = value | (self.scope.names.get(name, NOTHING) if self.branches else NOTHING)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        base = ""
        if isinstance(node, ast.ImportFrom):
            package = self.path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
        for alias in node.names:
            name, value = alias.name if base else alias.name.partition(".")[0], OTHER
            if base == "tensorrt":
                value = self._attribute(MODULE, name, node, error="ImportError")
            elif base in self.dotted:
                value = self._load(self.dotted[base]).names.get(name, OTHER)
            elif not base and name == "tensorrt":
                value = MODULE
            self._name(alias.asname or name, value)

    def _assign(self, target: ast.expr | None, value: Value) -> None:
        match target:
            case ast.Name():
                self._name(target.id, value)
            case ast.Starred():
                self._assign(target.value, many([value]))
            case ast.Tuple() | ast.List():
                parts = self._elements(value)
                if len(parts) != len(target.elts) or any(isinstance(part, ast.Starred) for part in target.elts):
                    parts = [union(parts)] * len(target.elts)
                for part, element in zip(target.elts, parts):
                    self._assign(part, element)
            case ast.Attribute():
                self._store(self._eval(target.value), target.attr, value, target)
            case ast.Subscript():
                self._inside(target)
                self._grow(target.value, self._eval(target.value), value)

    def _grow(self, target: ast.expr, container: Value, value: Value) -> None:
        """Remember what is put into a container that has a name."""
        if any(atom.kind == "many" for atom in container) and isinstance(target, ast.Name | ast.Attribute):
            self._assign(target, container | many([value]))

    def _store(self, owner: Value, name: str, value: Value, node: ast.AST) -> None:
        self.check_setting(owner, name, value, node)
        for key in [(atom.what, name) for atom in owner if atom.kind in ("self", "ours")]:
            self.stored[key] = self.stored.get(key, NOTHING) | outside(value)

    # Our functions and classes.

    def _function(self, node: Any) -> Value:
        for inner in (*node.args.defaults, *node.args.kw_defaults, *getattr(node, "decorator_list", ())):
            self._eval(inner) if inner else None
        function = Function(node, self.scope.above if self.scope.is_class and self.scope.above else self.scope)
        if not isinstance(node, ast.Lambda):
            self.defined[node] = function
        return one("function", function)

    def _class(self, node: ast.ClassDef) -> Value:
        ours = self.classes.setdefault(node, Class(node))
        ours.bases = union(map(self._eval, node.bases))
        with self._within(Scope(self.path, self.scope, is_class=True)) as body:
            self._block(node.body)
        ours.names = body.names
        for inner in node.body:
            if inner in self.defined:
                self.defined[inner] = self.defined[inner]._replace(me=one("self", ours))
        for base in (atom.what for atom in ours.bases if atom.kind == "class"):
            self.check_overrides(node, base)
        return one("ours", ours)

    def _construct(self, ours: Class, args: Arguments, node: ast.AST) -> Value:
        me = Atom("self", ours)
        init = frozenset(atom for atom in self._find(ours, "__init__", me) if atom.kind == "function")
        self._call(init, args, node)
        if not init:  # a dataclass
            lines = [*(base.what for base in ours.bases if base.kind == "ours"), ours]
            fields = [field.target.id for line in lines for field in line.node.body if isinstance(field, ast.AnnAssign)]
            for name, value in (*zip(fields, args.positional), *args.named.items()):
                self._store(frozenset({me}), name, value, node)
        return frozenset({me})

    def _run(self, function: Function, args: Arguments) -> Value:
        """Run a function of ours with some arguments, once."""
        node = function.node
        with self._within(function.scope):
            names = self._parameters(function, args)
            promised = self._annotation(getattr(node, "returns", None))
        key = node, function.scope, frozenset(names.items()), self.forgiven
        if self.running.count(node) > DEPTH:
            return promised
        if key not in self.results:
            self.results[key] = promised  # also of calls inside itself
            self.entered.add(node)
            self.running.append(node)
            with self._within(self.scopes.setdefault(key, Scope(function.scope.path, function.scope))) as scope:
                scope.names, scope.returned = names, NOTHING
                if isinstance(node, ast.Lambda):
                    scope.returned = self._eval(node.body)
                else:
                    self._block(node.body)
            self.running.pop()
            result = scope.returned if scope.returned - UNKNOWN else promised
            is_generator = any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node))
            self.results[key] = many([result]) if is_generator and "contextmanager" not in decorators(node) else result
        return self.results[key]

    def _parameters(self, function: Function, args: Arguments) -> dict[str, Value]:
        spec = function.node.args
        positional = [*spec.posonlyargs, *spec.args]
        has_me = function.me is not None and "staticmethod" not in decorators(function.node)
        passed = (function.me, *args.positional) if has_me else args.positional
        given = {**dict(zip((parameter.arg for parameter in positional), passed)), **args.named}
        names = {extra.arg: many([UNKNOWN]) for extra in (spec.vararg, spec.kwarg) if extra}
        for parameter in (*positional, *spec.kwonlyargs):
            value = outside(given.get(parameter.arg, UNKNOWN))
            value = self._annotation(parameter.annotation) if value <= UNKNOWN else value
            names[parameter.arg] = MODULE if value <= UNKNOWN and parameter.arg in MODULE_NAMES else value
        return names

    def _annotation(self, node: ast.expr | None) -> Value:
        """Read an annotation: Any and missing ones are unknown, and what is neither TensorRT's nor ours is other."""
        match node:
            case None | ast.Name(id="Any" | "object" | "type") | ast.Subscript(value=ast.Name(id="type")):
                return UNKNOWN
            case ast.Constant(value=str(text)):
                return self._annotation(ast.parse(text, mode="eval").body)
            case ast.BinOp():
                return self._annotation(node.left) | self._annotation(node.right)
            case ast.Subscript():
                parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                inner = [*map(self._annotation, parts)]
                if ast.unparse(node.value) == "tuple" and "..." not in ast.unparse(node.slice):
                    return one("items", tuple(inner))
                base = self._annotation(node.value)
                is_union = ast.unparse(node.value) in ("Optional", "Union")
                return base if base - OTHER else union(inner) if is_union else many(inner)
            case ast.Name():
                kinds = {"class": "object", "ours": "self"}
                found = self._lookup(node.id)
                return frozenset(Atom(kinds[atom.kind], atom.what) for atom in found if atom.kind in kinds) or OTHER
            case ast.Attribute():
                root, _, name = ast.unparse(node).partition(".")
                if self._lookup(root) != MODULE:
                    return OTHER
                if not any(name in api.classes for api in apis().values()):
                    self.report(node, f"tensorrt has no {name}")
                return one("object", name) if name in self.api.classes else UNKNOWN
        return OTHER

    # Expressions.

    def _inside(self, node: ast.AST) -> Value:
        """Check what is in a node whose own value does not matter."""
        for child in ast.iter_child_nodes(node):
            kinds = {ast.expr: self._eval, ast.stmt: self._statement}
            next((check for kind, check in kinds.items() if isinstance(child, kind)), self._inside)(child)
        return OTHER

    def _eval(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant():
                return one("const", node.value, LOCAL)
            case ast.Name():
                return self._lookup(node.id)
            case ast.Attribute():
                return self._attribute(self._eval(node.value), node.attr, node)
            case ast.Call():
                return self._call_node(node)
            case ast.BoolOp():
                return self._bool_op(node)
            case ast.UnaryOp(op=ast.Not()):
                verdict = self.truth(self._eval(node.operand))
                return OTHER if verdict is None else one("const", not verdict, FACT)
            case ast.Compare():
                return self._compare(node)
            case ast.BinOp():
                return self._compute(node.op, self._eval(node.left), self._eval(node.right))
            case ast.IfExp():
                verdict = self.truth(self._eval(node.test))
                ways = {True: [node.body], False: [node.orelse], None: [node.body, node.orelse]}[verdict]
                self.dead |= mentions({node.body, node.orelse}.difference(ways))
                return union(map(self._eval, ways))
            case ast.Tuple():
                return pack(map(self._eval, node.elts))
            case ast.List() | ast.Set():
                return many(map(self._eval, node.elts))
            case ast.Dict():
                union(self._eval(key) for key in node.keys if key)
                return many(map(self._eval, node.values))
            case ast.Starred():
                return union(self._elements(self._eval(node.value)))
            case ast.Await():
                return self._eval(node.value)
            case ast.Subscript():
                return self._subscript(node)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                with self._within(Scope(self.path, self.scope)):
                    return many(self._comprehend(node, node.generators))
            case ast.Lambda():
                return self._function(node)
            case ast.NamedExpr():
                value = self._eval(node.value)
                self._assign(node.target, value)
                return value
            case ast.Yield():
                self.scope.returned |= self._eval(node.value) if node.value else NOTHING
                return UNKNOWN
        return self._inside(node)

    def _lookup(self, name: str) -> Value:
        self.live.add(name)
        if name in self.scope.names:
            return self.scope.names[name]
        above = self.scope.above
        while above is not None:
            if name in above.names and not above.is_class:
                return outside(above.names[name])
            above = above.above
        if name in MODULE_NAMES:
            return MODULE
        return one("builtin", name) if hasattr(builtins, name) else UNKNOWN

    def _bool_op(self, node: ast.BoolOp) -> Value:
        ends = isinstance(node.op, ast.Or)
        possible = NOTHING
        for number, operand in enumerate(node.values, 1):
            value = self._eval(operand)
            verdict = self.truth(value)
            if verdict is ends:
                self.dead |= mentions(node.values[number:])
                return possible | value if is_known(value) else one("const", ends, FACT)
            if verdict is None or number == len(node.values):
                possible |= value
        return possible

    def _compare(self, node: ast.Compare) -> Value:
        left, right, *others = (self._eval(part) for part in (node.left, *node.comparators))
        op = node.ops[0]
        if others or (isinstance(op, ast.Is | ast.IsNot) and right != one("const", None, LOCAL)):
            return OTHER
        if not isinstance(op, ast.Is | ast.IsNot):
            return self._compute(op, left, right)
        result = NOTHING
        for atom in left:
            if atom.kind == "const":
                result |= one("const", (atom.what is None) == isinstance(op, ast.Is), atom.more)
            else:  # methods give None where they fail
                result |= one("const", isinstance(op, ast.IsNot), FACT) if self.truth(frozenset({atom})) else OTHER
        return result

    def _compute(self, op: ast.AST, left: Value, right: Value) -> Value:
        function = OPERATORS.get(type(op), operator.truediv)
        result = NOTHING
        for pair in [(a, b) for a in left for b in right]:
            is_loose = LOOSE in (pair[0].more, pair[1].more)  # which could grow from round to round
            result |= (None if is_loose else fold(function, *(frozenset({atom}) for atom in pair))) or OTHER
        return result or OTHER

    def _subscript(self, node: ast.Subscript) -> Value:
        container = self._eval(node.value)
        if isinstance(node.slice, ast.Slice):
            ends = [self._eval(end or ast.Constant(None)) for end in (node.slice.lower, node.slice.upper)]
            return fold(lambda whole, start, stop: whole[start:stop], container, *ends) or container
        key = self._eval(node.slice)
        if {atom.kind for atom in container} == {"object"}:
            return self._call(self._attribute(container, "__getitem__", node), Arguments((key,)), node)
        parts, numbers = self._elements(container), constants(key, int)
        if {atom.kind for atom in container} == {"items"} and numbers and numbers[0] < len(parts):
            return parts[numbers[0]]
        return fold(operator.getitem, container, key) or union(parts)

    def _comprehend(self, node: Any, generators: Sequence[ast.comprehension]) -> Iterator[Value]:
        """Give the elements that a comprehension makes."""
        if not generators:
            yield union(map(self._eval, [node.elt] if hasattr(node, "elt") else [node.key, node.value]))
            return
        for element in self._elements(self._eval(generators[0].iter)):
            self._assign(generators[0].target, element)
            if all(self.truth(self._eval(test)) is not False for test in generators[0].ifs):
                yield from self._comprehend(node, generators[1:])

    def _elements(self, value: Value) -> list[Value]:
        """Give what a loop goes through: the elements one by one, or twice anything that they may be."""
        found = NOTHING
        for atom in value:
            exact: list[Value] = []
            if atom.kind == "items":
                exact = list(atom.what)
            elif atom.kind == "const" and isinstance(atom.what, tuple):
                exact = [one("const", element, atom.more) for element in atom.what]
            elif atom.kind == "object":
                for method in self.member(atom, "__getitem__") or ():
                    found |= self.check_call(method.what, method.more, Arguments((OTHER,)), ast.Pass())
            elif atom.kind in ("many", "other", "unknown"):
                found |= atom.what if atom.kind == "many" else frozenset({atom})
            if exact and len(value) == 1:
                return exact
            found |= union(exact)
        return [found or UNKNOWN] * 2

    # Attributes and calls.

    def _attribute(self, owner: Value, name: str, node: ast.AST, error: str = "AttributeError") -> Value:
        self.live.add(name)
        self.check_attribute(owner, name, node, error)
        result = NOTHING
        for atom in owner:
            if atom.kind in API:
                result |= self.member(atom, name) or UNKNOWN
            elif atom.kind in ("self", "ours"):
                result |= self._find(atom.what, name, atom)
            else:
                result |= UNKNOWN if atom.kind == "unknown" else OTHER
        return MODULE if name in MODULE_NAMES and not is_known(result - OTHER) else result

    def _find(self, ours: Class, name: str, owner: Atom) -> Value:
        """Find an attribute of a class of ours, or of its object."""
        found = self.stored.get((ours, name), NOTHING)
        for atom in outside(ours.names.get(name, NOTHING)):
            marks = decorators(atom.what.node) if atom.kind == "function" else set()
            if atom.kind != "function" or (owner.kind == "ours" and "classmethod" not in marks):
                found |= frozenset({atom})
            else:
                method = atom.what._replace(me=frozenset({owner}))
                is_read = marks & {"property", "cached_property"}
                found |= self._run(method, Arguments()) if is_read else one("function", method)
        for base in ours.bases if not found else ():
            if base.kind == "ours":
                found |= self._find(base.what, name, owner)
            else:
                found |= (self.member(Atom("object", base.what), name) if base.kind == "class" else OTHER) or UNKNOWN
        return found or UNKNOWN

    def _call_node(self, node: ast.Call) -> Value:
        positional = tuple(self._eval(arg) for arg in node.args if not isinstance(arg, ast.Starred))
        named = {key.arg: self._eval(key.value) for key in node.keywords if key.arg}
        more = [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
        more += [key.value for key in node.keywords if not key.arg]
        union(map(self._eval, more))
        args = Arguments(positional, named, bool(more))
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in IMPORTERS and positional and constants(positional[0], str) == ["tensorrt"]:
            return MODULE
        if called in COPIES and positional:
            return positional[0]
        if not isinstance(node.func, ast.Attribute):
            return self._call(self._eval(node.func), args, node)
        owner = self._eval(node.func.value)
        if folded := fold(lambda it, *rest: getattr(it, called)(*rest), owner, *positional):
            return folded
        if called in GROWING:
            self._grow(node.func.value, owner, union(positional))
        contained = union(self._elements(owner)) if {atom.kind for atom in owner} & {"many", "items"} else NOTHING
        return self._call(self._attribute(owner, called, node.func), args, node, contained)

    def _call(self, callee: Value, args: Arguments, node: ast.AST, contained: Value = NOTHING) -> Value:
        """Call anything. contained: what is in the container whose method it is."""
        result = NOTHING
        for atom in callee:
            match atom.kind:
                case "function":
                    result |= self._run(atom.what, args)
                case "ours":
                    result |= self._construct(atom.what, args, node)
                case "class":
                    result |= self.check_constructor(atom.what, args, node)
                case "method":
                    result |= self.check_call(atom.what, atom.more, args, node)
                case "builtin":
                    result |= self._builtin(atom.what, args, node)
                case _:
                    given = self._pass_on(args, contained)
                    result |= given if atom.kind == "other" or contained else UNKNOWN
        return result

    def _pass_on(self, args: Arguments, contained: Value = NOTHING) -> Value:
        """Give what an unseen function may return, which is what it gets; functions that it gets are called."""
        given = contained.union(*args.positional, *args.named.values())
        for atom in given:
            if atom.kind == "function":
                self._run(atom.what, Arguments(may_have_more=True))
        kept = frozenset(atom for atom in given if atom.kind not in ("module", "const", "builtin", "other", "unknown"))
        return kept | OTHER if kept else UNKNOWN

    def _builtin(self, name: str, args: Arguments, node: ast.AST) -> Value:
        first, *others = args.positional or (UNKNOWN,)
        match name:
            case "hasattr" if others:
                return self.has(first, others[0])
            case "getattr" if others:
                return self._getattr(first, others[0], others[1:], node)
            case "setattr" if len(others) == 2:
                for key in constants(others[0], str):
                    self._store(first, key, others[1], node)
            case "enumerate" | "zip":
                each = [OTHER] * (name == "enumerate") + [union(self._elements(part)) for part in args.positional]
                return many([one("items", tuple(each))])
            case "map" if others:
                return pack(self._call(first, Arguments((each,)), node) for each in self._elements(others[0]))
            case "next" | "min" | "max":
                return union((*self._elements(first), *others))
        given = self._pass_on(args)
        folded = fold(FOLDED[name], *args.positional) if name in FOLDED else None
        return folded or (OTHER if name in PLAIN else given)

    def _getattr(self, owner: Value, key: Value, default: Sequence[Value], node: ast.AST) -> Value:
        names = constants(key, str)
        if not names and not default and {atom.kind for atom in owner} & API:
            self.report(node, "getattr with a name that is not written out")
        result = NOTHING
        for name in names:
            verdict = self.truth(self.has(owner, one("const", name, FACT))) if default else True
            result |= self._attribute(owner, name, node) if verdict is not False else NOTHING
            result |= (
                frozenset(atom._replace(more=FACT) if atom.kind == "const" else atom for atom in default[0])
                if verdict is not True
                else NOTHING
            )
        return result or UNKNOWN
