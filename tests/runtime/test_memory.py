"""What is left of the machine's memory and of every control group above the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.runtime.memory import available_memory

MB = 1 << 20


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", "utf-8")
    return root


MACHINE = {"proc/meminfo": "MemTotal: 65536 kB\nMemAvailable:    40960 kB"}


def test_this_machine_has_memory() -> None:
    assert 1 * MB < available_memory() < 1 << 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 40 * MB),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": 5}, 40 * MB),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": 20 * MB,
                "sys/fs/cgroup/a/memory.current": 12 * MB,
                "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {2 * MB}",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/memory.current": MB,
            },
            10 * MB,
        ),
        # In a container: the path is the host's, the limit lies at the mount point.
        (
            {
                "proc/self/cgroup": "0::/host/path",
                "sys/fs/cgroup/memory.max": 8 * MB,
                "sys/fs/cgroup/memory.current": 9 * MB,
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/x",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": 16 * MB,
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": 4 * MB,
            },
            12 * MB,
        ),
    ],
)
def test_the_smallest_remainder_counts(files: dict[str, str | int], expected: int, tmp_path: Path) -> None:
    assert available_memory(write(tmp_path, {**MACHINE, **files})) == expected


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 4 << 30
