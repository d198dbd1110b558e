"""The wheel holds what the sources hold, works outside the repository, and is found by `torch.compile`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("api", "compiler", "passes", "codegen", "runtime")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = SETTINGS["tool"]["setuptools"]


def package_name(folder: str) -> str:
    """codegen/cpu -> llmopt.codegen.cpu; api is llmopt itself."""
    parts = folder.split("/")
    return ".".join(["llmopt", *(parts[1:] if parts[0] == "api" else parts)])


def source_folders() -> set[str]:
    return {p.parent.relative_to(ROOT).as_posix() for layer in LAYERS for p in (ROOT / layer).rglob("__init__.py")}


def shipped_files() -> set[str]:
    """Path in the wheel of every Python source, kernel source and type marker in the layers' folders."""
    return {
        "/".join([*package_name(p.parent.relative_to(ROOT).as_posix()).split("."), p.name])
        if p.parent.name != "kernels"
        else "/".join([*package_name(p.parent.parent.relative_to(ROOT).as_posix()).split("."), "kernels", p.name])
        for layer in LAYERS
        for p in (ROOT / layer).rglob("*")
        if p.suffix in {".py", ".h", ".cpp", ".cu", ".json", ".html"} or p.name == "py.typed"
    }


def test_listed_packages_are_the_folders() -> None:
    folders = {package_name(folder): folder for folder in source_folders()}
    assert set(SETUPTOOLS["packages"]) == set(folders)
    assert SETUPTOOLS["package-dir"] == folders


def test_no_python_outside_a_package() -> None:
    lonely = [p for layer in LAYERS for p in (ROOT / layer).rglob("*.py") if not (p.parent / "__init__.py").exists()]
    assert lonely == []


def test_every_package_is_typed() -> None:
    assert [folder for folder in source_folders() if not (ROOT / folder / "py.typed").exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that neither old build folders nor this checkout take part."""
    source = tmp_path_factory.mktemp("source")
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / layer, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    answer = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_source(wheel: Path) -> None:
    expected = shipped_files()
    assert any(name.endswith("abi.h") for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert held == expected
    assert len(licences) == 1


def test_wheel_imports_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Without the editable install: `-S` leaves site's import hooks out, the dependencies come by path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    site = Path(__import__("torch").__file__).parent.parent
    names = [package_name(folder) for folder in sorted(source_folders())]
    code = f"""
import importlib, sys
sys.path[:0] = [{str(tmp_path / "unpacked")!r}]
sys.path.append({str(site)!r})
for name in {names!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
from llmopt.codegen.cpu import toolchain
assert (toolchain.KERNEL_FOLDER / "abi.h").is_file()
print("fine")
"""
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert answer.stdout.strip() == "fine", answer.stderr


def test_backend_is_listed_without_importing_llmopt() -> None:
    code = "import sys, torch._dynamo; print('llmopt' in torch._dynamo.list_backends(), 'llmopt' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "tests"
    )
    assert answer.stdout.split() == ["True", "False"], answer.stdout + answer.stderr


def test_python_and_torch_ranges() -> None:
    """A new torch minor release is taken up on purpose, after its graphs were looked at."""
    (torch_range,) = [d for d in SETTINGS["project"]["dependencies"] if d.startswith("torch>")]
    assert "<" in torch_range
    assert SETTINGS["project"]["requires-python"] == ">=3.11"
