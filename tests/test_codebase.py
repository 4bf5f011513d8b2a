"""The code base holds itself to account: imports, versions, stub, docstrings, symbols."""

import ast
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import get_type_hints

import pytest

import fusedattn
from fusedattn import _core
from fusedattn._rules import RuleKeywords, Rules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "fusedattn"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Who may know whom: cli, integrations -> train -> encoder, losses, optim, text -> nn -> the public
# functions -> _core.
# "" is the package's own __init__, through which the upper storeys reach attention.
BELOW_NN = {"", "_attention", "_core", "_varlen"}
MAY_IMPORT = {
    "_core": set(),
    "reference": set(),
    "_rules": set(),
    "_attention": {"_core", "_rules"},
    "_varlen": {"_core", "_attention", "_rules"},
    "_runtime": {"_core"},
    "_faces": {"_core", "_kvcache", "_rules"},
    "_kvcache": {"_core", "_rules", ""},
    "_states": {"_core"},
    "_whole": set(),
    "": {
        "_attention",
        "_core",
        "_faces",
        "_kvcache",
        "_runtime",
        "_states",
        "_varlen",
        "reference",
    },
    "nn": BELOW_NN,
    "losses": {"nn"} | BELOW_NN,
    "optim": {"nn"} | BELOW_NN,
    "text": {"nn"},
    "metrics": {"nn"},
    "encoder": {"_whole", "nn", "text"} | BELOW_NN,
    "train": {"_whole", "encoder", "losses", "metrics", "optim", "text", "nn"} | BELOW_NN,
    "bench": {"reference", "encoder", "losses", "optim", "text", "nn"} | BELOW_NN,
    "integrations": {"train", "encoder", "losses", "optim", "text", "nn", "reference", "_faces"}
    | BELOW_NN,
    "cli": {"_whole", "bench", "train", "encoder", "losses", "metrics", "optim", "text", "nn"}
    | BELOW_NN,
}


def dotted(path):
    """``python/fusedattn/nn/linear.py`` -> ``nn.linear``; an ``__init__`` names its package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists() or name == "_core"


def imports(path):
    """Every import of a module: ``(done when it is imported?, absolute dotted name)``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("fusedattn." + dotted(path)).rstrip(".").split(".")
    if path.name != "__init__.py":
        package.pop()
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield at_import, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}".partition(".")[2]
                named_module = base.startswith("fusedattn") and is_module(inside)
                yield at_import, f"{base}.{alias.name}" if named_module else base


@pytest.mark.parametrize("path", MODULES, ids=lambda p: dotted(p) or "__init__")
def test_imports_point_downwards(path):
    component = dotted(path).partition(".")[0]
    assert component in MAY_IMPORT, f"{component} is new: say in MAY_IMPORT whom it may know"
    for _, name in imports(path):
        if name.partition(".")[0] == "fusedattn":
            target = name.partition(".")[2].partition(".")[0]
            allowed = MAY_IMPORT[component] | {component}
            assert target in allowed, f"{dotted(path) or 'fusedattn'} imports {name}"


def test_modules_import_in_no_circle():
    """Not even for type checkers. A package's __init__, which gathers its modules, is left out."""
    graph = {
        dotted(path): {name.partition(".")[2] for _, name in imports(path)} - {dotted(path)}
        for path in MODULES
        if path.name != "__init__.py"
    }
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def names_from_package(path):
    """What a file of tests imports of fusedattn, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedattn"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name for name in names if name.startswith("fusedattn"))


def test_the_yardstick_stands_beside_the_oracle():
    """What tolerances come from shares no formula with the oracle; neither goes inside it."""
    yardstick = set(names_from_package(ROOT / "tests" / "yardstick.py"))
    assert yardstick == {"fusedattn.reference.dropout_mask"}
    for name in names_from_package(ROOT / "tests" / "accuracy.py"):
        assert not any(part.startswith("_") for part in name.split(".")), name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: dotted(p) or "__init__")
def test_only_numpy_is_imported_at_module_level(path):
    """Other packages are imported by the function that uses them.

    integrations.X alone may import X, whose classes it derives from: to import it is to use it.
    """
    known = set(sys.stdlib_module_names) | {"numpy", "fusedattn"}
    known |= set(dotted(path).split(".")[1:]) if dotted(path).startswith("integrations.") else set()
    foreign = {name for top, name in imports(path) if top and name.partition(".")[0] not in known}
    assert not foreign


def test_reference_knows_numpy_alone():
    known = set(sys.stdlib_module_names) | {"numpy"}
    for path in (p for p in MODULES if dotted(p).partition(".")[0] == "reference"):
        for _, name in imports(path):
            assert name.startswith("fusedattn.reference") or name.partition(".")[0] in known, name


def loaded_by(statement):
    """Top-level names in ``sys.modules`` after a statement in a fresh interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(answer.stdout.splitlines()[-1])}


