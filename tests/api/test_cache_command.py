"""`llmopt cache`: what it prints, and what is left afterwards."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmopt.cli import app

OLD, NEW, OTHER = "a" * 32 + ".o", "b" * 32 + ".so", "keep.me"


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two entries, of 3 MB and 40 days, and of 1 MB and today, and a file that is not llmopt's."""
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    for name, size in ((OLD, 3_000_000), (NEW, 1_000_000), (OTHER, 5)):
        (tmp_path / name).write_bytes(bytes(size))
    long_ago = time.time() - 40 * 86400
    os.utime(tmp_path / OLD, (long_ago, long_ago))
    return tmp_path


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_info(folder: Path) -> None:
    text = run("info").stdout
    assert f"{folder}: 2 files, 4.0 MB" in text
    assert "compiled kernels" in text and "linked libraries" in text
    found = json.loads(run("info", "--json").stdout)
    assert found["folder"] == str(folder) and found["bytes"] == 4_000_000
    assert found["kinds"]["compiled kernels"] == {"files": 1, "bytes": 3_000_000}


def test_info_of_a_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "none"))
    assert "0 files" in run("info").stdout
    assert not (tmp_path / "none").exists(), "looking makes nothing"


def test_clear(folder: Path) -> None:
    assert run("clear", "--dry-run").stdout == "would remove 2 files, 4.0 MB\n"
    assert left(folder) == {OLD, NEW, OTHER}
    assert run("clear").stdout == "removed 2 files, 4.0 MB\n"
    assert left(folder) == {OTHER}


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["--days", "30"], {OLD}),
        (["--days", "50"], set()),
        (["--days", "0"], {OLD, NEW}),
        (["--max-size", "2M"], {OLD}),
        (["--max-size", "1.5mb"], {OLD}),
        (["--max-size", "4000000"], set()),
        (["--max-size", "0"], {OLD, NEW}),
        (["--days", "50", "--max-size", "1G"], set()),
        (["--days", "30", "--max-size", "999K"], {OLD, NEW}),
        (["--days", "30", "--dry-run"], set()),
    ],
)
def test_prune(folder: Path, arguments: list[str], gone: set[str]) -> None:
    run("prune", *arguments)
    assert left(folder) == {OLD, NEW, OTHER} - gone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["'days'", "--max-size"]),
        (["--days", "-1"], ["'days'", "-1", "at least 0"]),
        (["--days", "nan"], ["'days'", "nan"]),
        (["--max-size", "much"], ["'max_size'", "'much'", "K, M, G or T"]),
        (["--max-size", "-1"], ["'max_size'", "'-1'"]),
    ],
)
def test_mistakes_remove_nothing(folder: Path, arguments: list[str], words: list[str]) -> None:
    error = run("prune", *arguments, status=2).stderr
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert left(folder) == {OLD, NEW, OTHER}
