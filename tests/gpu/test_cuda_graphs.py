"""What of captured decode steps needs no GPU: which are captured, how they are filled up, and which graph serves."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmopt.runtime.cuda_graphs import PADDED_SIZES, DecodeGraphs, _Captured, is_decode, pad_decode, padded_size
from llmopt.runtime.step_batch import StepBatch


def batch(tokens: list[list[int]], starts: list[int]) -> StepBatch:
    blocks = [[3 * row + i for i in range(3)] for row in range(len(tokens))]
    return StepBatch.build(tokens, starts, blocks, 4)


def test_only_steps_of_one_token_a_request_are_decode_steps() -> None:
    assert is_decode(batch([[1], [2], [3]], [4, 0, 9]))
    assert not is_decode(batch([[1], [2, 3]], [4, 0]))
    assert not is_decode(StepBatch.build([[1, 2], [3, 4]], [0, 0], [[0], [1]], 4, all_logits=True))


@pytest.mark.parametrize(("requests", "size"), [(1, 1), (2, 2), (3, 4), (17, 24), (128, 128), (129, None)])
def test_the_smallest_captured_size_that_is_large_enough(requests: int, size: int | None) -> None:
    assert padded_size(requests) == size


def test_sizes_grow() -> None:
    assert list(PADDED_SIZES) == sorted(set(PADDED_SIZES))


def test_fillers_store_nothing_and_see_one_token() -> None:
    own = batch([[7], [8], [9]], [4, 0, 9])
    padded = pad_decode(own, 8, 4)
    for name in ("input_ids", "positions", "slot_mapping", "seq_lens"):
        tensor, before = getattr(padded, name), getattr(own, name)
        assert tensor.dtype == before.dtype and tensor.shape == (8,)
        assert torch.equal(tensor[:3], before)
    assert padded.slot_mapping[3:].tolist() == [-1] * 5
    assert padded.seq_lens[3:].tolist() == [1] * 5
    assert padded.cu_seqlens_q.tolist() == list(range(9))
    assert padded.logits_indices.tolist() == list(range(8))
    assert padded.block_tables.shape == (8, 4)
    assert torch.equal(padded.block_tables[:3, :3], own.block_tables)
    assert not padded.block_tables[3:].any() and not padded.block_tables[:, 3:].any()
    assert {getattr(padded, n).dtype for n in ("cu_seqlens_q", "seq_lens", "block_tables")} == {torch.int32}


def test_pages_of_layers_with_a_window_are_filled_up_as_the_others() -> None:
    own = batch([[7], [8], [9]], [4, 0, 9])
    apart = dataclasses.replace(
        own, window_slot_mapping=own.slot_mapping + 4, window_block_tables=own.block_tables.flip(0)
    )
    padded = pad_decode(apart, 8, 4)
    assert padded.window_slot_mapping is not None and padded.window_block_tables is not None
    assert padded.window_slot_mapping.tolist() == [*(own.slot_mapping + 4).tolist(), *[-1] * 5]
    assert torch.equal(padded.window_block_tables[:3, :3], own.block_tables.flip(0))
    assert not padded.window_block_tables[3:].any() and not padded.window_block_tables[:, 3:].any()
    assert pad_decode(own, 8, 4).window_block_tables is None
    # A batch without uses the other layers' pages for all.
    assert own.inputs(["window_slot_mapping"]) == [own.slot_mapping]


class Graph:
    def replay(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return (0, 7)


@dataclasses.dataclass(eq=False)
class Cache:
    tensors: list[torch.Tensor]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepBatch, Any]]:
    """What is captured, on a machine without a GPU."""
    made: list[tuple[StepBatch, Any]] = []

    def capture(self: DecodeGraphs, padded: StepBatch, cache: Any, executable: Any) -> _Captured:
        made.append((padded, cache))
        return _Captured(Graph(), dataclasses.replace(padded), torch.zeros(len(padded.input_ids), 5))

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    return made


def executable() -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), weights_version=0, check=lambda: None)


def test_a_graph_serves_the_cache_and_the_fields_that_it_was_captured_with(captures: list[Any]) -> None:
    graphs, gpu, step = DecodeGraphs(lambda *_: torch.zeros(1, 5)), executable(), batch([[7]], [4])
    first = torch.zeros(4)
    one, other = Cache([first, torch.zeros(4)]), Cache([first, torch.zeros(4)])  # alike in their first address
    for cache in (one, other, one, other):
        logits = graphs(step, cache, gpu)  # type: ignore[arg-type]
        assert logits is not None and logits.shape == (1, 5)
    assert [cache for _, cache in captures] == [one, other]
    adapted = dataclasses.replace(step, adapter_index=torch.tensor([0], dtype=torch.int32))
    for again in (adapted, step, adapted):
        assert graphs(again, one, gpu) is not None  # type: ignore[arg-type]
    assert len(captures) == 3 and captures[2][0].adapter_index is not None
    assert graphs.replays == 7


def test_graphs_end_with_their_cache_and_with_the_weights(captures: list[Any]) -> None:
    graphs, gpu, step = DecodeGraphs(lambda *_: torch.zeros(1, 5)), executable(), batch([[7]], [4])
    cache, other = Cache([torch.zeros(4)]), Cache([torch.zeros(4)])
    graphs(step, cache, gpu), graphs(step, other, gpu)  # type: ignore[arg-type]
    assert len(graphs._captured) == 2
    assert graphs._shared_pool() == (0, 7)
    captures.clear()
    del other
    assert len(graphs._captured) == 1
    gpu.weights_version += 1
    graphs(step, cache, gpu)  # type: ignore[arg-type]
    assert len(captures) == 1
    del cache
    captures.clear()  # which hold it
    assert graphs._shared_pool() is None
