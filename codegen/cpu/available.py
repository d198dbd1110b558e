"""How many CPUs this process may keep busy: those that its threads may run on, within its control groups' quotas."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

from llmopt.codegen.cpu.openmp import bound_cpus

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """CPUs of the affinity mask, or fewer where a control group (v1 or v2) grants less time; at least 1.

    Where the OpenMP runtime binds each thread to a place of its own, the CPUs of all places count.
    """
    allowed, granted = bound_cpus() or len(os.sched_getaffinity(0)), _granted_cpus()
    return allowed if granted is None else max(1, min(allowed, math.ceil(granted)))


@functools.cache
def _granted_cpus() -> float | None:
    try:
        return cgroup_cpus(Path("/proc/self/cgroup").read_text("utf-8"), _CGROUPS)
    except OSError:
        return None


def cgroup_cpus(membership: str, root: Path) -> float | None:
    """CPUs' worth of time that the groups in `membership` (/proc/self/cgroup) grant together; None without a limit.

    A group is limited by each of its ancestors, too. Inside a container the paths may name groups that are not mounted
    there; what is then at the mount's root is the container's own.
    """
    limits = []
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            limits += [_v2(folder) for folder in _ancestors(root, path)]
        elif "cpu" in controllers.split(","):
            limits += [_v1(folder) for folder in _ancestors(root / controllers, path)]
            limits += [_v1(folder) for folder in _ancestors(root / "cpu", path)]
    return min((limit for limit in limits if limit is not None), default=None)


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    folder = root / path.lstrip("/")
    yield folder
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder


def _numbers(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").split()
    except OSError:
        return []


def _v2(folder: Path) -> float | None:
    words = _numbers(folder / "cpu.max")
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _v1(folder: Path) -> float | None:
    quota, period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    """`max` or -1 stands for no limit."""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)
