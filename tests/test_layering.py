"""Imports run one way (api -> runtime -> codegen -> compiler <- passes); nothing heavy or unsafe comes with them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Which layers each layer may import.
ALLOWED = {
    "compiler": {"compiler"},
    "passes": {"passes", "compiler"},
    "codegen": {"codegen", "compiler"},
    "runtime": {"runtime", "codegen", "compiler"},
    "api": {"api", "runtime", "codegen", "passes", "compiler"},
}
# The one place for a dependency that costs seconds, or that only one target has.
ADAPTERS = {
    "transformers": {"api/huggingface.py"},
    "triton": {
        f"codegen/triton/kernels/{name}.py" for name in ("attention", "functions", "linear", "lora", "moe", "rowwise")
    },
}
# Whatever unpickles can run code from a file; so can eval and exec.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADERS = {"import_module", "__import__"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "sympy.sympify", "sympify", "parse_expr", "sympy.parse_expr"}


@dataclass(frozen=True)
class Use:
    """A module name that a source file imports (or a dotted name that it calls), and the line."""

    name: str
    line: int


def package_of(path: str) -> list[str]:
    """The import package of a source file: api/x.py -> [llmopt], codegen/cpu/x.py -> [llmopt, codegen, cpu]."""
    folders = path.split("/")[:-1]
    return ["llmopt", *(folders[1:] if folders[0] == "api" else folders)]


def imports(tree: ast.AST, path: str) -> Iterator[Use]:
    """Every imported module, at module level or inside a function, relative ones resolved, `import_module` included.

    `from llmopt import x` counts as `llmopt.x`, because x may be a layer.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Use(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module == "llmopt":
                yield from (Use(f"llmopt.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield Use(module, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "import_module",
            "__import__",
        }:
            yield from (Use(str(a.value), node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))


def layer_of(module: str) -> str | None:
    """The layer that an `llmopt...` module belongs to, None for other modules."""
    parts = module.split(".")
    if parts[0] != "llmopt":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "api"


def violations(source: str, path: str) -> list[str]:
    """What is wrong with the imports and calls of one source file; `path` is relative to the repository."""
    tree = ast.parse(source)
    here = path.split("/")[0]
    found = []
    for use in imports(tree, path):
        top, layer = use.name.split(".")[0], layer_of(use.name)
        if layer is not None and layer not in ALLOWED[here]:
            found.append(f"{path}:{use.line}: {here} imports {use.name}, of layer {layer}")
        if path not in ADAPTERS.get(top, {path}):
            found.append(f"{path}:{use.line}: imports {top}; only {sorted(ADAPTERS[top]) or 'nobody'} may")
        if top in UNSAFE_MODULES:
            found.append(f"{path}:{use.line}: imports {top}, which runs code from data")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    unsafe = [(ast.unparse(call.func), call.lineno) for call in calls if ast.unparse(call.func) in UNSAFE_CALLS]
    found += [f"{path}:{line}: calls {name}, which runs code from data" for name, line in unsafe]
    return found


SOURCES = sorted(p.relative_to(ROOT).as_posix() for layer in ALLOWED for p in (ROOT / layer).rglob("*.py"))


def test_sources_are_found() -> None:
    assert {path.split("/")[0] for path in SOURCES} == set(ALLOWED)
    assert "compiler/errors.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES)
def test_imports_run_downwards(path: str) -> None:
    assert violations((ROOT / path).read_text("utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source", "what"),
    [
        ("compiler/x.py", "import llmopt", "layer api"),
        ("compiler/x.py", "def f():\n    from llmopt.passes import pipeline", "layer passes"),
        ("passes/x.py", "from llmopt import codegen", "layer codegen"),
        ("codegen/cpu/x.py", "from ...passes import pipeline", "layer passes"),
        ("codegen/cpu/x.py", "from ... import options", "layer api"),
        ("runtime/x.py", "import importlib\nimportlib.import_module('llmopt.passes.pipeline')", "layer passes"),
        ("runtime/x.py", "from llmopt import LLM", "layer api"),
        ("api/llm.py", "import transformers", "huggingface.py"),
        ("codegen/x.py", "import triton.language as tl", "kernels/linear.py"),
        ("runtime/x.py", "from pickle import loads", "pickle"),
        ("runtime/x.py", "import torch\ntorch.load('x')", "torch.load"),
        ("codegen/x.py", "eval('1')", "eval"),
    ],
)
def test_a_violation_is_seen(path: str, source: str, what: str) -> None:
    found = violations(source, path)
    assert len(found) == 1, found
    assert what in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("passes/x.py", "from llmopt.compiler.ops import linear\nfrom . import other"),
        ("codegen/cpu/x.py", "from ..index import Index\nfrom ...compiler import errors"),
        ("runtime/x.py", "from llmopt.codegen.cpu import native"),
        ("api/huggingface.py", "import transformers"),
        ("compiler/x.py", "model.eval()\nre.compile('x')"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    assert violations(source, path) == []


def modules_after(imported: list[str]) -> set[str]:
    """Top-level names and torch's own sub-packages in `sys.modules` of a fresh process after these imports."""
    code = f"import importlib, json, sys\nfor name in {imported!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "tests"
    )
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_importing_llmopt_is_light() -> None:
    loaded = modules_after(["llmopt"])
    assert "llmopt" in loaded
    assert loaded.isdisjoint({"transformers", "triton", "torch._dynamo", "torch._inductor", "matplotlib", "fastapi"})


def test_running_programs_needs_neither_dynamo_nor_transformers() -> None:
    """The layers that load and run an engine file, every module of them."""
    names = [
        ".".join([*package_of(path), *([] if path.endswith("__init__.py") else [Path(path).stem])])
        for path in SOURCES
        if path.split("/")[0] == "runtime"
    ]
    loaded = modules_after(names)
    assert loaded >= set(names)
    assert loaded.isdisjoint({"transformers", "triton", "torch._dynamo", "torch._inductor"})


@pytest.mark.parametrize("module", ["llmopt.exporting", "llmopt.llm", "llmopt.cli"])
def test_the_doors_load_dynamo_only_to_compile(module: str) -> None:
    """`llmopt.load` and the command line must run a saved program without it."""
    assert modules_after([module]).isdisjoint({"transformers", "triton", "torch._dynamo", "torch._inductor"})


def test_no_layer_but_the_adapter_imports_transformers() -> None:
    """Also not through somebody else's module: everything below api, in one process."""
    names = [
        ".".join([*package_of(path), *([] if path.endswith("__init__.py") else [Path(path).stem])])
        for path in SOURCES
        if path.split("/")[0] != "api"
    ]
    assert "transformers" not in modules_after(names)
