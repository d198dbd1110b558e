"""Finds texts in a growing text, at a cost that depends neither on how many they are nor on how long."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopTexts:
    """An automaton of texts (Aho and Corasick, 1975): its state is the longest end of what was read that begins one.

    States are numbers from 0, where nothing has begun.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._next: dict[tuple[int, str], int] = {}
        # Of each state: where to go on when no text goes on with the next character; the longest text that ends here;
        # how many of the latest characters are the beginning of a text whose end is still to come.
        self._fallback, self._found, self._open = [0], [""], [0]
        depths = [0]
        for text in dict.fromkeys(texts):
            state = 0
            for character in text:
                after = self._next.setdefault((state, character), len(depths))
                if after == len(depths):
                    depths.append(depths[state] + 1)
                    self._fallback.append(0)
                    self._found.append("")
                    self._open.append(0)
                state = after
            self._found[state] = text
        self._link(depths)

    def _link(self, depths: Sequence[int]) -> None:
        edges: list[list[tuple[str, int]]] = [[] for _ in depths]
        for (state, character), after in self._next.items():
            edges[state].append((character, after))
        states = deque([0])
        while states:  # shorter beginnings first
            state = states.popleft()
            for character, after in edges[state]:
                states.append(after)
                shorter = self.step(self._fallback[state], character) if state else 0
                self._fallback[after] = shorter
                self._found[after] = self._found[after] or self._found[shorter]
                self._open[after] = depths[after] if edges[after] else self._open[shorter]

    def __bool__(self) -> bool:
        return bool(self._next)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while (after := self._next.get((state, character))) is None:
            if not state:
                return 0
            state = self._fallback[state]
        return after

    def found(self, state: int) -> str:
        """The longest of the texts that end here, "" for none."""
        return self._found[state]

    def num_open(self, state: int) -> int:
        """How many characters at the end may be the beginning of a text."""
        return self._open[state]
