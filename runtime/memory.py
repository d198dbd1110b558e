"""How much memory is left: to a GPU, or to the machine and the control groups that this process is in."""

from __future__ import annotations

from pathlib import Path

import torch

_FALLBACK = 4 << 30  # of a system that tells nothing


def device_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`: `available_memory` of a CPU.

    Of a GPU what its driver calls free, and what PyTorch's allocator holds without using it.
    """
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take without swapping or being killed.

    The least of what the kernel calls available (`MemAvailable` of /proc/meminfo) and what each control group above
    this process, version 1 or 2, has left of its limit; file pages that can be dropped count as left.

    Args:
        root: where /proc and /sys are, for tests.
    """
    left = [_meminfo(root / "proc/meminfo")]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and the group's own files lie at the base.
        folder = base / path.strip("/")
        chain = [folder, *folder.parents] if folder.is_dir() else [base]
        left += [_left(group, *names) for group in chain if group == base or base in group.parents]
    known = [number for number in left if number is not None]
    return min(known) if known else _FALLBACK


def _left(group: Path, limit: str, usage: str, droppable: str) -> int | None:
    most, used = _read(group / limit).strip(), _read(group / usage).strip()
    if not most.isdigit() or not used.isdigit():  # "max", or no such controller
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    return max(0, int(most) - int(used) + int(stat.get(droppable, "0")))


def _meminfo(path: Path) -> int | None:
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
