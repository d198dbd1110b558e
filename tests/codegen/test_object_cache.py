"""The kernel cache: what is in it is whole, many may write at once, and trouble with it costs time only."""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.codegen.cpu import object_cache, toolchain
from llmopt.codegen.cpu.available import available_cpus, cgroup_cpus
from llmopt.codegen.cpu.native import NativeCall, NativePlan, TensorOperand, default_threads
from llmopt.codegen.cpu.toolchain import LEVELS, build_library, compile_object, host_level
from llmopt.runtime import executable

# Writes how many workers there are.
SOURCE = """#include "abi.h"
LLMOPT_KERNEL(count) {
  if (worker.index == 0) *args.tensor<std::int64_t>(0) = worker.count;
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and what this process remembers of caches forgotten."""
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    object_cache._usable.cache_clear()
    object_cache._private.clear()
    yield tmp_path / "cache"
    object_cache._usable.cache_clear()
    object_cache._private.clear()


def workers(library: Path, threads: int | None = 1) -> int:
    """Runs the kernel of SOURCE."""
    out = np.zeros(1, np.int64)
    NativePlan(library, [NativeCall("count", (TensorOperand(0),), (), ())]).run([out.ctypes.data], [], threads)
    return int(out[0])


def entries(folder: Path) -> dict[str, Path]:
    """The library and the two objects of SOURCE, by kind."""
    library = build_library([SOURCE])
    assert library.parent == folder
    kernel = compile_object(SOURCE, host_level())
    return {"library": library, "object": kernel}


def test_the_folder_is_the_users_own(folder: Path) -> None:
    assert workers(build_library([SOURCE])) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.suffix for path in folder.iterdir()) == [".o", ".o", ".so"]  # and no temporary file


def test_the_mode_of_a_folder_that_was_there_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    assert build_library([SOURCE]).parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    object_cache._usable.cache_clear()
    folder.chmod(0o1777)
    with caplog.at_level(logging.WARNING):
        assert build_library([SOURCE]).parent == object_cache.private_folder()
    assert "others may write" in caplog.text
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


@pytest.mark.parametrize("words", ["env {}", "{} -pipe"])
def test_a_compiler_with_arguments(folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", words.format(toolchain.find_compiler().path))
    compiler = toolchain.find_compiler.__wrapped__()
    assert " ".join(compiler.command).endswith(words.format(toolchain.find_compiler().path).split("/")[-1])
    monkeypatch.setattr(toolchain, "find_compiler", lambda: compiler)
    assert workers(build_library([SOURCE])) == 1


@pytest.mark.parametrize("words", ["no-such-compiler -O1", "'", "false"])
def test_a_compiler_that_is_none_is_reported(
    words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", words)
    with caplog.at_level(logging.WARNING):
        toolchain.find_compiler.__wrapped__()
    assert "CXX" in caplog.text


def test_a_second_build_compiles_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_library([SOURCE])
    monkeypatch.setattr(toolchain, "_run", lambda *_: pytest.fail("compiled again"))
    assert build_library([SOURCE]) == first


def test_whatever_shapes_an_object_is_in_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        compile_object(SOURCE, host_level()).name,
        compile_object(SOURCE + "\n", host_level()).name,
        compile_object(SOURCE, LEVELS[-1]).name,
        compile_object(SOURCE, host_level(), {"LLMOPT_BF16_DOT": 0}).name,
    }
    compiler = toolchain.find_compiler()
    other = toolchain.Compiler(compiler.path, compiler.version + " patched")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: other)
    names.add(compile_object(SOURCE, host_level()).name)
    monkeypatch.undo()
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(folder))
    monkeypatch.setattr(toolchain, "_headers_digest", lambda _: "another header")
    names.add(compile_object(SOURCE, host_level()).name)
    assert len(names) == 6


