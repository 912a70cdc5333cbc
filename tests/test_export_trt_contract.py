"""Our TensorRT code uses only what each supported version's Python API has, branch by branch."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from textwrap import dedent

import pytest
from trt_contract import Scan
from trt_names import apis

ROOT = Path(__file__).parent.parent
VERSIONS = {"8": "8.5.3.1", "10": "10.16.1.11", "11": "11.4.0.106"}
ALL = set(VERSIONS)


@functools.cache
def tensorrt_files() -> tuple[Path, ...]:
    """Find the files that have to do with TensorRT: by their name, by an import, or by a variable called trt."""
    paths = sorted([*ROOT.glob("sdk/**/*.py"), *ROOT.glob("export/**/*.py")])
    return tuple(path for path in paths if "tensorrt" in path.name or any(map(names_tensorrt, nodes(path))))


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def names_tensorrt(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "tensorrt" in ast.unparse(node)
    return bool({getattr(node, name, None) for name in ("id", "arg", "attr")} & {"trt", "_trt"})


def beside(path: Path) -> set[Path]:
    """Find the files in the same folder that one imports: its objects pass through their functions."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            places = [base.with_suffix(".py"), base / "__init__.py", *(base / f"{each.name}.py" for each in node.names)]
            found |= {place for place in places if place.is_file() and place.parent == path.parent}
    return found


@functools.cache
def tensorrt_sources() -> dict[str, str]:
    """Read the files that have to do with TensorRT, and those that their own ones import."""
    own = [path for path in tensorrt_files() if "tensorrt" in path.name]
    paths = set(tensorrt_files()).union(*map(beside, own))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def wrong_in(code: str | dict[str, str]) -> set[str]:
    """Name the versions in which a scan has findings."""
    sources = {"planted.py": code} if isinstance(code, str) else code
    sources = {path: dedent(text) for path, text in sources.items()}
    return {short for short, version in VERSIONS.items() if Scan(sources, version).findings}


def test_the_extracts_are_those_of_the_supported_versions():
    assert set(apis()) == set(VERSIONS.values())
    for api in apis().values():
        assert len(api.classes) > 150 and len(api.names) > 800


def test_the_files_of_tensorrt_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in tensorrt_files()}
    assert {"sdk/backends/tensorrt.py", "sdk/backends/tensorrt_builder.py"} <= names
    assert {"sdk/backends/forking.py", "sdk/backends/gpu.py"} <= tensorrt_sources().keys()


@pytest.mark.parametrize("version", VERSIONS.values())
def test_our_code_uses_only_what_the_version_has(version):
    assert sorted(Scan(tensorrt_sources(), version).findings) == []


def test_what_our_code_uses_was_followed_to_its_class():
    """An analysis that loses every type would find nothing."""
    core = {
        "Builder.create_network", "Builder.create_builder_config", "Builder.create_optimization_profile",
        "Builder.build_serialized_network", "BuilderFlag.TF32", "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.add_optimization_profile", "IOptimizationProfile.set_shape", "OnnxParser.get_error",
        "ParserError.desc", "INetworkDefinition.get_input", "ITensor.name", "ILogger.Severity.ERROR",
        "Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context", "ICudaEngine.num_io_tensors",
        "ICudaEngine.get_tensor_mode", "TensorIOMode.INPUT", "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3", "ITimingCache.serialize",
    }  # fmt: skip
    alone = {"8": {"BuilderFlag.FP16", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}}
    alone["10"] = alone["11"] = {"NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IBuilderConfig.progress_monitor"}
    for short, version in VERSIONS.items():
        assert core | alone[short] <= Scan(tensorrt_sources(), version).checked


