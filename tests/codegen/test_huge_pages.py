"""Weights on huge pages: the same contents at the same addresses, and only where the system offers it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmopt.codegen.cpu import huge_pages
from llmopt.codegen.cpu.huge_pages import huge_page_bytes, move_to_huge_pages
from llmopt.runtime import executable

MEGABYTE = 1 << 20


def anonymous_huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes of huge pages in the mappings that a tensor lies in, as the kernel counts them."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            begin, _, end = head.partition("-")
            inside = int(begin, 16) < last and first < int(end, 16)
        elif inside and head == "AnonHugePages:":
            found += int(line.split()[1]) * 1024
    return found


def linux_moves_memory() -> bool:
    """Whether this kernel has MADV_COLLAPSE, asked for a page of its own."""
    if not huge_page_bytes():
        return False
    memory = torch.ones(2 * huge_page_bytes(), dtype=torch.uint8)
    pages = huge_pages._whole_pages(memory)
    return huge_pages._madvise()(pages.start, pages.step, huge_pages._COLLAPSE) == 0


needs_linux = pytest.mark.skipif(not linux_moves_memory(), reason="this system moves no memory to huge pages")


@pytest.fixture
def little_is_enough(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(huge_pages, "_LEAST_BYTES", MEGABYTE)
    monkeypatch.setattr(huge_pages, "_PIECE_BYTES", 4 * MEGABYTE)
    yield


def moved(*tensors: torch.Tensor) -> bool:
    thread = move_to_huge_pages(tensors)
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()
    return thread is not None


class Moves:
    """Stands before madvise(2), and remembers which bytes the system moved and which it refused to.

    It may refuse any, where memory is in small pieces or at a limit.
    """

    def __init__(self) -> None:
        self.done: list[range] = []
        self.refused: list[range] = []
        self._madvise = huge_pages._madvise()

    def __call__(self, begin: int, count: int, advice: int) -> int:
        result: int = self._madvise(begin, count, advice)
        (self.refused if result else self.done).append(range(begin, begin + count))
        return result

    def bytes_of(self, tensor: torch.Tensor) -> int:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return sum(len(piece) for piece in self.done if first <= piece.start and piece.stop <= last)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Moves:
    found = Moves()
    monkeypatch.setattr(huge_pages, "_madvise", lambda: found)
    return found


@needs_linux
def test_contents_and_addresses_stay(little_is_enough: None, moves: Moves) -> None:
    # Larger than what the allocator may have kept from others, which may stand on huge pages.
    tensors = [torch.randn(17_000_001), torch.randn(1001, 2003).bfloat16().t()]
    copies, addresses = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    assert moved(*tensors, tensors[0][5:], torch.ones(3))
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all(map(torch.equal, tensors, copies))
    assert anonymous_huge_bytes(tensors[0]) >= moves.bytes_of(tensors[0])
    whole = huge_pages._whole_pages(tensors[0])
    assert moves.refused or moves.bytes_of(tensors[0]) == len(whole) * whole.step >= 60 * MEGABYTE
    tensors[0].zero_()
    assert not tensors[0].any()


@needs_linux
def test_memory_that_is_written_to_meanwhile_keeps_what_is_written(little_is_enough: None) -> None:
    tensor = torch.zeros(16 * MEGABYTE, dtype=torch.int32)
    thread = move_to_huge_pages([tensor])
    rounds = 0
    while thread is not None and thread.is_alive():
        tensor += 1
        rounds += 1
    assert bool((tensor == rounds).all())


@needs_linux
def test_a_tensor_may_be_freed_meanwhile(little_is_enough: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, freed = threading.Event(), threading.Event()
    madvise = huge_pages._madvise()
    calls = []

    def slow(begin: int, count: int, advice: int) -> int:
        calls.append(begin)
        result: int = madvise(begin, count, advice)
        first.set()
        freed.wait(60)
        return result

    monkeypatch.setattr(huge_pages, "_madvise", lambda: slow)
    tensor = torch.zeros(32 * MEGABYTE, dtype=torch.uint8)
    reference = weakref.ref(tensor)
    thread = move_to_huge_pages([tensor])
    assert thread is not None and first.wait(60)
    del tensor
    freed.set()
    thread.join(60)
    gc.collect()
    assert reference() is None and len(calls) == 1


@needs_linux
def test_what_is_mapped_from_a_file_stays_there(little_is_enough: None, moves: Moves, tmp_path: Path) -> None:
    save_file({"a": torch.ones(8 * MEGABYTE)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        mapped, own = file.get_tensor("a"), torch.ones(8 * MEGABYTE)
        assert moved(mapped, own)
        assert moves.bytes_of(mapped) == 0 == anonymous_huge_bytes(mapped)
        assert anonymous_huge_bytes(own) >= moves.bytes_of(own) and (moves.refused or moves.bytes_of(own))
        assert bool((mapped == 1).all())


@pytest.mark.parametrize("options", [{"huge_pages": True}, {}])
def test_weights_move_at_the_second_call(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[list[torch.Tensor]] = []
    monkeypatch.setattr(executable, "move_to_huge_pages", moves.append)
    layer = torch.nn.Linear(64, 32, bias=False).eval()
    compiled = torch.compile(layer, backend="llmopt", options=options)
    with torch.no_grad():
        for calls in range(1, 5):
            x = torch.randn(3, 64)
            torch.testing.assert_close(compiled(x), layer(x))
            assert len(moves) == (calls > 1 and bool(options))
        # Other weights move as well.
        layer.weight = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x))
    assert [[tensor.shape for tensor in each] for each in moves] == ([[(32, 64)]] * 2 if options else [])


def test_little_is_left_alone() -> None:
    assert move_to_huge_pages([torch.ones(MEGABYTE)]) is None
    assert move_to_huge_pages([]) is None


def test_systems_without_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, little_is_enough: None) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    for allowed in (None, "always madvise [never]"):
        if allowed is not None:
            (tmp_path / "enabled").write_text(allowed)
            (tmp_path / "hpage_pmd_size").write_text("2097152")
        huge_page_bytes.cache_clear()
        try:
            assert huge_page_bytes() == 0
            assert move_to_huge_pages([torch.ones(8 * MEGABYTE)]) is None
        finally:
            huge_page_bytes.cache_clear()