@pytest.mark.parametrize("kind", ["library", "object"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "foreign"])
def test_damage_is_noticed_and_repaired(folder: Path, kind: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    found = entries(folder)
    path = found[kind]
    content = path.read_bytes()
    if kind == "object":
        found["library"].unlink()  # so that the object is needed
    middle = len(content) // 2
    broken = {
        "truncated": content[:middle],
        "empty": b"",
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": b"#!/bin/sh\nexit 1\n" * 40,
    }[damage]
    # As another process would: a new file, for this one has the old one mapped.
    path.unlink()
    path.write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        assert workers(build_library([SOURCE])) == 1
    assert f"{path} is damaged" in caplog.text
    assert object_cache.find(path.name) == path  # whole again
    caplog.clear()
    assert workers(build_library([SOURCE])) == 1
    assert not caplog.records


def test_a_library_that_does_not_load_sends_the_model_to_eager(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A whole file that the loader refuses: another machine's, in a folder that both use."""

    def foreign(*_: object) -> Path:
        made = folder.parent / "foreign.so"
        made.write_bytes(b"\x7fELF of another machine")
        return made

    x = torch.randn(3)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(executable, "build_library", foreign)
        result = torch.compile(torch.sin, backend="llmopt")(x)
    assert torch.equal(result, x.sin())
    assert "runs this graph in eager mode: the compiled kernels cannot be loaded" in caplog.text


def test_a_folder_that_vanished_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_library([SOURCE])
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        library = build_library([SOURCE])
    assert workers(library) == 1
    assert library.parent == folder
    assert not caplog.records


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = object_cache._publish

    def publish(target: Path, content: bytes) -> Path:
        if target.parent == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, content)

    monkeypatch.setattr(object_cache, "_publish", publish)
    with caplog.at_level(logging.WARNING):
        library = build_library([SOURCE])
    assert workers(library) == 1
    assert library.parent == object_cache.private_folder()
    assert "cannot be written" in caplog.text
    assert build_library([SOURCE]) == library  # found where it is


@pytest.mark.parametrize("reason", ["file", "owner", "noexec", "read-only"])
def test_an_unusable_folder(
    folder: Path, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "file":
        folder.write_text("not a folder")
    elif reason == "owner":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    elif reason == "noexec":
        real = os.statvfs
        flags = os.ST_NOEXEC
        monkeypatch.setattr(os, "statvfs", lambda p: os.statvfs_result((*tuple(real(p))[:8], flags, 255)))
    else:

        def read_only(dir: Path) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

        monkeypatch.setattr(tempfile, "TemporaryFile", read_only)  # whose mode bits would stop some users only
    with caplog.at_level(logging.WARNING):
        library = build_library([SOURCE])
    assert workers(library) == 1
    assert library.parent == object_cache.private_folder()
    assert [record for record in caplog.records if "unusable" in record.message] == caplog.records
    assert len(caplog.records) == 1  # once, not for every object


def test_threads_that_find_an_unusable_folder_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(2)

    def getuid() -> int:
        with contextlib.suppress(threading.BrokenBarrierError):  # broken: nobody else looks meanwhile
            together.wait(0.5)
        return 12345

    monkeypatch.setattr(os, "getuid", getuid)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: object_cache.cache_folder(), range(2)))
    assert folders == {object_cache.private_folder()}
    assert len(caplog.records) == 1


# A process without PyTorch, which begins when it is told to and prints where the library is.
_WRITER = """
import sys
from llmopt.codegen.cpu.toolchain import build_library
print("ready", flush=True)
source = sys.stdin.read()
print(build_library([source]))
"""


@pytest.mark.parametrize("count", [6, pytest.param(32, marks=pytest.mark.slow)])
def test_processes_write_at_once(count: int, folder: Path) -> None:
    command = [sys.executable, "-c", _WRITER]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for writer in writers:
            stack.callback(writer.kill)  # before it is waited for, where another one has failed
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(SOURCE)
            writer.stdin.close()
        paths = set()
        for writer in writers:
            assert writer.stdout is not None
            paths.add(writer.stdout.read().strip())
            assert writer.wait(60) == 0
    (path,) = map(Path, paths)
    assert path.parent == folder
    assert workers(path) == 1
    names = [entry.name for entry in folder.iterdir()]
    assert len(names) == 3  # one library, two objects, nothing left behind
    assert all(object_cache.find(name) for name in names)


def test_a_forked_child_runs_kernels(folder: Path) -> None:
    library = build_library([SOURCE])
    torch.ones(1 << 20).sum()  # the parent's pool of threads exists
    workers(library, 2)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(workers(build_library([SOURCE]), 2)))
    child.start()
    child.join(60)
    assert child.exitcode == 0, "the child hangs"
    assert answers.get() == 1


def test_the_private_folder_outlives_a_fork(folder: Path) -> None:
    private = object_cache.private_folder()
    child = multiprocessing.get_context("fork").Process(target=object_cache.private_folder)
    child.start()
    child.join(60)
    assert private.is_dir()


def test_threads_are_those_of_pytorch_within_the_grant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build_library([SOURCE])
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert default_threads() == min(number, available_cpus())
            assert workers(library, None) == default_threads()
        torch.set_num_threads(2)
        monkeypatch.setattr("llmopt.codegen.cpu.native.available_cpus", lambda: 1)
        assert workers(library, None) == 1
    finally:
        torch.set_num_threads(before)
    assert workers(library, 2) == 2  # what was asked for


def _group(root: Path, path: str, **files: str) -> None:
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / path / name.replace("__", ".")).write_text(text + "\n")


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    assert cgroup_cpus("0::/a/b\n", tmp_path) is None
    _group(tmp_path, "a", cpu__max="150000 100000")
    _group(tmp_path, "a/b", cpu__max="max 100000")
    assert cgroup_cpus("0::/a/b\n", tmp_path) == 1.5
    _group(tmp_path, "a/b", cpu__max="50000 100000")
    assert cgroup_cpus("0::/a/b\n", tmp_path) == 0.5
    assert cgroup_cpus("0::/not/mounted\n", tmp_path) is None
    _group(tmp_path, "", cpu__max="400000 100000")
    assert cgroup_cpus("0::/not/mounted\n", tmp_path) == 4.0


def test_quotas_of_the_first_version(tmp_path: Path) -> None:
    _group(tmp_path, "cpu,cpuacct/x", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    membership = "3:memory:/x\n2:cpu,cpuacct:/x\n"
    assert cgroup_cpus(membership, tmp_path) == 2.0
    _group(tmp_path, "cpu,cpuacct/x", cpu__cfs_quota_us="-1")
    assert cgroup_cpus(membership, tmp_path) is None
