"""The block pool: three states and counts that add up, and keys that tell contents apart."""

from __future__ import annotations

import itertools

import pytest

from llmopt.errors import InputError
from llmopt.runtime.block_pool import BlockPool, block_key, root_key


def test_blocks_are_free_held_or_cached() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(2)
    pool.cache(first, b"x")
    pool.check([[first, second]])
    assert (pool.num_free, pool.num_cached, pool.num_held, pool.num_available) == (2, 0, 2, 2)
    pool.release([first, second])
    pool.check([])
    assert (pool.num_free, pool.num_cached, pool.num_held, pool.num_available) == (3, 1, 0, 4)
    assert pool.find(b"x") == first
    pool.share([first])
    pool.share([first])
    pool.check([[first], [first]])
    assert not pool.is_private(first)
    pool.release([first])
    assert pool.num_held == 1
    pool.release([first])
    assert (pool.num_free, pool.num_cached) == (3, 1)


def test_the_least_recently_used_block_is_given_away_first_and_prefixes_last() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.cache(block, bytes([block]))
    pool.release(blocks[:2])
    pool.release(blocks[2:])
    # Of each list the tail goes first; the list that was released first goes before the other.
    assert pool.allocate(3) == [blocks[1], blocks[0], blocks[3]]
    assert [pool.find(bytes([block])) is not None for block in blocks] == [False, False, True, False]
    pool.check([[blocks[1], blocks[0], blocks[3]]])


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(3, 2)
    (block,) = pool.allocate(1)
    pool.cache(block, b"k")
    pool.release([block])
    assert block not in pool.allocate(2)
    assert pool.allocate(1) == [block]
    assert pool.find(b"k") is None


def test_too_few_blocks() -> None:
    pool = BlockPool(3, 2)
    pool.allocate(2)
    with pytest.raises(InputError, match=r"2 KV cache blocks of 2 tokens are needed, 1 of 3 are free"):
        pool.allocate(2)
    assert pool.num_held == 2


def test_one_content_is_filed_once() -> None:
    pool = BlockPool(3, 2)
    one, two = pool.allocate(2)
    pool.cache(one, b"k")
    pool.cache(two, b"k")
    assert pool.find(b"k") == one
    assert pool.is_private(two) and not pool.is_private(one)
    pool.release([one, two])
    assert (pool.num_free, pool.num_cached) == (2, 1)


def test_forgetting() -> None:
    pool = BlockPool(3, 2)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.cache(block, bytes([block]))
    pool.release(blocks[:2])
    pool.forget([blocks[0], blocks[2]])
    pool.check([[blocks[2]]])
    assert [pool.find(bytes([block])) for block in blocks] == [None, blocks[1], None]
    pool.forget_all()
    pool.check([[blocks[2]]])
    assert (pool.num_free, pool.num_cached, pool.num_held) == (2, 0, 1)


def test_check_sees_a_leak_and_a_double_release() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    with pytest.raises(RuntimeError, match="counts differ"):
        pool.check([])
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="inconsistent"):
        pool.check([])


def test_everything_that_changes_content_changes_the_key() -> None:
    """Lists of parts that would be one text when joined, None against empty, and a lone surrogate."""
    roots = [
        *itertools.product(["m", "m1", ""], ["a", "1a", "", None], ["s", "", None, "\ud800"]),
        ("m", "as"),
        ("ma", "s", ""),
    ]
    keys = {root_key(*parts) for parts in roots}
    assert len(keys) == len(roots)
    root = root_key("m")
    blocks = [(1, 23), (12, 3), (1, 2, 3), (123,), (), (1, 2), (2, 1), (1 << 40, 0), (0, 1 << 40)]
    assert len({block_key(root, block) for block in blocks}) == len(blocks)
    # A key stands for the whole prefix.
    assert block_key(block_key(root, (1,)), (2,)) != block_key(block_key(root, (3,)), (2,))
    assert block_key(root, (1,)) != block_key(root_key("n"), (1,))
