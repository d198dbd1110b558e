"""Who holds which page of the KV cache: reference counts, and the pages that are kept for prompts that begin alike.

Pure bookkeeping over block numbers; the memory itself is in `kv_cache.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llmopt.compiler.errors import InputError


def root_key(*parts: str | None) -> bytes:
    """The first link of a chain of block keys: everything besides tokens that keys and values depend on.

    Parts are length-prefixed, so that no two lists of parts give the same key; None differs from "".
    """
    digest = hashlib.sha256()
    for part in parts:
        # A lone surrogate is legal in a Python string, and a caller's salt may hold one.
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(f"{-1 if part is None else len(data)}:".encode())
        digest.update(data)
    return digest.digest()


def block_key(parent: bytes, tokens: Sequence[int], embeds: bytes | None = None) -> bytes:
    """The key of a full block: SHA-256 over the key before it and its tokens, so that it stands for the whole prefix.

    `embeds` is the content of the tokens before these that were given as embeddings; b"" where there are none in this
    block of a chain that has some.

    A key decides whose keys and values a request reads, hence a hash that nobody can find collisions of.
    """
    digest = hashlib.sha256(parent)
    if embeds is not None:
        digest.update(array("q", [len(embeds)]))
        digest.update(embeds)
    digest.update(array("q", tokens))
    return digest.digest()


class BlockPool:
    """Blocks `0 .. num_blocks - 1`, each in one of three states: held (its count is above zero), cached (nobody holds
    it, its content is kept under a key), or free.

    Cached blocks count as available: the least recently used is given away when no free one is left.

    Args:
        num_blocks: size of the pool.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._counts = [0] * num_blocks
        # Low numbers first: memory that was never needed is then never touched.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        # Blocks with a key that nobody holds, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their content."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def count(self, block: int) -> int:
        """How many hold the block."""
        return self._counts[block]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; raises InputError when fewer are available."""
        if count > self.num_available:
            raise InputError(
                f"{count} KV cache blocks of {self.block_size} tokens are needed, {self.num_available} of "
                f"{self.num_blocks} are free; raise kv_cache_memory_bytes or lower max_tokens"
            )
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._drop_key(block)
            self._counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of the blocks, which are held or cached."""
        for block in blocks:
            if self._counts[block] == 0:
                del self._idle[block]
            self._counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each. Blocks nobody holds any more stay cached if they have a key, else become free.

        The last of `blocks` is the first to be given away again: a prefix is of use without what follows it, not the
        other way round.
        """
        for block in reversed(blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def cache(self, block: int, key: bytes) -> None:
        """Files the content of a held, full block under a key. What is filed under the key already stays."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """The content of these blocks must not be found any more; their holders keep them."""
        for block in blocks:
            if self._keys[block] is not None:
                self._drop_key(block)
                if self._counts[block] == 0:
                    del self._idle[block]
                    self._free.append(block)

    def forget_all(self) -> None:
        """As `forget` for every block: what is computed from now on differs from what is cached."""
        self.forget(list(self._by_key.values()))

    def is_private(self, block: int) -> bool:
        """Whether its one holder may write to it: nobody else holds it, and it is not filed under a key."""
        return self._counts[block] == 1 and self._keys[block] is None

    def is_filed(self, block: int) -> bool:
        """Whether its content is kept under a key."""
        return self._keys[block] is not None

    def find(self, key: bytes) -> int | None:
        """The block with the content of a key."""
        return self._by_key.get(key)

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless every block is free, cached or held exactly as often as `holders` list it.

        For tests and debugging: time grows with the pool.
        """
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        free, idle = set(self._free), set(self._idle)
        held = {block for block, count in enumerate(self._counts) if count > 0}
        problems = {
            "counts differ from what is held": counts != self._counts,
            "a block is in no state or in two": len(free) + len(idle) + len(held) != self.num_blocks
            or free | idle | held != set(range(self.num_blocks)),
            "a block is free twice": len(free) != len(self._free),
            "a free block has a key": any(self._keys[block] is not None for block in free),
            "a cached block has no key": any(self._keys[block] is None for block in idle),
            "keys and blocks disagree": self._by_key
            != {key: block for block, key in enumerate(self._keys) if key is not None},
        }
        found = [text for text, wrong in problems.items() if wrong]
        if found:
            raise RuntimeError("the block pool is inconsistent: " + "; ".join(found))
