"""Prompts on an engine that others may be using as well: each with all its continuations, and what became of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmopt.compiler.errors import QueueFullError
from llmopt.runtime.adapters import Adapter
from llmopt.runtime.detokenizer import Detokenizer
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.outputs import Logprob, PositionLogprobs, RequestOutput
from llmopt.runtime.prompt_embeds import PromptEmbeds
from llmopt.runtime.request import Outbox, Request, StopCheck
from llmopt.runtime.sampling import Constraints, SamplingParams
from llmopt.runtime.snapshot import SequenceSnapshot, Snapshot
from llmopt.runtime.stop_texts import StopTexts
from llmopt.runtime.text import TextCodec


@dataclass(frozen=True)
class Job:
    """A prompt and what to do with it.

    prompt: token ids, or embeddings `[S, H]` where the program takes them.
    params: how to continue it, in `params.num_sequences` ways.
    text: what `prompt` was made of.
    codec: makes text of the tokens; None leaves them what they are.
    constraints: what `ConstraintCompiler` made of `params`.
    stop_check: of requests without a codec; see `Request`.
    request_id, priority, cache_salt, adapter: as `EngineCore.add_request` takes them.
    """

    prompt: Sequence[int] | Tensor
    params: SamplingParams
    text: str | None = None
    codec: TextCodec | None = None
    constraints: Constraints | None = None
    stop_check: StopCheck | None = None
    request_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    adapter: Adapter | None = None


@dataclass(eq=False)
class SequenceState:
    """One continuation: its request, its text, and how much of it has been looked at.

    num_given: tokens of which there were updates; `shown`: the text that was given.
    num_scored: tokens whose log probabilities are in `cumulative_logprob`, and where asked for in `logprobs`.
    """

    index: int
    request: Request
    detokenizer: Detokenizer | None
    num_given: int = 0
    shown: str = ""
    num_scored: int = 0
    cumulative_logprob: float = 0.0
    logprobs: list[PositionLogprobs] = field(default_factory=list)


class SequenceGroup:
    """A job on an engine. The first continuation is a request; the others fork from it once its prompt is computed.

    Raises InputError or OptionError, before any work, for a job that could never be served.
    """

    def __init__(self, core: EngineCore, job: Job) -> None:
        self._prompt = core.prompt(job.prompt)
        self._prompt_ids = () if isinstance(self._prompt, PromptEmbeds) else tuple(self._prompt)
        core.check(self._prompt, job.params, priority=job.priority, cache_salt=job.cache_salt)
        self.job, self.core = job, core
        self.sequences: list[SequenceState] = []
        self._outbox: Outbox | None = None
        self._aborted = False
        self._stops = StopTexts(job.params.stop)
        self._prompt_logprobs: tuple[PositionLogprobs | None, ...] = (None,)

    def start(self, outbox: Outbox) -> Request:
        """Queues the first request; raises QueueFullError."""
        self._outbox, job = outbox, self.job
        detokenizer = self._new_detokenizer()
        request = self.core.add_request(
            self._prompt,
            job.params,
            request_id=job.request_id,
            priority=job.priority,
            cache_salt=job.cache_salt,
            constraints=job.constraints,
            stop_check=self._stop_check(detokenizer),
            outbox=outbox,
            adapter=job.adapter,
        )
        self.sequences.append(SequenceState(0, request, detokenizer))
        return request

    def grow(self) -> None:
        """Adds the other continuations when the time has come, as far as the queue has room."""
        if self.is_complete:
            return
        first = self.sequences[0].request
        while not self.is_complete and first.num_generated and self.core.has_room:
            number, detokenizer = len(self.sequences), self._new_detokenizer()
            try:
                child = self.core.fork(
                    first,
                    stream=number,
                    constraints=self.job.constraints,
                    stop_check=self._stop_check(detokenizer),
                    outbox=self._outbox,
                )
            except QueueFullError:  # another thread took the room
                return
            self.sequences.append(SequenceState(number, child, detokenizer))

    @property
    def is_complete(self) -> bool:
        """Whether no continuation is still to be added: where the first one fails or is aborted, no other begins."""
        if self._aborted or not self.sequences:
            return self._aborted
        first = self.sequences[0].request
        gone = first.published[1] and first.finish_reason in ("error", "abort")
        return gone or len(self.sequences) >= self.job.params.num_sequences

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.is_complete and all(sequence.request.published[1] for sequence in self.sequences)

    def abort(self) -> None:
        """Ends what has not ended; nothing is added any more."""
        self._aborted = True
        for sequence in self.sequences:
            if not sequence.request.published[1]:
                self.core.abort(sequence.request)

    @property
    def error(self) -> Exception | None:
        """What the first continuation that failed failed of."""
        return next((s.request.error for s in self.sequences if s.request.error is not None), None)

    def output(self) -> RequestOutput:
        """Everything that is known now; of more than `params.n` continuations the likeliest."""
        return self.snapshot().output()

    def snapshot(self, request_id: str | None = None) -> Snapshot:
        """As `output`, at the cost of what is new since the last one; under the first request's id or another."""
        finished, params = self.is_finished, self.job.params
        if not self.sequences:
            unstarted = SequenceSnapshot(0, finish_reason="abort" if finished else None)
            return Snapshot(
                RequestOutput(request_id or "", self.job.text, self._prompt_ids, (), finished), (unstarted,)
            )
        first = self.sequences[0].request
        sequences = [self._snapshot_of(sequence) for sequence in self.sequences]
        if len(sequences) > params.n:
            sequences.sort(key=lambda each: (each.error is not None, -(each.cumulative_logprob or 0.0)))
            sequences = [replace(each, index=i) for i, each in enumerate(sequences[: params.n])]
        head = RequestOutput(
            request_id or first.request_id,
            self.job.text,
            self._prompt_ids,
            (),
            finished,
            self._logprobs_of_prompt(first) if params.prompt_logprobs is not None else None,
            min(first.num_hit, len(self._prompt)),
        )
        return Snapshot(head, tuple(sequences))

    def _snapshot_of(self, sequence: SequenceState) -> SequenceSnapshot:
        request, params, detokenizer = sequence.request, self.job.params, sequence.detokenizer
        length, ended = request.published
        count = max(0, length - request.num_prompt)
        if detokenizer is not None:
            sequence.shown += detokenizer.take(request, count, ended)
        stop_reason: int | str | None = None
        if ended and request.finish_reason == "stop":
            stop_reason = detokenizer.stopped_by if detokenizer else None
            if stop_reason is None and count and (last := request.tokens[length - 1]) in params.stop_token_ids:
                stop_reason = last
        for value, top in request.logprobs[sequence.num_scored : count]:
            sequence.num_scored += 1
            sequence.cumulative_logprob += value
            if params.logprobs is not None:
                sequence.logprobs.append(self._position(top or {}, params.logprobs))
        return SequenceSnapshot(
            sequence.index,
            sequence.shown,
            request.tokens,
            request.num_prompt,
            request.num_prompt + count,
            sequence.cumulative_logprob if request.wants_logprob else None,
            sequence.logprobs if params.logprobs is not None else None,
            request.finish_reason if ended else None,
            stop_reason,
            None if request.error is None or not ended else str(request.error),
        )

    def _logprobs_of_prompt(self, request: Request) -> tuple[PositionLogprobs | None, ...]:
        count, known = self.job.params.prompt_logprobs or 0, len(self._prompt_logprobs) - 1
        if new := request.prompt_logprobs[known:]:
            self._prompt_logprobs += tuple(self._position(entry.top_logprobs, count) for entry in new)
        return self._prompt_logprobs

    def _position(self, top: dict[int, float], count: int) -> PositionLogprobs:
        """Likeliest first; the token that stands there comes after `count` of them, or is one of them."""
        codec = self.job.codec
        return {
            token: Logprob(value, rank if rank <= count else None, codec.decode([token], False) if codec else None)
            for rank, (token, value) in enumerate(top.items(), 1)
        }

    def _new_detokenizer(self) -> Detokenizer | None:
        job = self.job
        if job.codec is None or not job.params.detokenize:
            return None
        return Detokenizer(job.codec, job.params, list(self._prompt_ids), self._stops)

    def _stop_check(self, detokenizer: Detokenizer | None) -> StopCheck | None:
        return detokenizer.stop_check if detokenizer is not None and self.job.params.stop else self.job.stop_check


