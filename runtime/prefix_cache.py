"""Finds and files pages by what they hold, for requests whose tokens begin alike (vLLM's automatic prefix caching).

A page is filed once it is full, its tokens are really computed, and the step that computed them came out finite.
"""

from __future__ import annotations

from llmopt.runtime.block_pool import BlockPool, block_key, root_key
from llmopt.runtime.request import NO_BLOCK, Request


class PrefixCache:
    """The filed pages of one pool.

    Args:
        pool: where pages are held and filed.
        fingerprint: names everything about model and cache that keys and values depend on and that may differ between
            users of one pool.
        window: as in `SchedulerConfig`: with it, only the pages that are still looked at need to be found.
    """

    def __init__(self, pool: BlockPool, fingerprint: str = "", window: int = 0) -> None:
        self._pool, self._fingerprint = pool, fingerprint
        # Pages before a position that its query may look at; None: all of them.
        self._needed = max(1, -(-(window - 1) // pool.block_size)) if window else None

    def find(self, request: Request) -> list[int]:
        """The longest list of filed pages with the request's first tokens; pages behind the window are NO_BLOCK.

        At least one token is left out: something must be computed for there to be logits.
        """
        count = (len(request.tokens) - 1) // self._pool.block_size
        self._extend(request, count)
        blocks = [self._pool.find(key) for key in request.keys[:count]]
        if self._needed is None:
            missing = next((i for i, block in enumerate(blocks) if block is None), count)
            return [block for block in blocks[:missing] if block is not None]
        for end in range(count, 0, -1):
            begin = max(0, end - self._needed)
            found = [block for block in blocks[begin:end] if block is not None]
            if len(found) == end - begin:
                return [NO_BLOCK] * begin + found
        return []

    def file(self, request: Request) -> None:
        """Files the pages of a running request that have become full."""
        full = request.num_computed // self._pool.block_size
        if full > request.num_filed:
            self._extend(request, full)
            for index in range(max(request.num_filed, request.num_passed), full):
                self._pool.cache(request.blocks[index], request.keys[index])
            request.num_filed = full

    def forget_all(self) -> None:
        """Nothing that is filed now is found again."""
        self._pool.forget_all()

    def _extend(self, request: Request, count: int) -> None:
        keys, size = request.keys, self._pool.block_size
        while len(keys) < count:
            parent = keys[-1] if keys else root_key(self._fingerprint, request.adapter, request.cache_salt)
            keys.append(block_key(parent, request.tokens[len(keys) * size : (len(keys) + 1) * size]))
