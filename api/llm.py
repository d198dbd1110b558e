"""`llmopt.LLM`: generate from a model, a Hugging Face folder or a program file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.huggingface import load_model, load_tokenizer
from llmopt.runtime.beam_search import BeamSearchParams
from llmopt.runtime.chat_template import ChatTemplate
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.generation import Job, SequenceGroup, run_groups
from llmopt.runtime.metrics import Metrics
from llmopt.runtime.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput, StreamChunk
from llmopt.runtime.paged_beams import PagedBeams
from llmopt.runtime.program_file import LoadedProgram, load_program, save_program
from llmopt.runtime.sampling import ConstraintCompiler, SamplingParams
from llmopt.runtime.text import TextCodec

if TYPE_CHECKING:
    from llmopt.engine import ModelEngine

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
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
    file has decided already, UnsupportedError for a model that cannot run over a paged KV cache.
    """

    def __init__(self, model: torch.nn.Module | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self.options = Options.make(options)
        self.report = Report()
        self._engine: ModelEngine | None = None
        self._loaded: LoadedProgram | None = None
        self._core: EngineCore | None = None
        self._constraints: ConstraintCompiler | None = None
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
        self._tokenizer = tokenizer
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

    # ---- doors -----------------------------------------------------------------------------------------------------

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

        Raises InputError for an empty prompt, one that is too long, or a token id out of range, and OptionError for
        parameters that do not suit the model (see `ConstraintCompiler`), before any work.
        """
        groups = self._groups(prompts, sampling_params, priority, cache_salt)
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
        **more: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several: `[{"role": "user", "content": "..."}, ...]`.

        Args:
            messages: a conversation, or a list of them.
            sampling_params, use_tqdm: as for `generate`.
            chat_template: Jinja, run in a sandbox; by default the tokenizer's.
            add_generation_prompt: end with the header of an answer.
            more: further variables for the template, such as `tools`.

        Raises InputError without a template or tokenizer, and for messages that the template refuses.
        """
        if self._codec is None:
            raise InputError("chat needs a tokenizer; pass one to LLM")
        own = getattr(self._tokenizer, "chat_template", None)
        source = chat_template or (own if isinstance(own, str) else None)
        if source is None:
            raise InputError("this tokenizer has no chat template; pass chat_template")
        template = ChatTemplate(source, getattr(self._tokenizer, "special_tokens_map", {}))
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        more["add_generation_prompt"] = add_generation_prompt
        rendered = [template.render(cast(Sequence[Message], one), **more) for one in many]
        # The template writes the special tokens itself.
        prompts = [self._codec.encode(text, False) for text in rendered]
        return self.generate(prompts, sampling_params, use_tqdm)

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
        groups = self._groups(prompts, sampling_params, priority, cache_salt)
        for group in groups:
            if group.job.params.num_sequences > group.job.params.n:
                raise InputError(
                    f"best_of={group.job.params.best_of} cannot be streamed: the best are known at the end"
                )
        for update in run_groups(groups[0].core, groups) if groups else ():
            reason = update.request.finish_reason if update.is_last else None
            yield StreamChunk(update.index, update.text, update.token, reason, update.sequence)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, best first, as transformers' `generate(num_beams=...)` has them.

        Raises InputError as `generate`.
        """
        core = self._engine_core()
        texts, ids = self._encode(prompts)
        for prompt in ids:
            core.check(prompt, SamplingParams(max_tokens=params.max_tokens))
            if len(prompt) + params.max_tokens > self.max_model_len:
                raise InputError(
                    f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} are more than "
                    f"max_model_len={self.max_model_len}"
                )
        outputs = []
        for text, prompt in zip(texts, ids, strict=True):
            beams = PagedBeams(core.program, prompt, params, core.eos_token_ids).run()
            sequences = (
                BeamSearchSequence(b.tokens, self._codec.decode(b.tokens) if self._codec else "", b.score)
                for b in beams
            )
            outputs.append(BeamSearchOutput(text, tuple(prompt), tuple(sequences)))
        return outputs

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` takes where no parameters are given: those of the model's generation configuration.

        A program file has none. Raises OptionError for values that the configuration should not have.
        """
        return SamplingParams(**self._engine.info.sampling_defaults) if self._engine is not None else SamplingParams()

    def get_metrics(self) -> Metrics:
        """What the engine has counted since it was made, and how many requests it has now."""
        return self._engine_core(fresh=False).metrics()

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

    # ---- requests --------------------------------------------------------------------------------------------------

    def _encode(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        """Texts, where given, and token ids."""
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
        return texts, ids

    def _groups(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        cache_salt: str | None,
    ) -> list[SequenceGroup]:
        """One group for each prompt, all of them checked."""
        texts, ids = self._encode(prompts)
        params = sampling_params or self.get_default_sampling_params()
        many = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(many) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(many)} sampling parameters")
        if priority is not None and len(priority) != len(ids):
            raise InputError(f"{len(ids)} prompts but {len(priority)} priorities")
        if any(p.stop for p in many) and self._codec is None:
            raise InputError("stop strings need a tokenizer; use stop_token_ids, or pass a tokenizer to LLM")
        if not ids:
            return []
        core = self._engine_core()
        if self._constraints is None:
            self._constraints = ConstraintCompiler(core.vocab_size, core.eos_token_ids, self._codec)
        compiled = {id(p): self._constraints.compile(p) for p in many}
        ranks = priority or [0] * len(ids)
        return [
            SequenceGroup(
                core,
                Job(
                    prompt,
                    param,
                    text,
                    self._codec,
                    compiled[id(param)],
                    priority=rank,
                    cache_salt=cache_salt,
                ),
            )
            for text, prompt, param, rank in zip(texts, ids, many, ranks, strict=True)
        ]

    def _engine_core(self, fresh: bool = True) -> EngineCore:
        """The engine; `fresh` looks whether the weights have changed."""
        if self._engine is not None:
            return self._engine.core(fresh)
        if self._core is None:
            info = self._program_info
            self._core = EngineCore(info.program, info, self.options, self.max_model_len)
        return self._core


__all__ = ["LLM", "BeamSearchOutput", "CompletionOutput", "Prompt", "RequestOutput", "StreamChunk"]