@dataclass(frozen=True)
class Update:
    """News of continuation `sequence` of job `index`: its next token, None if it failed.

    `is_last` when nothing follows; `text` is what became certain.
    """

    index: int
    request: Request
    token: int | None
    is_last: bool
    sequence: int = 0
    text: str = ""


def run_jobs(core: EngineCore, jobs: Sequence[Job]) -> Generator[Update, None, None]:
    """Yields every token of every job as it comes; a failed job's last update has no token.

    All jobs are checked first, so a bad one raises InputError before any has been run. They are queued as far as the
    engine's queue has room. Closing the iterator aborts what has not finished. Another caller may take steps of the
    same engine in between; nothing is lost.
    """
    return run_groups(core, [SequenceGroup(core, job) for job in jobs])


def run_groups(core: EngineCore, groups: Sequence[SequenceGroup]) -> Generator[Update, None, None]:
    """As `run_jobs`, over groups that have not been started; each `output` is complete at the end."""
    pending = deque(enumerate(groups))
    outbox: deque[Request] = deque()
    live: dict[Request, tuple[int, SequenceState]] = {}
    # Groups that have not got all their continuations.
    growing: dict[int, SequenceGroup] = {}
    try:
        while pending or live or growing:
            while pending and core.has_room:
                index, group = pending.popleft()
                try:
                    request = group.start(outbox)
                except QueueFullError:  # another thread took the room
                    pending.appendleft((index, group))
                    break
                live[request] = index, group.sequences[0]
                growing[index] = group
            for index, group in list(growing.items()):
                known = len(group.sequences)
                group.grow()
                live.update((sequence.request, (index, sequence)) for sequence in group.sequences[known:])
                if group.is_complete:
                    del growing[index]
            if not outbox:
                core.step()
            while outbox:
                request = outbox.popleft()
                if request not in live:  # an earlier turn has given everything out already
                    continue
                index, sequence = live[request]
                length, ended = request.published
                if ended:
                    del live[request]
                yield from _updates(index, sequence, length - request.num_prompt, ended)
    finally:
        for group in groups:
            group.abort()


def _updates(index: int, sequence: SequenceState, count: int, ended: bool) -> Generator[Update, None, None]:
    request, begin = sequence.request, sequence.num_given
    tokens: list[int | None] = [*request.tokens[request.num_prompt + begin : request.num_prompt + count]]
    sequence.num_given = count
    if ended and (request.error is not None or not tokens):
        tokens.append(None)
    for number, token in enumerate(tokens, 1):
        last = ended and number == len(tokens)
        text = ""
        if sequence.detokenizer is not None:
            text = sequence.detokenizer.take(request, min(begin + number, count), last)
            sequence.shown += text
        yield Update(index, request, token, last, sequence.index, text)
