"""A model made ready to serve, with its tokenizer and its engine: what `LLM` and `AsyncLLM` stand on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmopt.compiler.errors import InputError
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.huggingface import load_model, load_tokenizer
from llmopt.runtime.adapters import LoRARequest
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.program_file import LoadedProgram, load_program, save_program
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.step_program import StepProgram
from llmopt.runtime.text import TextCodec

if TYPE_CHECKING:
    from llmopt.engine import ModelEngine

# Options that shape the compiled program; the others are about running it.
_DECIDED_AT_EXPORT = frozenset(
    {"dtype", "block_size", "kv_cache_dtype", "batch_invariant", "enable_lora", "max_loras", "max_lora_rank"}
    | {"enable_prompt_embeds", "disabled_passes", "fuel", "verify", "fallback"}
)


class ServedModel:
    """A module, a Hugging Face folder or a program file, with what it takes to run requests on it.

    Arguments and errors as `LLM`.

    Attributes: `options`, `report` (what compilation did), `tokenizer` as it was given, and `codec`, which encodes and
    decodes with it; both None without one.
    """

    def __init__(self, model: torch.nn.Module | str | Path, tokenizer: Any = None, **options: Any) -> None:
        self.options = Options.make(options)
        self.report = Report()
        self._engine: ModelEngine | None = None
        self._loaded: LoadedProgram | None = None
        self._core: EngineCore | None = None
        self._lock = threading.Lock()
        if isinstance(model, str | Path) and Path(model).is_file():
            for name in _DECIDED_AT_EXPORT & options.keys():
                raise InputError(f"{name}={options[name]!r} was decided when {model} was exported and cannot be set")
            self._loaded = load_program(model, self.options.threads, self.options.huge_pages)
            tokenizer = tokenizer or self._loaded.tokenizer
        else:
            source: Callable[[], torch.nn.Module] | None = None
            if isinstance(model, str | Path):
                tokenizer = tokenizer or load_tokenizer(model)
                source = functools.partial(load_model, model, self.options.torch_dtype)
                model = source()
            elif model.training:
                raise InputError(f"this {type(model).__name__} is in training mode; call model.eval() first")
            elif self.options.torch_dtype is not None:
                model = model.to(self.options.torch_dtype)
            # Compiling needs Dynamo; running a program file does not.
            from llmopt.engine import ModelEngine

            self._engine = ModelEngine(model, self.options, self.report, source=source)
        self.tokenizer = tokenizer
        self.codec = TextCodec(tokenizer) if tokenizer is not None else None

    @property
    def _program_info(self) -> LoadedProgram:
        if self._loaded is None:
            raise InputError("this was made from a model, not from a program file")
        return self._loaded

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt included."""
        if self._engine is not None:
            return self._engine.max_model_len
        limit, own = self.options.max_model_len, self._program_info.max_model_len
        return min(limit, own) if limit else own

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._engine.info.vocab_size if self._engine is not None else self._program_info.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self._engine.info.eos_token_ids if self._engine is not None else self._program_info.eos_token_ids

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation configuration says; see `LLM.get_default_sampling_params`."""
        return SamplingParams(**self._engine.info.sampling_defaults) if self._engine is not None else SamplingParams()

    def core(self, fresh: bool = True) -> EngineCore:
        """The engine, compiled when first asked for; `fresh` looks whether the weights have changed."""
        if self._engine is not None:
            return self._engine.core(fresh)
        with self._lock:
            if self._core is None:
                info = self._program_info
                self._core = EngineCore(info.program, info, self.options, self.max_model_len)
            return self._core

    def module_name(self) -> str | None:
        """The class of the module, None for a program file."""
        return type(self._engine.info.module).__name__ if self._engine is not None else None

    def add_lora(self, request: LoRARequest) -> bool:
        """See `LLM.add_lora`."""
        core, known = self.core(fresh=False), self.list_loras()
        core.adapter(request)
        return request.lora_name not in known

    def remove_lora(self, name: str) -> bool:
        """See `LLM.remove_lora`."""
        adapters = self.core(fresh=False).adapters
        return adapters is not None and adapters.remove(name)

    def list_loras(self) -> set[str]:
        """See `LLM.list_loras`."""
        adapters = self.core(fresh=False).adapters
        return adapters.names if adapters is not None else set()

    def export(self, path: str | Path) -> None:
        """See `LLM.export`."""
        if self._engine is None:
            raise InputError("this LLM was loaded from a program file already")
        program = self._engine.program()
        info = self._engine.info
        save_program(
            path,
            program,
            vocab_size=info.vocab_size,
            max_model_len=self._engine.max_model_len,
            eos_token_ids=info.eos_token_ids,
            tokenizer=self.codec.to_json() if self.codec is not None else None,
            costs=self._costs(program),
        )

    def _costs(self, program: StepProgram) -> list[Any] | None:
        """What the steps of the program cost, as a program file keeps it."""
        from llmopt.explaining.details import kept_costs

        graphs = (graph for graph in self.report.graphs if graph.program is not None and graph.program() is program)
        details = next((graph.details for graph in graphs), None)
        return kept_costs(program.program, details) if details is not None else None
