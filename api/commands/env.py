"""`llmopt env`."""

from __future__ import annotations

import json
import os
from typing import Any

import typer

import llmopt
from llmopt.commands.common import AsJson

EPILOG = "Example: llmopt env --json"


def env(as_json: AsJson = False) -> None:
    """Print versions, compiler, instruction set, kernel cache and threads: what a report of a problem should hold."""
    found = _environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, setting in found.items():
        typer.echo(f"{name.ljust(width)}  {setting}")


def _environment() -> dict[str, Any]:
    import platform
    from importlib import metadata

    import torch

    from llmopt.codegen.cpu.cache_upkeep import entries
    from llmopt.codegen.cpu.object_cache import cache_folder
    from llmopt.codegen.cpu.toolchain import find_compiler, host_level
    from llmopt.compiler.errors import ToolchainError

    found: dict[str, Any] = {"llmopt": llmopt.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = platform.platform()
    found["instruction set"] = host_level().name
    try:
        compiler = find_compiler()
        found["compiler"] = f"{' '.join(compiler.command)}, {compiler.version}"
    except ToolchainError as error:
        found["compiler"] = f"none: {error}"
    folder = cache_folder()
    size = sum(entry.size for entry in entries(folder))
    found["kernel cache"] = f"{folder}, {size / 1e6:.1f} MB"
    found["threads"] = torch.get_num_threads()
    settings = {name: text for name, text in sorted(os.environ.items()) if name.startswith("LLMOPT_")}
    found["environment"] = (
        " ".join(f"{name}={text}" for name, text in settings.items()) or "no LLMOPT_* variable is set"
    )
    return found
