"""The step executor's threads and locks: whose OpenMP runtime it runs on, on how many CPUs, and what a fork leaves."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmopt.codegen.cpu.largest import LargestKernel
from llmopt.codegen.cpu.native import NativeCall, NativePlan, Scratch
from llmopt.codegen.cpu.toolchain import build_library

SOURCE = """#include "abi.h"
LLMOPT_KERNEL(nothing) {}
"""


def run_python(program: str, **environment: str) -> list[str]:
    """The words that a fresh process prints."""
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
@pytest.mark.parametrize("places", ["threads", "{0}"])
def test_bound_threads_count_all_their_places(places: str) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    own, available, threads = run_python(
        "import os, torch; (torch.randn(300, 300) @ torch.randn(300, 300)).sin().sum();"
        "from llmopt.codegen.cpu.native import default_threads;"
        "from llmopt.codegen.cpu.available import available_cpus;"
        "print(len(os.sched_getaffinity(0)), available_cpus(), default_threads())",
        OMP_NUM_THREADS="2",
        OMP_PROC_BIND="close",
        OMP_PLACES=places.replace("0", str(cpus[0])),
    )
    assert own == "1", "the first thread is not bound"
    expected = "2" if places == "threads" else "1"
    assert threads == expected
    assert min(2, int(available)) == int(expected)


@pytest.mark.parametrize("name", ["libgomp-0123.so.1.0.0", "libompitrace.so.40"])
def test_other_openmp_libraries_are_left_alone(name: str, tmp_path: Path) -> None:
    """Wheels bring their own copy of the runtime; another pool of threads would compete with PyTorch's."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    own = next((Path(line.split()[-1]) for line in lines if "libgomp" in line), None)
    if own is None:
        pytest.skip("PyTorch runs on another OpenMP runtime")
    shutil.copy(
        own if "gomp" in name else Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so", tmp_path / name
    )
    before, after = run_python(
        "import ctypes, os, time, torch; torch.ones(1 << 20).sin(); torch.randn(300, 300) @ torch.randn(300, 300);"
        # The least of several: a thread that Python has joined may be listed for a moment yet.
        "count = lambda: min(len(os.listdir('/proc/self/task')) for _ in range(50) if time.sleep(0.01) is None);"
        f"ctypes.CDLL({str(tmp_path / name)!r}); before = count();"
        "from llmopt.codegen.cpu.native import NativeCall, NativePlan;"
        "from llmopt.codegen.cpu.toolchain import build_library;"
        f"NativePlan(build_library([{SOURCE!r}]), [NativeCall('nothing', (), (), ())]).run([], [], 2);"
        "print(before, count())",
        OMP_NUM_THREADS="2",
        PYTHONPATH="",
    )
    assert before == after, "the kernel runs on threads of its own"


def test_a_fork_while_kernels_run() -> None:
    """The child has a copy of the lock that nobody would open."""
    plan = NativePlan(build_library([SOURCE]), [NativeCall("nothing", (), (), ())])
    largest, x = LargestKernel(torch.float32), torch.tensor([[1.0, 3.0, 2.0]])

    def use() -> None:
        plan.run([], [], 1)
        assert largest(x.data_ptr(), 1, 3, 3) == ([3.0], [1])

    child = multiprocessing.get_context("fork").Process(target=use)
    with plan._lock, largest._lock:
        child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0, "the child waits for ever"
    use()


def test_plans_share_their_scratch() -> None:
    scratch = Scratch()
    one = scratch.address(1)
    many = scratch.address(3)
    assert one % 64 == many % 64 == 0
    assert scratch.address(1) == scratch.address(2) == many
    function = lambda x, ws: [x := torch.special.bessel_j0(torch.nn.functional.linear(x, w)) for w in ws][-1]  # noqa: E731
    x, weights = torch.randn(3, 8), [torch.randn(8, 8) for _ in range(4)]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, backend="llmopt")(x, weights), function(x, weights))
