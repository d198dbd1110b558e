"""`llmopt.LLM`: generate from a model, a Hugging Face folder or a program file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.huggingface import load_model, load_tokenizer
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import Job, Update, run_jobs
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.program_file import LoadedProgram, load_program, save_program
from llmopt.runtime.request import Request, StopCheck
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.text import IncrementalText, TextCodec

if TYPE_CHECKING:
    from llmopt.engine import ModelEngine


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation: its text, its token ids, and why it ended ("stop" or "length").

    A request that failed, alone, has the finish_reason "error" and an `error` that says why, beside what it had
    generated until then.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations; `num_cached_tokens` of the prompt were found in the prefix cache."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class StreamChunk:
    """Text that became certain with one token of request `index`; the last chunk of one that failed has no token."""

    index: int
    text: str
    token_id: int | None
    finish_reason: str | None


log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
# Sampling parameters that the output has no place for, or that nobody compiles for the model.
_NOT_SERVED: dict[str, Any] = {
    "n": 1,
    "best_of": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "bad_words": (),
    "structured_outputs": None,
}
# Options that shape the compiled program; the others are about running it.
_DECIDED_AT_EXPORT = frozenset(
    {"dtype", "block_size", "kv_cache_dtype", "batch_invariant", "disabled_passes", "fuel", "verify", "fallback"}
)


class LLM:
    """Generates text from a compiled model.

    Args:
        model: a torch.nn.Module, the path of a Hugging Face folder, or of a program file (see `export`).
        tokenizer: a `tokenizers.Tokenizer` or a transformers tokenizer; a folder or file brings its own.
        options: the fields of `llmopt.Options`.

    Raises OptionError for unknown options, InputError for a path that holds no model and for an option that a program
    file has decided already, UnsupportedError for a model that
    cannot run over a paged KV cache.
    """

    def __init__(self, model: torch.nn.Module | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self.options = Options.make(options)
        self.report = Report()
        self._engine: ModelEngine | None = None
        self._loaded: LoadedProgram | None = None
        self._core: EngineCore | None = None
        if isinstance(model, str | Path) and Path(model).is_file():
            for name in _DECIDED_AT_EXPORT & options.keys():
                raise InputError(f"{name}={options[name]!r} was decided when {model} was exported and cannot be set")
            self._loaded = load_program(model, self.options.threads)
            tokenizer = tokenizer or self._loaded.tokenizer
        else:
            owned = isinstance(model, str | Path)
            if isinstance(model, str | Path):
                tokenizer = tokenizer or load_tokenizer(model)
                model = load_model(model, self.options.torch_dtype)
            elif self.options.torch_dtype is not None:
                model = model.to(self.options.torch_dtype)
            # Compiling needs Dynamo; running a program file does not.
            from llmopt.engine import ModelEngine

            self._engine = ModelEngine(model, self.options, self.report, owned=owned)
        self._codec = TextCodec(tokenizer) if tokenizer is not None else None

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt included."""
        if self._engine is not None:
            return self._engine.max_model_len
        limit, own = self.options.max_model_len, self._program_info.max_model_len
        return min(limit, own) if limit else own

    @property
    def _program_info(self) -> LoadedProgram:
        if self._loaded is None:
            raise InputError("this LLM was made from a model, not from a program file")
        return self._loaded

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt (text, or token ids) and returns the outputs in order.

        Args:
            prompts: one or several, each a text or token ids.
            sampling_params: for all, or one for each.
            use_tqdm: show a progress bar.
            priority: for each prompt; lower goes first, and equals in the order given.
            cache_salt: keys and values are shared only with calls of the same salt.

        Raises InputError for an empty prompt, one that is too long, or a token id out of range, before any work.
        """
        texts, ids, params = self._prepare(prompts, sampling_params)
        streams = self._streams(params)
        done: dict[int, Request] = {}
        with tqdm(total=len(ids), desc="prompts", disable=not use_tqdm) as bar:
            for update in self._run(ids, params, streams, priority, cache_salt):
                if update.is_last:
                    done[update.index] = update.request
                    bar.update()
        return [
            RequestOutput(text, tuple(prompt), (self._completion(i, done[i], streams),), done[i].num_hit)
            for i, (text, prompt) in enumerate(zip(texts, ids, strict=True))
        ]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[StreamChunk]:
        """Yields text as it becomes certain, request by request; arguments and errors as `generate`.

        Other calls may run while the iterator waits: their requests and these share steps.
        """
        _, ids, params = self._prepare(prompts, sampling_params)
        streams = self._streams(params)
        for update in self._run(ids, params, streams, priority, cache_salt):
            text = ""
            if streams:
                stream = streams[update.index]
                # Another call's steps may have brought several tokens: the text then comes with the first of them.
                text = stream.finish() if update.is_last else stream.take()
            yield StreamChunk(
                update.index, text, update.token, update.request.finish_reason if update.is_last else None
            )

    def get_metrics(self) -> Metrics:
        """What the engine has counted since it was made, and how many requests it has now."""
        return self._engine_core(fresh=False).metrics()

    def _prepare(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[str | None], list[list[int]], list[SamplingParams]]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [cast(Prompt, prompts)]
        texts: list[str | None] = []
        ids: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                if self._codec is None:
                    raise InputError("a text prompt needs a tokenizer; pass one to LLM, or pass token ids")
                texts.append(prompt)
                ids.append(self._codec.encode(prompt))
            else:
                texts.append(None)
                ids.append([t.item() if hasattr(t, "item") else t for t in prompt])  # type: ignore[union-attr]
        params = sampling_params or SamplingParams()
        many = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(many) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(many)} sampling parameters")
        for name, neutral in _NOT_SERVED.items():
            for given in (getattr(p, name) for p in many):
                if given != neutral:
                    raise InputError(f"{name}={given!r:.80} is not served here")
        if any(p.stop for p in many) and self._codec is None:
            raise InputError("stop strings need a tokenizer; use stop_token_ids, or pass a tokenizer to LLM")
        return texts, ids, many

    def _streams(self, params: Sequence[SamplingParams]) -> list[IncrementalText]:
        if self._codec is None:
            return []
        return [
            IncrementalText(
                self._codec,
                p.skip_special_tokens,
                p.stop,
                include_stop=p.include_stop_str_in_output,
                spaces_between_special_tokens=p.spaces_between_special_tokens,
            )
            for p in params
        ]

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        streams: Sequence[IncrementalText],
        priority: Sequence[int] | None,
        cache_salt: str | None,
    ) -> Iterator[Update]:
        if priority is not None and len(priority) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(priority)} priorities")
        if not ids:
            return iter(())

        def check_of(index: int) -> StopCheck | None:
            def stop_check(request: Request) -> bool:
                may_stop = request.num_generated >= request.params.min_tokens
                return streams[index].push(request.tokens[-1], may_stop)

            return stop_check if streams else None

        ranks = priority or [0] * len(ids)
        jobs = [
            Job(prompt, param, check_of(i), rank, cache_salt)
            for i, (prompt, param, rank) in enumerate(zip(ids, params, ranks, strict=True))
        ]
        return run_jobs(self._engine_core(), jobs)

    def _engine_core(self, fresh: bool = True) -> EngineCore:
        """The engine; `fresh` looks whether the weights have changed."""
        if self._engine is not None:
            return self._engine.core(fresh)
        if self._core is None:
            info = self._program_info
            self._core = EngineCore(info.program, info, self.options, self.max_model_len)
        return self._core

    def _completion(self, index: int, request: Request, streams: Sequence[IncrementalText]) -> CompletionOutput:
        text = ""
        if streams:
            streams[index].finish()
            text = streams[index].text
        error = None if request.error is None else str(request.error)
        if error is not None:
            log.warning("prompt %d failed: %s", index, error)
        return CompletionOutput(text, tuple(request.generated), request.finish_reason, error)

    def export(self, path: str | Path) -> None:
        """Writes the compiled step program with its weights and tokenizer to a file that `LLM` and `load` read.

        Raises UnsupportedError when an op has no kernel, because such a program needs the model's Python code.
        """
        if self._engine is None:
            raise InputError("this LLM was loaded from a program file already")
        program = self._engine.program()
        info = self._engine.info
        tokenizer = self._codec.to_json() if self._codec is not None else None
        save_program(
            path,
            program,
            vocab_size=info.vocab_size,
            max_model_len=self._engine.max_model_len,
            eos_token_ids=info.eos_token_ids,
            tokenizer=tokenizer,
        )
