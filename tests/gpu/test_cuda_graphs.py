"""What of captured decode steps needs no GPU: which steps are captured, and how they are filled up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmopt.runtime.cuda_graphs import PADDED_SIZES, is_decode, pad_decode, padded_size
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
