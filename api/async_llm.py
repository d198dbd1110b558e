"""`llmopt.AsyncLLM`: generate for many callers at once, from asyncio, with outputs as they come."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmopt.beam_requests import BeamRequest, beam_requests
from llmopt.compiler.errors import OptionError
from llmopt.request_builder import Message, Prompt, RequestBuilder
from llmopt.runtime.adapters import LoRARequest
from llmopt.runtime.async_engine import AsyncEngine
from llmopt.runtime.beam_search import BeamSearchParams
from llmopt.runtime.generation import Job
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.outputs import BeamSearchOutput, RequestOutput
from llmopt.runtime.sampling import RequestOutputKind, SamplingParams
from llmopt.served_model import ServedModel


class AsyncLLM:
    """Generates text from a compiled model, for callers on any number of event loops, under vLLM's names.

        async with llmopt.AsyncLLM("./model") as engine:
            async for output in engine.generate("import os", params, "request-1"):
                print(output.outputs[0].text)

    Steps run in a thread of their own, and requests join and leave between two of them. The model is compiled and bound
    here and now; its weights must not be changed while the engine runs.

    Args:
        model, tokenizer, options: as for `LLM`, with the same errors.
    """

    def __init__(self, model: torch.nn.Module | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self._model = ServedModel(model, tokenizer, **options)
        self.options, self.report = self._model.options, self._model.report
        self._requests = RequestBuilder(self._model)
        self._engine = AsyncEngine(self._model.core())
        # One that nobody holds any more has threads that would never end.
        weakref.finalize(self, self._engine.shutdown)

    # ---- requests --------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continues a prompt, and yields what is known of it as steps bring more; the last output is `finished`.

        A caller slower than the engine gets several steps as one output. Leaving the iteration early, closing the
        generator or cancelling its task aborts the request.

        Args:
            prompt: a text, token ids, or a dict as `LLM.generate` takes it.
            sampling_params: how to continue it; `output_kind` says what an output holds.
            request_id: a name for `abort`, not in use by another request; by default one is made.
            priority: lower goes first, and equals as they came.
            cache_salt: keys and values are shared only with requests of the same salt.
            lora_request: an adapter; needs the option `enable_lora`.

        Raises, at the first iteration and before any work: InputError and OptionError as `LLM.generate`, QueueFullError
        when `max_num_queued` requests wait, EngineDeadError after `shutdown`. Later: EngineDeadError when the engine
        fails as a whole. A request that fails alone has "error" as its finish_reason.
        """
        build = functools.partial(self._job, prompt, sampling_params, request_id, priority, cache_salt, lora_request)
        # Long texts, grammars and adapters take a while; the loop has other things to do.
        with contextlib.closing(self._engine.submit(await asyncio.to_thread(build))) as stream:
            async for output in stream:
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: LoRARequest | None = None,
        **more: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers a conversation; as `generate`, with the template's arguments of `LLM.chat`."""

        def build() -> Job:
            variables = {**more, "add_generation_prompt": add_generation_prompt}
            (prompt,) = self._requests.render([messages], chat_template, **variables)
            return self._job(prompt, sampling_params, request_id, priority, cache_salt, lora_request)

        with contextlib.closing(self._engine.submit(await asyncio.to_thread(build))) as stream:
            async for output in stream:
                yield output

    async def beam_search(
        self, prompt: Prompt, params: BeamSearchParams, *, lora_request: LoRARequest | None = None
    ) -> BeamSearchOutput:
        """The likeliest continuations of a prompt, best first; see `LLM.beam_search`.

        Its steps are taken between those of the engine. Cancelling the task ends it before the next one. Raises
        EngineDeadError once the engine is no more.
        """
        core = self._engine.core
        self._engine.check_alive()

        def build() -> BeamRequest:
            given = prompt if isinstance(prompt, str) else [prompt]
            adapter = None if lora_request is None else core.adapter(lora_request)
            (search,) = beam_requests(core, self._requests, given, params, [adapter])
            return search

        search = await asyncio.to_thread(build)
        while await asyncio.to_thread(search.advance):
            self._engine.check_alive()
        return search.output()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends one request or several; each gets a last output with "abort" as its finish_reason. Unknown ids are
        passed over: what they name may have ended just now."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            self._engine.abort(name)

    def _job(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        salt: str | None,
        lora_request: LoRARequest | None,
    ) -> Job:
        given = prompt if isinstance(prompt, str) else [prompt]  # one list is one prompt, even an empty one
        (job,) = self._requests.jobs(given, params, priority=[priority], cache_salt=salt, request_id=request_id)
        if job.params.num_sequences > job.params.n and job.params.output_kind is not RequestOutputKind.FINAL_ONLY:
            raise OptionError(
                "output_kind", job.params.output_kind, "FINAL_ONLY with best_of: the best are known at the end"
            )
        return job if lora_request is None else replace(job, adapter=self._engine.core.adapter(lora_request))

    # ---- the engine ------------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt included."""
        return self._model.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._model.vocab_size

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: neither shut down nor dead."""
        return self._engine.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine died of an error."""
        return self._engine.error is not None

    async def check_health(self) -> None:
        """Raises EngineDeadError unless requests are taken."""
        self._engine.check_alive()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` takes where no parameters are given; see `LLM.get_default_sampling_params`."""
        return self._model.default_sampling_params()

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads an adapter now, so that the first request need not wait for it; whether its name is new.

        Raises as `generate`.
        """
        return await asyncio.to_thread(self._model.add_lora, lora_request)

    async def remove_lora(self, name: str) -> bool:
        """Forgets an adapter; whether there was one of this name. Requests that run with it go on."""
        return self._model.remove_lora(name)

    async def list_loras(self) -> set[str]:
        """The names of the adapters that have been read."""
        return self._model.list_loras()

    def get_metrics(self) -> Metrics:
        """What the engine has counted since it was made, and how many requests it has now."""
        return self._engine.metrics()

    def shutdown(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests, ends those there are, and waits for the threads.

        With `drain` they may finish, for up to `timeout` seconds; what is left then is aborted. May be called again. It
        blocks for a step or, with `drain`, for as long as it takes: in a coroutine, use `asyncio.to_thread`.
        """
        self._engine.shutdown(drain=drain, timeout=timeout)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.shutdown)
