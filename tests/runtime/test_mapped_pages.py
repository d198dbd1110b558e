"""Pages of mapped weights go once they were copied, and only then; what is read again is what was there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmopt.runtime.mapped_pages import MappedPages, released_once_copied

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped and resident")

SIZE = 1 << 20  # bytes of a tensor


@pytest.fixture
def file(tmp_path: Path) -> Path:
    numbers = torch.arange(SIZE // 4, dtype=torch.float32)
    save_file({"a": numbers, "b": -numbers, "c": numbers + 0.5}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def mapped(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in ("a", "b", "c")}


def resident(file: Path) -> int:
    """Bytes of a file's mappings that are in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_released_pages_are_read_again(file: Path) -> None:
    tensors, pages = mapped(file), MappedPages()
    total = sum(float(tensor.sum()) for tensor in tensors.values())
    assert resident(file) >= 3 * SIZE
    assert all(map(pages.holds, tensors.values()))
    pages.release(tensors["b"])
    assert 2 * SIZE <= resident(file) <= 2 * SIZE + 4 * 65536
    assert sum(float(tensor.sum()) for tensor in tensors.values()) == total


def test_what_is_not_mapped_is_left_alone(file: Path) -> None:
    pages = MappedPages()
    numbers = torch.arange(SIZE, dtype=torch.float32)
    copy = mapped(file)["a"].clone()
    turned = mapped(file)["a"].view(512, -1).t()
    expected = [tensor.clone() for tensor in (numbers, copy, turned)]
    assert not pages.holds(numbers) and not pages.holds(copy) and not pages.holds(numbers.to("meta"))
    for tensor, before in zip((numbers, copy, turned), expected, strict=True):
        pages.release(tensor)
        assert torch.equal(tensor, before)
    assert not pages.holds(mapped(file)["a"][:8]), "not worth a look"


@pytest.mark.parametrize("how", ["cast", "stack", "cat", "copy_", "clone"])
def test_copies_release(file: Path, how: str) -> None:
    """`c` stays a view, so its pages stay."""
    tensors = mapped(file)
    assert float(sum(tensor.sum() for tensor in tensors.values())) != 0
    a, b = tensors["a"], tensors["b"]
    with released_once_copied():
        view = tensors["c"].view(2, -1)[1]
        made = {
            "cast": lambda: [a.to(torch.float16), b.to(torch.float64)],
            "stack": lambda: [torch.stack([a, b])],
            "cat": lambda: [torch.cat([a, b])],
            "copy_": lambda: [torch.empty_like(a).copy_(a), torch.empty_like(b).copy_(b)],
            "clone": lambda: [a.clone(), b.clone()],
        }[how]()
    assert SIZE <= resident(file) <= SIZE + 6 * 65536
    numbers = torch.arange(SIZE // 4, dtype=torch.float32)
    assert torch.equal(a, numbers) and torch.equal(view, numbers[SIZE // 8 :] + 0.5)
    assert all(float(each.double().abs().nan_to_num(posinf=0).sum()) > 0 for each in made)


def test_what_was_written_is_kept(file: Path) -> None:
    tensors = mapped(file)
    with released_once_copied():
        tensors["a"].fill_(7.0)
        copy = tensors["a"].clone()
        other = tensors["b"].double()
    assert bool((tensors["a"] == 7).all()) and bool((copy == 7).all()) and float(other[1]) == -1.0
