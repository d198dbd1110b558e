"""Runs mypy on the source folders under the names that they are imported by.

mypy does not know setuptools' `package-dir`, so it is shown a tree of symbolic links, `build/typecheck/llmopt/...`;
its messages are rewritten to name the real files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"


def link_packages() -> dict[str, str]:
    """Makes the tree; returns link -> source folder or file, both relative to the repository."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    links: dict[str, str] = {}
    for package, folder in folders.items():
        target = TREE.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for entry in (ROOT / folder).iterdir():
            if entry.suffix in {".py", ".pyi", ".typed"}:
                (target / entry.name).symlink_to(entry)
                links[str((target / entry.name).relative_to(ROOT))] = str(entry.relative_to(ROOT))
    return links


def main() -> int:
    links = link_packages()
    scripts = [str(p.relative_to(ROOT)) for folder in ("examples", "benchmarks") for p in (ROOT / folder).glob("*.py")]
    command = [sys.executable, "-m", "mypy", str((TREE / "llmopt").relative_to(ROOT)), *sorted(scripts), *sys.argv[1:]]
    answer = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    for line in answer.stdout.splitlines():
        name, colon, rest = line.partition(":")
        print(links.get(name, name) + colon + rest)
    sys.stderr.write(answer.stderr)
    return answer.returncode


if __name__ == "__main__":
    sys.exit(main())
