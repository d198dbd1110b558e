"""Finds and files pages by what they hold, for requests whose tokens begin alike (vLLM's automatic prefix caching).

A page is filed once it is full, its tokens are really computed, and the step that computed them came out finite.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmopt.runtime.block_pool import block_key, root_key
from llmopt.runtime.page_groups import PageGroup
from llmopt.runtime.request import NO_BLOCK, Request


class PrefixCache:
    """The filed pages of all groups of layers, under the same keys in each group's pool.

    Args:
        groups: where pages are held and filed. Of one with a window, only the pages that are still looked at need to
            be found.
        fingerprint: names everything about model and cache that keys and values depend on and that may differ between
            users of one pool.
    """

    def __init__(self, groups: Sequence[PageGroup], fingerprint: str = "") -> None:
        self._groups, self._fingerprint = list(groups), fingerprint
        self._size = self._groups[0].pool.block_size

    def find(self, request: Request) -> list[list[int]]:
        """For each group the filed pages of the request's first tokens, as many as all groups have; NO_BLOCK for pages
        behind the window.

        At least one token is left out: something must be computed for there to be logits.
        """
        count = (len(request.tokens) - 1) // self._size
        self.extend_keys(request, count)
        end = count
        found = []
        for group in self._groups:
            blocks = [group.pool.find(key) for key in request.keys[:count]]
            found.append(blocks)
            if not group.window:
                end = min(end, next((i for i, block in enumerate(blocks) if block is None), count))
        while end and not all(
            None not in blocks[self._first(group, end) : end]
            for group, blocks in zip(self._groups, found, strict=True)
            if group.window
        ):
            end -= 1
        return [
            [
                NO_BLOCK if block is None or i < self._first(group, end) else block
                for i, block in enumerate(blocks[:end])
            ]
            for group, blocks in zip(self._groups, found, strict=True)
        ]

    def _first(self, group: PageGroup, end: int) -> int:
        """The first page that the query after `end` full pages may look at; the last at least is to be found."""
        return max(0, min(end - 1, (end * self._size - group.window + 1) // self._size)) if group.window else 0

    def file(self, request: Request) -> None:
        """Files the pages of a running request that have become full."""
        full = request.num_computed // self._size
        if full > request.num_filed:
            self.extend_keys(request, full)
            for group, table in zip(self._groups, request.tables, strict=True):
                for index in range(max(request.num_filed, table.num_passed), full):
                    group.pool.cache(table.blocks[index], request.keys[index])
            request.num_filed = full

    def forget(self, request: Request) -> None:
        """What a request holds, or held before it was preempted, is not found by others any more."""
        for group, table in zip(self._groups, request.tables, strict=True):
            before = (group.pool.find(key) for key in request.keys)
            group.pool.forget([*table.held, *(block for block in before if block is not None)])

    def extend_keys(self, request: Request, count: int | None = None) -> None:
        """Computes the keys of a request's first `count` pages, or of all that are full."""
        keys, size, embeds = request.keys, self._size, request.prompt_embeds
        for index in range(len(keys), len(request.tokens) // size if count is None else count):
            tokens = request.tokens[index * size : (index + 1) * size]
            parent = keys[-1] if keys else self._root(request)
            if embeds is None:
                keys.append(block_key(parent, tokens))
            else:
                given = embeds.content(index * size, (index + 1) * size)
                keys.append(block_key(parent, tokens[max(0, len(embeds) - index * size) :], given))

    def _root(self, request: Request) -> bytes:
        """What the chain of a request's keys begins with. Embeddings and ids have different ones: whatever numbers they
        consist of, they never meet."""
        kind = () if request.prompt_embeds is None else ("prompt_embeds",)
        return root_key(self._fingerprint, request.adapter, request.cache_salt, *kind)
