"""Engines that stand still where a test needs them: nothing that a test waits for can be over before it looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.request import Request

# Only what hangs takes so long. A loaded machine may keep a thread from running for many seconds.
HANGS_AFTER_S = 300.0


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does, without blocking the loop."""
    deadline = time.monotonic() + HANGS_AFTER_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.002)


class Gate:
    """Holds an engine before its next step while a condition is true; open at first.

    The thread that takes the steps asks for the condition itself, before each: none slips through, however long the
    test's own thread has to wait for a processor.
    """

    def __init__(self, core: EngineCore) -> None:
        self._condition: Callable[[], bool] = _never
        self._held_by: Callable[[], bool] | None = None
        self._step = core.step
        core.step = self._gated  # type: ignore[method-assign]

    def hold_while(self, condition: Callable[[], bool]) -> None:
        """Steps are taken from now on unless this is true."""
        self._condition = condition

    def close(self) -> None:
        self.hold_while(_always)

    def open(self) -> None:
        self.hold_while(_never)

    @property
    def holds(self) -> bool:
        """Whether the engine stands here, for the condition that was set last."""
        return self._held_by is self._condition

    def _gated(self) -> list[Request]:
        deadline = time.monotonic() + HANGS_AFTER_S
        while (condition := self._condition)():
            self._held_by = condition
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.001)
        self._held_by = None
        return self._step()


def _always() -> bool:
    return True


def _never() -> bool:
    return False
