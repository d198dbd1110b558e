"""Outputs of one request on their way from the engine's threads to the coroutine that waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import TypeAlias

from llmopt.runtime.generation import SequenceGroup
from llmopt.runtime.outputs import RequestOutput
from llmopt.runtime.sampling import RequestOutputKind
from llmopt.runtime.snapshot import Delta, Snapshot

# What is new of a request, for the coroutine that waits for it: all that is known, or why there will be no more.
Outcome: TypeAlias = Snapshot | Exception


def is_last(outcome: Outcome | None) -> bool:
    """Whether nothing follows."""
    return isinstance(outcome, Exception) or (outcome is not None and outcome.finished)


class Mailbox:
    """Takes outcomes to one event loop: the latest of each stream, with one wake-up for all that came together.

    While the loop is busy later ones replace earlier ones, so what waits here is bounded by the number of streams.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: dict[OutputStream, Outcome] = {}

    def post(self, news: Mapping[OutputStream, Outcome]) -> bool:
        """Called in any thread; False when the loop has been closed, so that nobody can be reached any more."""
        with self._lock:
            on_its_way = bool(self._waiting)
            # Where the engine dies while snapshots are made, an end may come from two threads.
            self._waiting.update((s, outcome) for s, outcome in news.items() if not is_last(self._waiting.get(s)))
        try:
            if not on_its_way:
                self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return False
        return not self._loop.is_closed()

    def _deliver(self) -> None:
        with self._lock:
            news, self._waiting = self._waiting, {}
        for stream, outcome in news.items():
            stream._receive(outcome)


class OutputStream:
    """An asynchronous iterator over the outputs of one request, for one coroutine of the loop that made it.

    A coroutine that is slower than the engine gets what came together as one output. `close` ends the request.

    Args:
        request_id: its name.
        group: what the engine runs.
        mailbox: of the loop.
        cancel: tells the engine that nobody waits any more.
    """

    def __init__(
        self, request_id: str, group: SequenceGroup, mailbox: Mailbox, cancel: Callable[[OutputStream], None]
    ) -> None:
        self.request_id, self.group, self.mailbox = request_id, group, mailbox
        self._cancel = cancel
        self.kind = group.job.params.output_kind
        self._delta = Delta() if self.kind is RequestOutputKind.DELTA else None
        # The engine's: what went wrong outside of a step, and whether the last output has been made.
        self.failure: Exception | None = None
        self.is_complete = False
        # The loop's.
        self._latest: Outcome | None = None
        self._news = asyncio.Event()
        self._ended = False

    def _receive(self, outcome: Outcome) -> None:
        if not self._ended:
            self._latest = outcome
            self._ended = is_last(outcome)
            self._news.set()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            latest, self._latest = self._latest, None
            if isinstance(latest, Exception):
                raise latest
            if latest is not None:
                output = self._delta(latest) if self._delta is not None else latest.output()
                if output is not None:
                    return output
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    def close(self) -> None:
        """Ends the request unless it has ended; may be called again."""
        if not self._ended:
            self._ended = True
            self._cancel(self)