def test_import_loads_numpy_alone():
    extra = loaded_by("import fusedattn") - loaded_by("import numpy")
    assert extra - set(sys.stdlib_module_names) == {"fusedattn"}


def test_info_needs_numpy_alone():
    extra = loaded_by("from fusedattn.cli import main; main(['info'])") - loaded_by("import numpy")
    assert extra - set(sys.stdlib_module_names) == {"fusedattn"}


def test_versions_agree():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', pyproject, re.MULTILINE)[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version == fusedattn.__version__ == _core.__version__
    assert version == metadata.version("fusedattn")
    assert version == re.search(r"^## (\S+)", changelog, re.MULTILINE)[1]


def test_stub_agrees_with_the_extension():
    """Every public name is in both; every function has the arguments that its signature shows."""
    stub = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
    functions = {n.name: n for n in stub.body if isinstance(n, ast.FunctionDef)}
    public = {n for n in vars(_core) if not n.startswith("_")}
    assert functions.keys() == public
    for name, node in functions.items():
        signature = getattr(_core, name).__doc__.splitlines()[0]
        shown = ast.parse(f"def {signature}: ...").body[0].args
        assert [a.arg for a in shown.args] == [a.arg for a in node.args.args], signature
        assert [ast.unparse(d) for d in shown.defaults] == [
            ast.unparse(d) for d in node.args.defaults
        ], signature


def test_functions_of_the_core_say_what_they_do():
    for name in (n for n in vars(_core) if not n.startswith("_")):
        signature, _, text = getattr(_core, name).__doc__.partition("\n")
        assert "arg0" not in signature, signature
        assert text.strip(), name


@pytest.mark.parametrize(
    "name", ["attention", "attention_backward", "attention_varlen", "attention_varlen_backward"]
)
def test_signatures_show_every_rule(name):
    function = getattr(fusedattn, name)
    shown = inspect.signature(function).parameters
    for rule, default in Rules._field_defaults.items():
        assert (shown[rule].kind, shown[rule].default) == (shown[rule].KEYWORD_ONLY, default)
    assert all(p.kind is not p.VAR_KEYWORD for p in shown.values())
    with pytest.raises(TypeError, match=r"^causal: expected .* a rule \(mask, bias, .*got neither"):
        function(*[None] * sum(p.default is p.empty for p in shown.values()), causal=True)


def test_rules_are_named_and_explained_once():
    assert get_type_hints(Rules) == get_type_hints(RuleKeywords)
    assert Rules._field_defaults.keys() == set(Rules._fields)
    text = inspect.getdoc(Rules)
    for rule in Rules._fields:
        paragraph = re.search(rf"^{rule} : .*\n(    .*\n?)+", text, re.MULTILINE)
        assert paragraph[0].rstrip() in inspect.getdoc(fusedattn.attention), rule


