"""Which adapter stands in which slot of a step program. Pure Python: the scheduler's side of the adapter pool."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class AdapterSlots:
    """A fixed number of slots. An adapter that running requests use is pinned to its slot; the others stay until the
    slot is needed, least recently used first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}

    def has_room(self, key: str) -> bool:
        """Whether `pin` would find a slot now."""
        return key in self._slots or len(self._pins) < self.count

    def pin(self, key: str) -> int:
        """The slot of an adapter for one more running request; takes that of another one, if need be, that nobody uses.

        Raises RuntimeError where there is none: ask `has_room` first.
        """
        slot = self._slots.get(key)
        if slot is None:
            slot = self._free.pop() if self._free else self._evict()
            self._slots[key] = slot
        self._slots.move_to_end(key)
        self._pins[key] = self._pins.get(key, 0) + 1
        return slot

    def unpin(self, key: str) -> None:
        """One running request less."""
        left = self._pins[key] - 1
        if left:
            self._pins[key] = left
        else:
            del self._pins[key]

    def check(self, running: Iterable[str]) -> None:
        """Raises RuntimeError unless adapters are pinned as often as `running`, one for each request, has them."""
        counts: dict[str, int] = {}
        for key in running:
            counts[key] = counts.get(key, 0) + 1
        if counts != self._pins or not counts.keys() <= self._slots.keys():
            raise RuntimeError(f"adapters are pinned {self._pins}, but used {counts}")
        if sorted([*self._slots.values(), *self._free]) != list(range(self.count)):
            raise RuntimeError("a slot holds two adapters, or is lost")

    def _evict(self) -> int:
        for key in self._slots:
            if key not in self._pins:
                return self._slots.pop(key)
        raise RuntimeError(f"all {self.count} slots hold adapters of running requests")
