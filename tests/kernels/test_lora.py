"""lora.h against float64: an adapter of its own, or none, for each row; parts of columns, ranks, batch invariance."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernels.harness import CPP_TYPE, VARIANTS, run_kernel

from llmopt.codegen.cpu.native import KernelError

Tensor = torch.Tensor
# Sums of order 1 in float, then one rounding to the storage type.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INVARIANT = {"LLMOPT_BATCH_INVARIANT": 1}


@dataclass
class Case:
    """Rows x `[M, K]` and y `[M, N]`, and adapters for parts (first column, columns) of y."""

    x: Tensor
    y: Tensor
    index: Tensor
    pool: Tensor
    ranks: Tensor
    scales: Tensor
    parts: list[tuple[int, int]]
    most: int

    @property
    def offsets(self) -> list[int]:
        ends = [3]  # something lies in front
        for _, size in self.parts:
            ends.append(ends[-1] + self.most * (self.x.shape[1] + size))
        return ends

    def reference(self) -> Tensor:
        """In float64."""
        k, out = self.x.shape[1], self.y.double()
        for row, slot in enumerate(self.index.tolist()):
            for number, (column, size) in enumerate(self.parts):
                if slot < 0:
                    continue
                rank, begin = int(self.ranks[number + 1, slot]), self.offsets[number]
                behind = begin + self.most * k
                a = self.pool[slot, begin:behind].view(self.most, k)[:rank].double()
                b = self.pool[slot, behind : self.offsets[number + 1]].view(self.most, size)[:rank].double()
                delta = (a @ self.x[row].double()) @ b * float(self.scales[number + 1, slot])
                out[row, column : column + size] += delta
        return out


def make(
    rows: int, k: int, n: int, parts: list[tuple[int, int]], most: int, slots: int, dtype: torch.dtype, seed: int = 0
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, most + 1, (len(parts) + 1, slots), generator=rng, dtype=torch.int32)
    ranks[-1, -1], ranks[1, 0] = 0, most  # a product that an adapter leaves alone, and one of the largest rank
    index = torch.randint(-1, slots, (rows,), generator=rng, dtype=torch.int32)
    case = Case(
        torch.randn(rows, k + 3, generator=rng).to(dtype)[:, :k],
        torch.randn(rows, n, generator=rng).to(dtype),
        index,
        torch.empty(0),
        ranks,
        torch.rand(ranks.shape, generator=rng) + 0.5,
        parts,
        most,
    )
    # What lies behind the rank of an adapter is another's, or nobody's.
    case.pool = torch.full((slots, case.offsets[-1] + 5), torch.nan, dtype=dtype)
    for slot in range(slots):
        for number, (_, size) in enumerate(parts):
            rank, begin = int(ranks[number + 1, slot]), case.offsets[number]
            behind = begin + most * k
            case.pool[slot, begin : begin + rank * k] = (torch.randn(rank * k, generator=rng) * k**-0.5).to(dtype)
            case.pool[slot, behind : behind + rank * size] = (
                torch.randn(rank * size, generator=rng) * max(rank, 1) ** -0.5
            ).to(dtype)
    return case


def run(
    case: Case, threads: int = 2, variant: str = "host", in_place: bool = False, defines: dict[str, int] | None = None
) -> Tensor:
    (rows, k), n = case.x.shape, case.y.shape[1]
    out = torch.full((rows, n + 2), torch.nan, dtype=case.y.dtype)
    if in_place:
        out[:, :n] = case.y
    slots, slot_size = case.pool.shape
    numbers = [
        number
        for i, ((column, size), offset) in enumerate(zip(case.parts, case.offsets, strict=False))
        for number in (i + 1, column, size, offset)
    ]
    space = torch.empty(128 + 4 * rows * (1 + len(case.parts) * case.most), dtype=torch.uint8)
    run_kernel(
        "lora.h", f"lora<{CPP_TYPE[case.y.dtype]}>",
        [case.x, None if in_place else case.y, out, case.index, case.pool, case.ranks, case.scales, space],
        [rows, k, case.x.stride(0), case.y.stride(0), out.stride(0), n, slots, slot_size, case.most, len(case.parts),
         *numbers],
        threads=threads, variant=variant, defines=defines,
    )  # fmt: skip
    assert bool(out[:, n:].isnan().all()), "nothing is written between the rows"
    return out[:, :n]


# rows, K, N, parts, largest rank, slots. 70 and 200 rows are enough for gemm, and for an order that workers share.
SHAPES = [
    (1, 33, 17, [(0, 17)], 4, 1),
    (8, 64, 80, [(0, 48), (48, 16), (64, 16)], 8, 3),
    (5, 130, 140, [(7, 129)], 17, 2),
    (70, 40, 90, [(5, 67)], 3, 2),
    (200, 257, 150, [(0, 70), (70, 80)], 16, 5),
    (3, 7, 1, [(0, 1)], 1, 4),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_lora(dtype: torch.dtype, variant: str) -> None:
    for seed, shape in enumerate(SHAPES):
        case = make(*shape, dtype, seed)
        expected, base = case.reference(), case.index < 0
        for threads in (1, 2, 3):
            for in_place in (False, True):
                out = run(case, threads, variant, in_place)
                error = (out.double() - expected).abs()
                assert bool((error <= TOLERANCE[dtype] * (2 + expected.abs())).all()), (shape, threads, in_place)
                assert torch.equal(out[base], case.y[base]), "a row without an adapter has other bits"


def test_adapters_matter() -> None:
    case = make(*SHAPES[1], torch.float32)
    case.index[:] = torch.tensor([0, 1, 2, -1] * 2)
    expected = case.reference()
    case.index = case.index.roll(1)
    assert float((run(case).double() - expected).abs().max()) > 0.1


def test_nothing_to_add() -> None:
    """No row has an adapter, or adapters that leave these products alone; or there are no rows."""
    for rows in (0, 5, 100):
        case = make(rows, 33, 20, [(0, 20)], 4, 2, torch.float32)
        case.index.fill_(-1)
        assert torch.equal(run(case), case.y)
        case.index.fill_(1)
        case.ranks.zero_()
        assert torch.equal(run(case), case.y)


@pytest.mark.parametrize("slot", [2, 1 << 30])
def test_slots_are_checked(slot: int) -> None:
    case = make(4, 33, 20, [(0, 20)], 4, 2, torch.float32)
    case.index[3] = slot
    with pytest.raises(KernelError):
        run(case)


def test_ranks_are_checked() -> None:
    case = make(4, 33, 20, [(0, 20)], 4, 2, torch.float32)
    case.index.fill_(0)
    case.ranks[1, 0] = 5
    with pytest.raises(KernelError):
        run(case)


@pytest.mark.parametrize("dtype", CPP_TYPE, ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    """A row alone, on any number of threads, has the bits that it has among many."""
    case = make(150, 257, 150, [(0, 70), (70, 80)], 16, 3, dtype)
    whole = run(case, 2, defines=INVARIANT)
    for first, last, threads in [(0, 1, 1), (3, 5, 2), (7, 90, 3), (149, 150, 2)]:
        part = Case(case.x[first:last], case.y[first:last], case.index[first:last], *list(vars(case).values())[3:])
        assert torch.equal(run(part, threads, defines=INVARIANT), whole[first:last])


def test_without_it_the_number_of_rows_shows() -> None:
    case = make(150, 257, 150, [(0, 70)], 16, 1, torch.float32)
    case.index.fill_(0)
    part = Case(case.x[:1], case.y[:1], case.index[:1], *list(vars(case).values())[3:])
    assert not torch.equal(run(part), run(case)[:1])