@pytest.mark.parametrize("path", MODULES, ids=lambda p: dotted(p) or "__init__")
def test_what_is_public_has_a_docstring(path):
    """Every module; every function and class, and its methods, without a leading underscore."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in public(tree):
        assert ast.get_docstring(node), node.name
        for method in public(node) if isinstance(node, ast.ClassDef) else []:
            assert ast.get_docstring(method), f"{node.name}.{method.name}"


def public(node):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in node.body if isinstance(n, kinds) and not n.name.startswith("_")]


# Which room of csrc may include from which. Of the kernel, only its plain structs are for everyone.
ROOMS = {
    "bindings": {"attention", "layers", "threads", "isa", "kernel"},
    "attention": {"threads", "isa", "kernel"},
    "layers": {"threads", "isa", "kernel"},
    "threads": {"kernel"},
    "isa": {"kernel"},
    "kernel": set(),
}
STRUCTS = {"kernel/task.h", "kernel/layer_task.h"}
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".inl"))


def included(path, brackets='""'):
    """What a C++ source includes in quotes, or in angle brackets."""
    text = path.read_text(encoding="utf-8")
    return re.findall(
        rf"^\s*#include {brackets[0]}([^{brackets[1]}]+){brackets[1]}", text, re.MULTILINE
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_point_downwards(path):
    """Includes name their room; the rooms above the kernel know its structs alone."""
    room = path.relative_to(CSRC).parts[0]
    assert room in ROOMS, f"{room} is new: say in ROOMS whom it may know"
    for name in included(path):
        target = name.partition("/")[0]
        assert (CSRC / name).is_file(), f"{path.name} includes {name}"
        assert target in ROOMS[room] | {room}, f"{path.name} includes {name}"
        is_set = room == "isa" and path.stem != "dispatch"
        assert target != "kernel" or room == "kernel" or is_set or name in STRUCTS, name


def test_pybind11_lives_in_bindings_alone():
    users = {
        p.relative_to(CSRC).parts[0]
        for p in SOURCES
        for name in included(p, "<>")
        if name.startswith("pybind11") or name == "Python.h"
    }
    assert users == {"bindings"}


def test_cpp_files_say_what_they_do():
    """A source explains itself in its first line, or its header does."""
    for path in SOURCES:
        starts = [
            p.read_text(encoding="utf-8")[:3] for p in (path, path.with_suffix(".h")) if p.is_file()
        ]
        assert "// " in starts, path


X86 = dict.fromkeys(("x86_64", "AMD64"), ("baseline", "avx2", "avx512", "avx512bf16", "amx"))
ARM = {"aarch64": ("baseline", "neon"), "arm64": ("baseline", "neon")}


def weak_code(source, flags, tmp_path):
    """Weak functions that a source defines: the linker keeps one copy, from whichever object.

    Compiled without optimisation, where nothing is inlined and every such function shows.
    """
    obj = tmp_path / (source.stem + ".o")
    compiler = [shutil.which("c++"), "-std=c++20", "-O0", "-w", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(obj)], check=True)
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", str(obj)], capture_output=True, text=True, check=True
    ).stdout
    entries = (line.split(maxsplit=2)[1:] for line in listing.splitlines())
    return [name for kind, name in entries if kind in "WwuI"]


needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("nm")), reason="needs c++ and nm to look at symbols"
)


@needs_compiler
def test_instruction_sets_share_no_code(tmp_path):
    """An old CPU must never run a std function that was compiled for AVX-512.

    A copy from the baseline's object is the one that may run anywhere.
    """
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")

    def weak(isa):
        flags = re.search(rf"^\s*fusedattn_isa\({isa}\b([^)]*)\)", cmake, re.MULTILINE)[1].split()
        return weak_code(ROOT / "csrc" / "isa" / f"{isa}.cpp", flags, tmp_path)

    isas = (X86 | ARM).get(platform.machine(), ("baseline",))[1:]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert dict(zip(isas, pool.map(weak, isas), strict=True)) == {isa: [] for isa in isas}


def test_dispatch_lists_what_was_built():
    assert _core.cpu_info()["isas_built"] == list(
        (X86 | ARM).get(platform.machine(), ("baseline",))
    )


@needs_compiler
def test_weak_code_is_seen(tmp_path):
    source = tmp_path / "leaky.cpp"
    source.write_text("#include <algorithm>\nint f(int a, int b) { return std::max(a, b); }\n")
    assert any("std::max" in name for name in weak_code(source, [], tmp_path))
