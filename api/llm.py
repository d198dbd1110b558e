"""`llmopt.LLM`: generate from a model, a Hugging Face folder or a program file."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmopt.beam_requests import beam_requests
from llmopt.compiler.errors import InputError
from llmopt.request_builder import Message, Prompt, RequestBuilder
from llmopt.runtime.adapters import Adapter, LoRARequest
from llmopt.runtime.beam_search import BeamSearchParams
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import SequenceGroup, run_groups
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.outputs import BeamSearchOutput, CompletionOutput, RequestOutput, StreamChunk
from llmopt.runtime.sampling import SamplingParams
from llmopt.served_model import ServedModel

log = logging.getLogger(__name__)


class LLM:
    """Generates text from a compiled model.

    Args:
        model: a torch.nn.Module, the path of a Hugging Face folder, or of a program file (see `export`).
        tokenizer: a `tokenizers.Tokenizer` or a transformers tokenizer; a folder or file brings its own.
        options: the fields of `llmopt.Options`. With `dtype`, a module is cast in place, as by `model.to(dtype)`: it
            and the LLM have the same weights.

    Raises OptionError for unknown options, InputError for a path that holds no model, for a module in training mode and
    for an option that a program file has decided already, UnsupportedError for a model that cannot run over a paged KV
    cache or that has hooks or another forward than its class.
    """

    def __init__(self, model: torch.nn.Module | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self._model = ServedModel(model, tokenizer, **options)
        self._requests = RequestBuilder(self._model)
        self.options, self.report = self._model.options, self._model.report

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt included."""
        return self._model.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._model.vocab_size

    # ---- doors -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt and returns the outputs in order.

        Args:
            prompts: one or several, each a text, token ids, or as in vLLM `{"prompt": text}`, `{"prompt_token_ids":
                ids}` or `{"prompt_embeds": tensor}`: embeddings `[S, H]` of the model's dtype, as `inputs_embeds` of
                transformers, which need the option `enable_prompt_embeds`.
            sampling_params: for all, or one for each.
            use_tqdm: show a progress bar.
            lora_request: an adapter for all prompts, or for each one or None; needs the option `enable_lora`.
            priority: for each prompt; lower goes first, and equals in the order given.
            cache_salt: keys and values are shared only with calls of the same salt.

        Raises InputError for an empty prompt, one that is too long, a token id out of range or embeddings that do not
        fit, OptionError for parameters that do not suit the model (see `ConstraintCompiler`), AdapterError or
        UnsupportedError for an adapter that cannot be used, before any work.
        """
        groups = self._groups(prompts, sampling_params, priority, cache_salt, lora_request)
        if not groups:
            return []
        left = [group.job.params.num_sequences for group in groups]
        with tqdm(total=len(groups), desc="prompts", disable=not use_tqdm) as bar:
            for update in run_groups(groups[0].core, groups):
                left[update.index] -= update.is_last
                bar.update(update.is_last and left[update.index] == 0)
        outputs = [group.output() for group in groups]
        for number, output in enumerate(outputs):
            for completion in output.outputs:
                if completion.error is not None:
                    log.warning("prompt %d failed: %s", number, completion.error)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **more: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several: `[{"role": "user", "content": "..."}, ...]`.

        Args:
            messages: a conversation, or a list of them.
            sampling_params, use_tqdm, lora_request: as for `generate`.
            chat_template: Jinja, run in a sandbox; by default the tokenizer's.
            add_generation_prompt: end with the header of an answer.
            more: further variables for the template, such as `tools`.

        Raises InputError without a template or tokenizer, and for messages that the template refuses.
        """
        variables = {**more, "add_generation_prompt": add_generation_prompt}
        prompts = self._requests.render(messages, chat_template, **variables)
        return self.generate(prompts, sampling_params, use_tqdm, lora_request=lora_request)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> Generator[StreamChunk, None, None]:
        """Yields text as it becomes certain, request by request; arguments and errors as `generate`.

        Other calls may run while the iterator waits: their requests and these share steps.
        """
        groups = self._groups(prompts, sampling_params, priority, cache_salt, lora_request)
        for group in groups:
            if group.job.params.num_sequences > group.job.params.n:
                raise InputError(
                    f"best_of={group.job.params.best_of} cannot be streamed: the best are known at the end"
                )
        for update in run_groups(groups[0].core, groups) if groups else ():
            reason = update.request.finish_reason if update.is_last else None
            failed = update.request.error if update.is_last else None
            error = str(failed) if failed is not None else None
            yield StreamChunk(update.index, update.text, update.token, reason, update.sequence, error)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, best first, as transformers' `generate(num_beams=...)` has them.

        Prompts, adapters and errors as those of `generate`.
        """
        core = self._engine_core()
        given = self._requests.each(prompts)
        adapters = self._adapters(core, lora_request, len(given))
        searches = beam_requests(core, self._requests, given, params, adapters)
        for search in searches:
            while search.advance():
                pass
        return [search.output() for search in searches]

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` takes where no parameters are given: those of the model's generation configuration.

        A program file has none. Raises OptionError for values that the configuration should not have.
        """
        return self._model.default_sampling_params()

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads an adapter now, so that the first request need not wait for it; whether its name is new.

        Raises as `generate`.
        """
        return self._model.add_lora(lora_request)

    def remove_lora(self, name: str) -> bool:
        """Forgets an adapter; whether there was one of this name. Requests that run with it go on."""
        return self._model.remove_lora(name)

    def list_loras(self) -> set[str]:
        """The names of the adapters that have been read."""
        return self._model.list_loras()

    def get_metrics(self) -> Metrics:
        """What the engine has counted since it was made, and how many requests it has now."""
        return self._engine_core(fresh=False).metrics()

    def export(self, path: str | Path) -> None:
        """Writes the compiled step program with its weights and tokenizer to a file that `LLM` and `load` read.

        Raises UnsupportedError when an op has no kernel, because such a program needs the model's Python code.
        """
        self._model.export(path)

    # ---- requests --------------------------------------------------------------------------------------------------

    def _groups(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        cache_salt: str | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[SequenceGroup]:
        """One group for each prompt, all of them checked."""
        jobs = self._requests.jobs(prompts, sampling_params, priority=priority, cache_salt=cache_salt)
        core = self._engine_core()
        adapters = self._adapters(core, lora_request, len(jobs)) if jobs else []
        return [SequenceGroup(core, replace(job, adapter=a)) for job, a in zip(jobs, adapters, strict=True)]

    @staticmethod
    def _adapters(
        core: EngineCore, lora_request: LoRARequest | Sequence[LoRARequest | None] | None, count: int
    ) -> list[Adapter | None]:
        """The adapter of each prompt, read."""
        if lora_request is None or isinstance(lora_request, LoRARequest):
            each = [lora_request] * count
        else:
            each = list(lora_request)
        if len(each) != count:
            raise InputError(f"{count} prompts but {len(each)} LoRA requests")
        return [None if request is None else core.adapter(request) for request in each]

    def _engine_core(self, fresh: bool = True) -> EngineCore:
        """The engine; `fresh` looks whether the weights have changed."""
        return self._model.core(fresh)


__all__ = ["LLM", "BeamSearchOutput", "CompletionOutput", "Prompt", "RequestOutput", "StreamChunk"]
