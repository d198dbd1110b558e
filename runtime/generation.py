"""Runs a list of prompts on an engine that others may be using as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from llmopt.compiler.errors import QueueFullError
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.request import Request, Status, StopCheck
from llmopt.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt, as `EngineCore.add_request` takes it."""

    prompt: Sequence[int]
    params: SamplingParams
    stop_check: StopCheck | None = None
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True)
class Update:
    """News of job `index`: its next token, None if it failed; `is_last` when nothing follows."""

    index: int
    request: Request
    token: int | None
    is_last: bool


def run_jobs(core: EngineCore, jobs: Sequence[Job]) -> Generator[Update, None, None]:
    """Yields every token of every job as it comes; a failed job's last update has no token.

    All jobs are checked first, so a bad one raises InputError before any has been run. They are queued as far as the
    engine's queue has room. Closing the iterator aborts what has not finished. Another caller may take steps of the
    same engine in between; nothing is lost.
    """
    for job in jobs:
        core.check(job.prompt, job.params, priority=job.priority, cache_salt=job.cache_salt)
    return _run(core, jobs)


def _run(core: EngineCore, jobs: Sequence[Job]) -> Generator[Update, None, None]:
    pending = deque(enumerate(jobs))
    outbox: deque[Request] = deque()
    # What has not finished: which job it is, and how many of its tokens have been given out.
    live: dict[Request, tuple[int, int]] = {}
    try:
        while pending or live:
            while pending and core.has_room:
                index, job = pending.popleft()
                try:
                    request = core.add_request(
                        job.prompt,
                        job.params,
                        priority=job.priority,
                        cache_salt=job.cache_salt,
                        stop_check=job.stop_check,
                        outbox=outbox,
                    )
                except QueueFullError:  # another thread took the room
                    pending.appendleft((index, job))
                    break
                live[request] = index, request.num_prompt
            if not outbox:
                core.step()
            while outbox:
                request = outbox.popleft()
                if request not in live:  # an earlier turn has given everything out already
                    continue
                index, given = live[request]
                # In this order: another thread may be adding the last token just now.
                ended = request.status is Status.FINISHED
                tokens: list[int | None] = [*request.tokens[given:]]
                if ended:
                    del live[request]
                    if request.error is not None or not tokens:
                        tokens.append(None)
                else:
                    live[request] = index, given + len(tokens)
                for i, token in enumerate(tokens, 1):
                    yield Update(index, request, token, ended and i == len(tokens))
    finally:
        for request in list(live):
            core.abort(request.request_id)
