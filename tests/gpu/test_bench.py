"""The GPU benchmark's book-keeping, which needs no GPU: resuming, failures, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_bench
import pytest
import torch


def part(name: str) -> dict[str, Any]:
    row = gpu_bench.row(name, 2e-6, 3e-6, "cuBLAS", 4e6, 1e6)
    return {"gpu": "a GPU", "limits": {"copy_gb_s": 4000.0, "gemm_tflop_s": 800.0}, "rows": [row], "conditions": {}}


def test_a_row_counts_bytes_and_operations() -> None:
    (row,) = part("x")["rows"]
    assert row["us"] == pytest.approx(2.0) and row["peer_us"] == pytest.approx(3.0)
    assert row["gb_s"] == pytest.approx(2000.0) and row["tflop_s"] == pytest.approx(0.5)


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    ran: list[str] = []

    def run_part(name: str, budget: int, path: Path) -> dict[str, Any]:
        ran.append(name)
        return {"failed": "no such kernel"} if name == "gemm" and len(ran) < 3 else part(name)

    monkeypatch.setattr(gpu_bench, "run_part", run_part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = ["gpu_bench.py", "--parts", "gemv", "gemm", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    assert gpu_bench.main() == 1
    assert "no such kernel" in capsys.readouterr().out
    assert gpu_bench.main() == 0
    assert ran == ["gemv", "gemm", "gemm"], "a failed part is tried again, another is not"
    printed = capsys.readouterr().out
    assert "1.50" in printed and "50%" in printed
    monkeypatch.setattr("sys.argv", [*command, "--again"])
    assert gpu_bench.main() == 0
    assert ran[3:] == ["gemv", "gemm"]


def test_a_part_that_breaks_is_reported(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the part runs")
    found = gpu_bench.run_part("gemv", 600, tmp_path / "gpu.json")
    assert "needs an NVIDIA GPU" in found["failed"]
