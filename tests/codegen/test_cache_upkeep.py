"""What counts as llmopt's own in the cache folder, which of it is dispensable, and that nothing else is touched."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from llmopt.codegen.cpu import object_cache
from llmopt.codegen.cpu.cache_upkeep import LEFTOVERS, dispensable, entries, remove
from llmopt.codegen.cpu.toolchain import build_library
from llmopt.codegen.triton.launch import load_source

DAY = 86400.0


def put(folder: Path, name: str, size: int = 10, days: float = 0.0) -> Path:
    """A file that was used so many days ago."""
    path = folder / name
    path.write_bytes(b"x" * size)
    when = time.time() - days * DAY
    os.utime(path, (when, when))
    return path


def names(found: list) -> list[str]:  # type: ignore[type-arg]
    return [entry.path.name for entry in found]


A, B, C, D = "a" * 32 + ".o", "b" * 32 + ".so", "c" * 32 + ".graph", "llmopt_loop_" + "d" * 24 + ".py"


def test_only_files_of_the_cache_are_listed(tmp_path: Path) -> None:
    for age, name in enumerate((D, C, B, A)):
        put(tmp_path, name, days=age)
    for other in ("notes.txt", "libc.so", "setup.py", "A" * 32 + ".o", "a" * 23 + ".o", "tmp_short.o"):
        put(tmp_path, other, days=99)
    (tmp_path / ("e" * 32 + ".so")).mkdir()
    (tmp_path / ("f" * 32 + ".so")).symlink_to(put(tmp_path, "elsewhere"))
    found = entries(tmp_path)
    assert names(found) == [A, B, C, D], "longest unused first"
    assert len({entry.kind for entry in found}) == 4
    before = {path.name for path in tmp_path.iterdir()}
    remove(found)
    assert {path.name for path in tmp_path.iterdir()} == before - {A, B, C, D}


def test_what_is_compiled_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    build_library(['#include "abi.h"\nLLMOPT_KERNEL(nothing) {}\n'])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    load_source("# A generated kernel.\n")
    files = {path.name for path in tmp_path.iterdir()}
    assert set(names(entries(tmp_path))) == files
    assert {Path(name).suffix for name in files} >= {".o", ".so", ".py"}


def test_a_folder_that_is_missing_is_empty(tmp_path: Path) -> None:
    assert entries(tmp_path / "none") == []


def test_what_was_not_used_for_days(tmp_path: Path) -> None:
    for name, days in ((A, 40), (B, 31), (C, 29), (D, 0)):
        put(tmp_path, name, days=days)
    assert names(dispensable(entries(tmp_path), unused_s=30 * DAY)) == [A, B]
    assert dispensable(entries(tmp_path)) == []


@pytest.mark.parametrize(
    ("limit", "gone"), [(100, []), (99, [A]), (90, [A]), (89, [A, B]), (40, [A, B, C]), (39, [A, B, C, D])]
)
def test_the_longest_unused_go_beyond_a_limit(tmp_path: Path, limit: int, gone: list[str]) -> None:
    for name, size, days in ((A, 10, 4), (B, 20, 3), (C, 30, 2), (D, 40, 1)):
        put(tmp_path, name, size, days)
    assert names(dispensable(entries(tmp_path), limit=limit)) == gone
    assert names(dispensable(entries(tmp_path), limit=limit, unused_s=2.5 * DAY)) == (gone if len(gone) > 2 else [A, B])


def test_what_a_killed_process_left_goes_but_not_what_is_being_written(tmp_path: Path) -> None:
    put(tmp_path, "tmp0a1b2c_d.so", days=1)
    put(tmp_path, "tmp0a1b2c_e.so")
    kept = put(tmp_path, A, size=20, days=3)
    found = entries(tmp_path)
    assert [(entry.path.name, entry.kind) for entry in found[1:]] == [("tmp0a1b2c_d.so", LEFTOVERS)]
    assert dispensable(found, unused_s=30 * DAY) == dispensable(found, limit=20) == found[1:]
    assert found[0].path == kept, "there is room for it without what goes anyway"


def test_an_entry_that_went_meanwhile_is_no_error(tmp_path: Path) -> None:
    path = put(tmp_path, A)
    found = entries(tmp_path)
    path.unlink()
    remove(found)


def test_use_is_noted_to_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    path = object_cache.write(A, b"content")
    for days, noted in ((30.0, 0.0), (0.5, 0.5)):
        when = time.time() - days * DAY
        os.utime(path, (when, when))
        assert object_cache.read(A) == b"content"
        assert abs(time.time() - path.stat().st_mtime - noted * DAY) < 60
