"""The kernels' own tests, with the kernels compiled under AddressSanitizer and UndefinedBehaviorSanitizer.

Each part runs in a process that has loaded the sanitizers first, because Python itself is not built with them. Every
finding ends that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.codegen.cpu.toolchain import find_compiler

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
PARTS = {
    "linear": "tests/kernels/test_linear.py tests/kernels/test_batched_linear.py tests/kernels/test_moe.py "
    "tests/kernels/test_grouped_linear.py",
    "epilogues": "tests/codegen/test_epilogues.py",
    "adapters": "tests/kernels/test_lora.py",
    "attention": "tests/kernels/test_attention.py tests/kernels/test_kv_write.py "
    "tests/kernels/test_attention_quantized.py",
    "rows": "tests/kernels/test_norm.py tests/kernels/test_rope.py tests/kernels/test_gated_act.py "
    "tests/kernels/test_embedding.py tests/kernels/test_topk.py tests/kernels/test_scan.py "
    "tests/kernels/test_index_copy.py tests/kernels/test_largest.py",
    "loops": "tests/codegen/test_loops_ops.py tests/codegen/test_loops_reductions.py tests/codegen/test_loops_views.py "
    "tests/codegen/test_loops_gathers.py",
    "random loops": "tests/codegen/test_loops_random.py",
}
BROKEN = {
    "AddressSanitizer": "args.tensor<float>(0)[args.ints[0]] = 1.0f;",
    "runtime error": "args.tensor<std::int32_t>(0)[0] = 1 << args.ints[0];",
}


def _run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Python with `arguments`, the sanitizers loaded and asked of every kernel that is compiled."""
    compiler = find_compiler().path
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler} comes without {name}")
        runtimes.append(str(path.resolve()))
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LLMOPT_TEST_COMPILER_FLAGS": FLAGS,
        "LLMOPT_CACHE_DIR": str(cache),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_kernels_are_clean(part: str, cache: Path) -> None:
    # The emulated variants are the same code on other vectors, and take longest to compile.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not emulated and not portable"]
    answer = _run(["-m", "pytest", *options, *PARTS[part].split()], cache)
    report = answer.stdout[-3000:] + answer.stderr[-6000:]
    assert answer.returncode == 0, report
    assert "[100%]" in answer.stdout, report


@pytest.mark.slow
@pytest.mark.parametrize("finding", BROKEN)
def test_the_sanitizers_see_the_kernels(finding: str, cache: Path) -> None:
    source = f'#include "abi.h"\\nLLMOPT_KERNEL(broken) {{ {BROKEN[finding]} }}'
    program = (
        "import sys; sys.path.insert(0, 'tests'); import conftest, torch;"
        "from llmopt.codegen.cpu.native import PUSH, NativeCall, NativePlan, TensorOperand;"
        "from llmopt.codegen.cpu.toolchain import build_library;"
        f"library = build_library(['''{source}''']);"
        "data = torch.zeros(40);"
        "call = NativeCall('broken', (TensorOperand(0),), ((PUSH, 40),), ());"
        "NativePlan(library, [call]).run([data.data_ptr()], [], 1)"
    )
    answer = _run(["-c", program], cache)
    assert answer.returncode != 0
    assert finding in answer.stderr, answer.stderr[-3000:]