class Unguard(ast.NodeTransformer):
    """Replaces every guard by True."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        is_guard = isinstance(node.func, ast.Name) and node.func.id == "hasattr"
        return ast.copy_location(ast.Constant(True), node) if is_guard else self.generic_visit(node)


def test_our_code_needs_its_guards():
    sources = {path: ast.unparse(Unguard().visit(ast.parse(text))) for path, text in tensorrt_sources().items()}
    assert wrong_in(sources) >= {"8", "11"}


class Plant(ast.NodeTransformer):
    """Puts the use of a flag in front of every function with a parameter trt, and every method that may ask self."""

    def __init__(self, flag: str):
        self.flag, self.count = flag, 0

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if "self._trt" in ast.unparse(node):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name != "__init__")
            for method in methods:
                self.plant(method, "self._trt")
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if "trt" in {parameter.arg for parameter in node.args.args}:
            self.plant(node, "trt")
        return self.generic_visit(node)

    def plant(self, node: ast.FunctionDef, module: str) -> None:
        self.count += 1
        node.body[:0] = ast.parse(f"{module}.BuilderFlag.{self.flag}").body


def plant(flag: str, version: str) -> tuple[int, set[tuple[str, int]]]:
    """Tell how often a flag was planted in our code, and where it was found."""
    planter = Plant(flag)
    sources = {path: ast.unparse(planter.visit(ast.parse(text))) for path, text in tensorrt_sources().items()}
    findings = Scan(sources, version).findings
    return planter.count, {(path, line) for path, line, message in findings if message == f"BuilderFlag has no {flag}"}


def test_a_flag_written_anywhere_in_our_code_is_found():
    places = {short: plant("FP61", version) for short, version in VERSIONS.items()}
    assert places["8"][0] == len(set().union(*(found for _, found in places.values()))) >= 15
    # Code that version 11 never reaches may use it.
    assert plant("FP16", VERSIONS["11"])[1] == places["11"][1]
    assert plant("FP16", VERSIONS["8"])[1] == set()


WRONG = {
    "flag": ({"11"}, "def f(trt, config): config.set_flag(trt.BuilderFlag.FP16)"),
    "flag of an alias": ({"11"}, "import tensorrt\nB = tensorrt.BuilderFlag\nB.INT8"),
    "flag of another module name": (
        {"11"},
        "import tensorrt as nv\ndef f():\n    kinds = nv.BuilderFlag\n    kinds.FP16",
    ),
    "flag imported by name": ({"11"}, "from tensorrt import BuilderFlag as Kind\nx = Kind.BF16 if 0 else Kind.FP16"),
    "flag by getattr": ({"11"}, "def f(trt): return getattr(trt.BuilderFlag, 'FP16')"),
    "flag by a name in a variable": (
        {"8", "11"},
        "def f(trt):\n    for name in ('INT8', 'BF16'):\n        getattr(trt.BuilderFlag, name)",
    ),
    "flag by a name nobody knows": (ALL, "def f(trt, name): return getattr(trt.BuilderFlag, name)"),
    "flag by import_module": (
        {"11"},
        "from importlib import import_module\nimport_module('tensorrt').BuilderFlag.FP16",
    ),
    "flag in a helper": (
        {"11"},
        """
        import tensorrt
        def _allow(kinds, config): config.set_flag(kinds.FP16)
        def build(config): _allow(tensorrt.BuilderFlag, config)
        """,
    ),
    "flag in a helper of another file": (
        {"11"},
        {
            "pack/one.py": "def half(whatever): return whatever.FP16",
            "pack/two.py": "from .one import half\nimport tensorrt as t\ndef f(): return half(t.BuilderFlag)",
        },
    ),
    "flag returned by a helper": (
        {"11"},
        "def _kinds(trt): return trt.BuilderFlag\ndef f(trt): return [_kinds(trt).FP16]",
    ),
    "flag in a closure": ({"11"}, "def f(trt):\n    B = trt.BuilderFlag\n    def g(): return B.FP16\n    return g"),
    "flag in a lambda": ({"11"}, "def f(trt): return sorted((), key=lambda x: trt.BuilderFlag.FP16)"),
    "flag of an attribute": (
        {"11"},
        """
        class Builder:
            def __init__(self, module): self._kinds = module.BuilderFlag
            def build(self): return self._kinds.FP16
        def f(trt): return Builder(trt).build()
        """,
    ),
    "flag of a dataclass": (
        {"11"},
        """
        from dataclasses import dataclass
        from typing import Any
        @dataclass(frozen=True)
        class Setting:
            kinds: Any
            level: int = 0
        def f(trt): return use(Setting(trt.BuilderFlag))
        def use(setting): return setting.kinds.FP16
        """,
    ),
    "flag out of a table": ({"11"}, "def f(trt, precision): return {'fp16': trt.BuilderFlag.FP16}.get(precision)"),
    "flag of an unpacked pair": ({"11"}, "def f(trt):\n    B, N = trt.BuilderFlag, trt.Logger\n    return B.FP16"),
    "flag of a nested getattr": ({"11"}, "def f(trt): return getattr(getattr(trt, 'BuilderFlag'), 'INT8')"),
    "flag of a table of classes": ({"11"}, "def f(trt): return {'kinds': trt.BuilderFlag}['kinds'].INT8"),
    "flag of a class of ours": (
        {"11"},
        "class Here: pass\ndef f(trt):\n    Here.kinds = trt.BuilderFlag\n    Here.kinds.INT8",
    ),
    "flag that is awaited": ({"11"}, "async def g(trt): return trt.BuilderFlag\nasync def f(trt): (await g(trt)).INT8"),
    "flag in a text": ({"11"}, "def f(trt): return f'{trt.BuilderFlag.INT8}'"),
    "flag in a handler": ({"11"}, "def f(trt):\n    try: pass\n    except OSError: trt.BuilderFlag.INT8"),
    "flag in a property": (
        {"11"},
        """
        class Kinds:
            def __init__(self, trt): self._trt = trt
            @property
            def kinds(self): return self._trt.BuilderFlag
        def f(trt): return Kinds(trt).kinds.INT8
        """,
    ),
    "flag of what a generator gives": (
        {"11"},
        "def g(trt): yield trt.BuilderFlag\ndef f(trt):\n    for kinds in g(trt): kinds.INT8",
    ),
    "flag of a match": ({"11"}, "def f(trt, x):\n    match x:\n        case 1: trt.BuilderFlag.INT8"),
    "flag of an unknown thing": ({"11"}, "def f(things): return things.pop().FP16"),
    "guard inverted": ({"11"}, "def f(trt):\n    if not hasattr(trt.BuilderFlag, 'FP16'): trt.BuilderFlag.FP16"),
    "guard inverted by leaving": (
        {"11"},
        "def f(trt):\n    if hasattr(trt.BuilderFlag, 'FP16'): return None\n    return trt.BuilderFlag.FP16",
    ),
    "guard of another name": ({"11"}, "def f(trt):\n    if hasattr(trt.BuilderFlag, 'TF32'): trt.BuilderFlag.FP16"),
    "guard of another class": ({"11"}, "def f(trt):\n    if hasattr(trt.DataType, 'HALF'): trt.BuilderFlag.FP16"),
    "guard with or": (
        {"11"},
        "def f(trt, x):\n    if x or hasattr(trt.BuilderFlag, 'FP16'): trt.BuilderFlag.FP16",
    ),
    "guard that ends too early": (
        {"11"},
        "def f(trt, c):\n    if hasattr(trt.BuilderFlag, 'FP16'): pass\n    c.set_flag(trt.BuilderFlag.FP16)",
    ),
    "guard in the wrong version": (
        {"8", "11"},
        """
        def f(trt):
            if int(trt.__version__.split(".")[0]) < 10:
                return trt.BuilderFlag.BF16
            return trt.BuilderFlag.FP16
        """,
    ),
    "guard in another function": (
        {"11"},
        """
        def f(trt, config):
            if hasattr(trt.BuilderFlag, "FP16"):
                _allow(trt, config)
            _allow(trt, config)
        def _allow(trt, config): config.set_flag(trt.BuilderFlag.FP16)
        """,
    ),
    "a literal that others may change": (
        {"11"},
        "def _f(trt, half): return trt.BuilderFlag.FP16 if half else None\ndef g(trt): return _f(trt, False)",
    ),
    "a default that others may change": ({"11"}, "def f(trt, half=False): return half and trt.BuilderFlag.FP16"),
    "a constant that others may change": ({"11"}, "HALF = False\ndef f(trt):\n    if HALF: trt.BuilderFlag.FP16"),
    "a value that may be another": (
        {"11"},
        "def f(trt, x):\n    on = False\n    if x: on = x.y()\n    if on: trt.BuilderFlag.FP16",
    ),
    "behind except of another error": (
        {"11"},
        "def f(trt, config):\n    try: config.set_flag(trt.BuilderFlag.FP16)\n    except ValueError: pass",
    ),
    "in a loop that goes on": (
        {"11"},
        "def f(trt, xs):\n    for x in xs:\n        if x: continue\n        trt.BuilderFlag.FP16",
    ),
    "EXPLICIT_BATCH": (
        {"11"},
        "def f(trt, b): return b.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
    ),
    "STRONGLY_TYPED": ({"8"}, "def f(trt): return trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
    "max_workspace_size": (
        {"10", "11"},
        "def f(trt, log): trt.Builder(log).create_builder_config().max_workspace_size = 1 << 30",
    ),
    "builder_optimization_level": ({"8"}, "def f(trt, c: 'trt.IBuilderConfig'): c.builder_optimization_level = 3"),
    "builder_optimization_level of an unknown thing": ({"8"}, "def f(config): config.builder_optimization_level = 3"),
    "progress_monitor": ({"8"}, "def f(trt, c: 'trt.IBuilderConfig', m): c.progress_monitor = m"),
    "a class of our own without its base": (
        {"8"},
        """
        def monitor(trt):
            class Monitor(trt.IProgressMonitor):
                def __init__(self): trt.IProgressMonitor.__init__(self)
                def phase_start(self, name, parent, steps): pass
                def step_complete(self, name, step): return True
                def phase_finish(self, name): pass
            return Monitor()
        """,
    ),
    "num_bindings": ({"10", "11"}, "def f(trt, e: 'trt.ICudaEngine'): return [e[i] for i in range(e.num_bindings)]"),
    "num_bindings of an unknown thing": ({"10", "11"}, "def f(engine): return engine.num_bindings"),
    "get_binding_index": (
        {"10", "11"},
        "def f(trt, log, plan): return trt.Runtime(log).deserialize_cuda_engine(plan).get_binding_index('x')",
    ),
    "execute_async_v2": (
        {"10", "11"},
        "def f(trt, e: 'trt.ICudaEngine', s): e.create_execution_context().execute_async_v2([], s)",
    ),
    "execute_async_v2 beside its guard": (
        {"10", "11"},
        """
        def f(context, stream):
            if hasattr(context, "execute_async_v3"):
                context.execute_async_v3(stream)
            context.execute_async_v2([], stream)
        """,
    ),
    "build_engine": ({"10", "11"}, "def f(trt, log, n, c): return trt.Builder(log).build_engine(n, c)"),
    "device_memory_size": ({"11"}, "def f(trt, e: 'trt.ICudaEngine'): return e.device_memory_size"),
    "device_memory_size_v2": ({"8"}, "def f(trt, e: 'trt.ICudaEngine | None'): return e.device_memory_size_v2"),
    "platform_has_fast_fp16": ({"11"}, "def f(trt, log): return trt.Builder(log).platform_has_fast_fp16"),
    "dtype that cannot be set": ({"11"}, "def f(trt, n: 'trt.INetworkDefinition'): n.get_input(0).dtype = trt.int8"),
    "property that cannot be set": (ALL, "def f(trt, e: 'trt.ICudaEngine'): e.num_io_tensors = 2"),
    "active_optimization_profile that cannot be set": (
        {"10", "11"},
        """
        def f(trt, engine: "trt.ICudaEngine"):
            context = engine.create_execution_context()
            context.active_optimization_profile = 0
        """,
    ),
    "output type of an unknown layer": ({"11"}, "def f(trt, layer): layer.set_output_type(0, trt.DataType.HALF)"),
    "precision of every layer": (
        {"11"},
        "def f(trt, n: 'trt.INetworkDefinition'):\n    for layer in n: layer.precision = trt.float16",
    ),
    "flag by number": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.set_flag(0)"),
    "flag made of a number": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.set_flag(trt.BuilderFlag(6))"),
    "flag of another enum": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.set_flag(trt.DataType.HALF)"),
    "network by number": (ALL, "def f(trt, log): return trt.Builder(log).create_network(1 << 0)"),
    "verbosity by number": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.profiling_verbosity = 2"),
    "tactic sources by number": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.set_tactic_sources(1 << 3 | 1 << 4)"),
    "one argument too many": (ALL, "def f(trt, log): return trt.Builder(log).create_builder_config(1)"),
    "one argument too few": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.set_timing_cache(b'')"),
    "argument of an older version": (
        {"8"},
        "def f(trt, e: 'trt.ICudaEngine', how): return e.create_execution_context(how)",
    ),
    "keyword that is none": (ALL, "def f(trt, c: 'trt.IBuilderConfig'): c.create_timing_cache(buffer=b'')"),
    "object that nobody makes": (ALL, "def f(trt): return trt.IBuilderConfig()"),
    "misspelled class": (ALL, "import tensorrt as trt\ntrt.BuilderFlags"),
    "misspelled member": (ALL, "import tensorrt as trt\ntrt.BuilderFlag.FP61"),
    "misspelled method": (ALL, "def f(trt, log): return trt.Builder(log).create_builder_configuration()"),
    "misspelled annotation": (ALL, "def f(trt, config: 'trt.IBuilderConf'): pass"),
    "misspelled name to import": (ALL, "from tensorrt import Bilder"),
    "logger without log": (
        ALL,
        "def f(trt):\n    class Log(trt.ILogger):\n        def write(self, severity, text): pass",
    ),
    "logger with a method that nobody calls": (
        ALL,
        """
        import tensorrt as trt
        class Log(trt.ILogger):
            def log(self, severity, text): pass
            def report_error(self, text): pass
        """,
    ),
    "logger whose log takes too little": (
        ALL,
        "import tensorrt as trt\nclass Log(trt.ILogger):\n    def log(self, text): pass",
    ),
    "logger whose base is not made": (
        ALL,
        """
        import tensorrt as trt
        class Log(trt.ILogger):
            def __init__(self): self.lines = []
            def log(self, severity, text): pass
        """,
    ),
    "enable in a method that nobody calls here": (
        {"11"},
        """
        class Backend(Base):
            def __init__(self, trt, engine: "trt.ICudaEngine"): self.engine = engine
            def _run(self): return self.engine.device_memory_size
        """,
    ),
    "a list that grows": (
        {"10", "11"},
        """
        def f(trt, engine: "trt.ICudaEngine"):
            contexts = []
            for _ in range(2):
                contexts.append(engine.create_execution_context())
            for number, context in enumerate(contexts):
                context.execute_async_v2([number], 0)
        """,
    ),
    "a wrapped engine": (
        {"10", "11"},
        "from .forking import spared\ndef f(trt, e: 'trt.ICudaEngine'): return spared(e).max_batch_size",
    ),
    "a with block": ({"10", "11"}, "def f(trt, log):\n    with trt.Builder(log) as b: b.max_batch_size = 1"),
    "a walrus": ({"11"}, "def f(trt):\n    if (B := trt.BuilderFlag) and B.FP16: pass"),
    "a comprehension": ({"11"}, "def f(trt, c): return [c.set_flag(B.FP16) for B in (trt.BuilderFlag,)]"),
    "a callback": (
        {"11"},
        "import threading\ndef f(trt):\n    def g(): trt.BuilderFlag.FP16\n    threading.Thread(target=g).start()",
    ),
}

RIGHT = {
    "guard": "def f(trt, c):\n    if hasattr(trt.BuilderFlag, 'FP16'): c.set_flag(trt.BuilderFlag.FP16)",
    "guard with and": "def f(trt, p): return p == 'fp16' and hasattr(trt.BuilderFlag, 'FP16') and trt.BuilderFlag.FP16",
    "guard of an alias": """
        import tensorrt as nv
        def f(config):
            kinds = nv.BuilderFlag
            if hasattr(kinds, "FP16"):
                config.set_flag(kinds.FP16)
        """,
    "guard that leaves": """
        def f(trt, config: "trt.IBuilderConfig", level):
            if not hasattr(config, "builder_optimization_level"):
                raise ValueError("none here")
            config.builder_optimization_level = level
        """,
    "guard that goes on": """
        def f(trt, config, names):
            for name in ("FP16", "BF16", "INT8"):
                if not hasattr(trt.BuilderFlag, name):
                    continue
                config.set_flag(getattr(trt.BuilderFlag, name))
        """,
    "guard of an unknown thing": """
        def f(config, engine, level):
            if hasattr(config, "builder_optimization_level"):
                config.builder_optimization_level = level
            has_new = hasattr(engine, "device_memory_size_v2")
            return engine.device_memory_size_v2 if has_new else engine.device_memory_size
        """,
    "guard in a variable": """
        def f(trt, config):
            has_flag = hasattr(trt.BuilderFlag, "FP16")
            if has_flag:
                config.set_flag(trt.BuilderFlag.FP16)
        """,
    "guard in a flag": """
        def f(trt, config):
            half = False
            if hasattr(trt.BuilderFlag, "FP16"):
                half = True
            if half:
                config.set_flag(trt.BuilderFlag.FP16)
        """,
    "guard in a helper": """
        def has(thing, name):
            return hasattr(thing, name)
        def f(trt):
            return trt.BuilderFlag.FP16 if has(trt.BuilderFlag, "FP16") else None
        """,
    "guard in a helper that returns literals": """
        def _is_typed(trt):
            if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
                return True
            return False
        def f(trt, config):
            if not _is_typed(trt):
                config.set_flag(trt.BuilderFlag.FP16)
        """,
    "guard around the helper": """
        def f(trt, config):
            if hasattr(trt.BuilderFlag, "FP16"):
                _allow(trt, config)
        def _allow(trt, config):
            config.set_flag(trt.BuilderFlag.FP16)
        """,
    "guard in the constructor": """
        class Builder:
            def __init__(self, trt):
                self._trt = trt
                self._has_flag = hasattr(trt.BuilderFlag, "FP16")
            def build(self, config):
                if self._has_flag:
                    config.set_flag(self._trt.BuilderFlag.FP16)
        """,
    "guard in a returned pair": """
        def _network(trt, builder):
            flags, typed = 0, hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
            return builder.create_network(flags), typed
        def f(trt, log):
            network, typed = _network(trt, trt.Builder(log))
            if not typed:
                trt.BuilderFlag.FP16
        """,
    "guard of every version": """
        def f(context, stream):
            if hasattr(context, "execute_async_v3"):
                return context.execute_async_v3(stream)
            return context.execute_async_v2([], stream)
        """,
    "getattr with a default": """
        def f(trt, config):
            flag = getattr(trt.BuilderFlag, "FP16", None)
            if flag is not None:
                config.set_flag(flag)
            level = getattr(config, "builder_optimization_level", 0)
            return getattr(trt, "IProgressMonitor", object), level
        """,
    "getattr by a table": """
        NAMES = {"fp16": "FP16", "int8": "INT8"}
        def f(trt, precision):
            if hasattr(trt.BuilderFlag, NAMES[precision]):
                return getattr(trt.BuilderFlag, NAMES[precision])
        """,
    "members": "def f(trt): return 'FP16' in trt.BuilderFlag.__members__ and trt.BuilderFlag.FP16",
    "version": """
        import tensorrt as trt
        MAJOR = int(trt.__version__.split(".")[0])
        def f(engine: trt.ICudaEngine):
            if MAJOR >= 10:
                return engine.device_memory_size_v2
            return engine.device_memory_size
        """,
    "version as numbers": """
        import tensorrt as trt
        def f(config: "trt.IBuilderConfig", level):
            if tuple(map(int, trt.__version__.split(".")[:2])) >= (8, 6) or trt.__version__.startswith("9"):
                config.builder_optimization_level = level
        """,
    "import of what may be missing": """
        try:
            from tensorrt import IProgressMonitor
        except ImportError:
            IProgressMonitor = None
        """,
    "except AttributeError": """
        def f(trt, config):
            try:
                config.set_flag(trt.BuilderFlag.FP16)
            except AttributeError:
                pass
        """,
    "monitor": """
        def f(trt, config):
            if hasattr(trt, "IProgressMonitor"):
                class Monitor(trt.IProgressMonitor):
                    def __init__(self):
                        super().__init__()
                    def phase_start(self, name, parent, steps): pass
                    def step_complete(self, name, step): return True
                    def phase_finish(self, name): pass
                config.progress_monitor = Monitor()
        """,
    "names of ours that older versions have": """
        from dataclasses import replace
        from .. import Request
        def f(trt, request: Request, path, log):
            request = replace(request, device="cuda:0")
            log.info("%s %s", request.precision, f"{path}".format())
            with open(path) as stream:
                return stream.read(), request.stage.fields, [each.direction for each in request.items]
        """,
    "bytes of a plan": """
        def f(trt, log, network, config):
            plan = trt.Builder(log).build_serialized_network(network, config)
            if plan is None:
                raise ValueError
            return bytes(plan), memoryview(plan).nbytes, plan.nbytes
        """,
    "loose ends": """
        def f(trt, log):
            network = trt.Builder(log).create_network(0)
            flags = 0
            flags |= 1 << int(trt.BuilderFlag.TF32)
            shapes = [(1, 8, 8, 3), (1, 64, 64, 3)]
            profile = trt.Builder(log).create_optimization_profile()
            profile.set_shape(network.get_input(0).name, *shapes, shapes[-1])
            return trt.Builder(log).create_network(flags=flags)
        """,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_version_lacks_is_found(name):
    versions, code = WRONG[name]
    assert wrong_in(code) == versions


@pytest.mark.parametrize("name", RIGHT)
def test_guarded_code_passes(name):
    assert wrong_in(RIGHT[name]) == set()
