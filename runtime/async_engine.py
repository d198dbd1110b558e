"""An engine with threads of its own: event loops hand in requests and wait for outputs, but never for a step.

One thread takes steps, and between two of them starts, forks and ends requests. The other makes text of what a step
has brought, while the next one is computed, and wakes each event loop once for all its requests. When it falls behind,
several steps become one output.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
import logging
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable

from llmopt.compiler.errors import EngineDeadError, InputError, QueueFullError, RequestError
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import Job, SequenceGroup
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.output_stream import Mailbox, Outcome, OutputStream, is_last
from llmopt.runtime.request import Request
from llmopt.runtime.sampling import RequestOutputKind

log = logging.getLogger(__name__)

MAX_ID_LENGTH = 256


class _Stop(enum.IntEnum):
    NO = 0
    DRAIN = 1
    ABORT = 2


class AsyncEngine:
    """Serves requests from any number of event loops on one `EngineCore`, which nobody else may use.

    Args:
        core: what takes the steps.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._ids = map(str, itertools.count())
        # Under `_wake`: what callers hand to the stepping thread. `_streams` are those whose end has not been sent off.
        self._wake = threading.Condition()
        self._streams: dict[str, OutputStream] = {}
        self._pending: dict[OutputStream, None] = {}
        self._cancelled: list[OutputStream] = []
        self._stop = _Stop.NO
        self._error: BaseException | None = None
        self._mailboxes: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakValueDictionary()
        # Under `_news`: what the stepping thread hands to the writing thread.
        self._news = threading.Condition()
        self._changed: dict[OutputStream, None] = {}
        self._no_more = False
        # The stepping thread's own: groups whose continuations are not all there, and what the latest step changed.
        self._growing: dict[OutputStream, None] = {}
        self._touched: dict[OutputStream, None] = {}
        self._stepper = threading.Thread(target=self._take_steps, name="llmopt-steps", daemon=True)
        self._writer = threading.Thread(target=self._write_outputs, name="llmopt-outputs", daemon=True)
        self._stepper.start()
        self._writer.start()

    # ---- callers ---------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> OutputStream:
        """Queues a request of the running event loop; its outputs come by the stream.

        Raises InputError for one that could never be served or whose id is in use, QueueFullError when too many wait,
        and EngineDeadError once the engine is no more; all of them at once, whatever a step is doing.
        """
        name = job.request_id
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_ID_LENGTH):
            raise InputError(f"request_id must be a text of 1 to {MAX_ID_LENGTH} characters, got {name!r:.80}")
        loop = asyncio.get_running_loop()
        # Inside, requests have names of the core's own: those of forks could not be told from what callers make up.
        group = SequenceGroup(self.core, dataclasses.replace(job, request_id=None))
        with self._wake:
            self.check_alive()
            if name is None:
                name = next(number for number in self._ids if number not in self._streams)
            if name in self._streams:
                raise InputError(f"a request with the id {name!r} has not finished yet")
            limit = self.core.scheduler.config.max_num_queued
            waiting = self.num_waiting
            if limit and waiting >= limit:
                raise QueueFullError(f"{waiting} requests wait, max_num_queued is {limit}")
            mailbox = self._mailboxes.setdefault(loop, Mailbox(loop))
            stream = OutputStream(name, group, mailbox, self.cancel)
            self._streams[name] = stream
            self._pending[stream] = None
            self._wake.notify()
        return stream

    def abort(self, request_id: str) -> bool:
        """Ends a request; its stream gets a last output. Whether there was one."""
        with self._wake:
            stream = self._streams.get(request_id)
            if stream is not None:
                self.cancel(stream)
        return stream is not None

    def cancel(self, stream: OutputStream) -> None:
        """Ends a stream's request, whatever it is doing, before the next step."""
        with self._wake:
            self._cancelled.append(stream)
            self._wake.notify()

    def shutdown(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests, ends those there are or with `drain` lets them finish, and waits for the threads.

        Whatever has not finished after `timeout` seconds of draining is aborted. May be called again, from any thread.
        """
        with self._wake:
            self._stop = max(self._stop, _Stop.DRAIN if drain else _Stop.ABORT)
            self._wake.notify_all()
        # Garbage may be collected, and an engine with it, in its own threads.
        if threading.current_thread() in (self._stepper, self._writer):
            return
        self._stepper.join(timeout if drain else None)
        if self._stepper.is_alive():
            with self._wake:
                self._stop = _Stop.ABORT
            self._stepper.join()
        self._writer.join()

    @property
    def num_waiting(self) -> int:
        """Requests that no step has begun with."""
        return len(self._pending) + self.core.scheduler.num_waiting

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._error is None and self._stop is _Stop.NO

    @property
    def error(self) -> BaseException | None:
        """What the engine died of."""
        return self._error

    def check_alive(self) -> None:
        """Raises EngineDeadError unless requests are taken."""
        if self._error is not None:
            raise _dead(self._error)
        if self._stop is not _Stop.NO:
            raise EngineDeadError("the engine was shut down")

    def metrics(self) -> Metrics:
        """Counts as of now."""
        return dataclasses.replace(self.core.metrics(), num_requests_waiting=self.num_waiting)

    # ---- the thread that takes steps -------------------------------------------------------------------------------

    def _take_steps(self) -> None:
        try:
            while self._wait_for_work():
                self._grow()
                self._start()
                if self.core.has_unfinished:
                    self.core.step()
                self._pass_on()
        except BaseException as error:
            self._die(error)
        finally:
            if self._error is not None:
                self._give_up()
            with self._news:
                self._no_more = True
                if self._error is not None:  # everybody has been told
                    self._changed.clear()
                self._news.notify()

    @property
    def _is_busy(self) -> bool:
        return bool(self._pending or self._growing or self.core.has_unfinished)

    def _wait_for_work(self) -> bool:
        """Ends what was cancelled; False when there is nothing to do and never will be."""
        with self._wake:
            while not (self._cancelled or self._is_busy or self._stop or self._error):
                self._wake.wait()
            if self._error is not None:
                return False
            if self._stop is _Stop.ABORT:
                self._cancelled = list(self._streams.values())
            cancelled, self._cancelled = self._cancelled, []
            for stream in cancelled:
                self._pending.pop(stream, None)
        for stream in cancelled:
            self._end(stream)
        self._pass_on()
        return self._is_busy or not self._stop

    def _end(self, stream: OutputStream, failure: Exception | None = None) -> None:
        stream.failure = stream.failure or failure
        self._growing.pop(stream, None)
        stream.group.abort()
        self._touched[stream] = None

    def _grow(self) -> None:
        for stream in list(self._growing):
            try:
                stream.group.grow()
            except Exception as error:
                self._end(stream, error)
            if stream.group.is_complete:
                self._growing.pop(stream, None)

    def _start(self) -> None:
        while self.core.has_room:
            with self._wake:
                stream = next(iter(self._pending), None)
                if stream is None:
                    return
                del self._pending[stream]
            try:
                stream.group.start(_Outbox(self._touched, stream))
            except Exception as error:
                self._end(stream, error)
            else:
                if not stream.group.is_complete:
                    self._growing[stream] = None

    def _pass_on(self) -> None:
        if self._touched:
            with self._news:
                self._changed.update(self._touched)
                self._news.notify()
            self._touched.clear()

    def _give_up(self) -> None:
        error = _dead(self._error)
        self._growing.clear()
        self._touched.clear()
        try:
            self.core.fail_all(error)
        except Exception:  # its books may be what is broken
            log.exception("requests could not be taken out of the engine")

    # ---- the thread that makes outputs -----------------------------------------------------------------------------

    def _write_outputs(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._changed or self._no_more):
                        self._news.wait()
                    changed, self._changed = self._changed, {}
                if not changed:
                    return
                self._send([(stream, news) for stream in changed if (news := self._outcome(stream)) is not None])
                del changed  # nothing is to be kept alive by a thread that waits
        except BaseException as error:
            self._die(error)

    def _outcome(self, stream: OutputStream) -> Outcome | None:
        """What is new for a stream, None for nothing."""
        if stream.is_complete:
            return None
        if stream.failure is not None:
            return stream.failure
        # First, because what ends meanwhile is looked at again.
        finished = stream.group.is_finished
        if stream.kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        try:
            return stream.group.snapshot(stream.request_id)
        except Exception as error:  # a tokenizer's, for one
            self.cancel(stream)
            failure = RequestError(f"the output of this request could not be made: {error}")
            failure.__cause__ = error
            return failure

    def _send(self, news: Iterable[tuple[OutputStream, Outcome]]) -> None:
        letters: dict[Mailbox, dict[OutputStream, Outcome]] = defaultdict(dict)
        for stream, outcome in news:
            letters[stream.mailbox][stream] = outcome
            if is_last(outcome):
                stream.is_complete = True
                with self._wake:
                    self._streams.pop(stream.request_id, None)
        for mailbox, outcomes in letters.items():
            if not mailbox.post(outcomes):  # the loop has been closed
                for stream in outcomes:
                    if not stream.is_complete:
                        self.cancel(stream)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _die(self, error: BaseException) -> None:
        log.error("the engine died", exc_info=error)
        with self._wake:
            self._error = self._error or error
            streams = list(self._streams.values())
            self._pending.clear()
            self._wake.notify_all()
        self._send([(stream, _dead(error)) for stream in streams])


class _Outbox:
    """Notes that a stream's request has news. The scheduler may keep a request longer than its stream."""

    def __init__(self, touched: dict[OutputStream, None], stream: OutputStream) -> None:
        self._touched, self._stream = touched, weakref.ref(stream)

    def append(self, request: Request, /) -> None:
        stream = self._stream()
        if stream is not None:
            self._touched[stream] = None


def _dead(cause: BaseException | None) -> EngineDeadError:
    """A new one each time: an exception that several tasks raise would collect all their tracebacks."""
    error = EngineDeadError(f"the engine died: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
