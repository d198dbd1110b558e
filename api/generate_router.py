"""Sends `model.generate` to the step program when that gives exactly what transformers would give, and says why not."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from llmopt.compiled_forward import named_like
from llmopt.compiler.errors import ToolchainError, UnsupportedError
from llmopt.generate_plan import Plan, plan_generate
from llmopt.huggingface import with_field
from llmopt.paged_forward import PagedCache, cache_name, with_paged_forward, without_other_cache
from llmopt.runtime.generation import Job, run_jobs
from llmopt.runtime.memory import device_memory
from llmopt.runtime.paged_rows import PagedRows
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.step_program import StepProgram

if TYPE_CHECKING:
    from llmopt.optimization import OptimizedState

log = logging.getLogger(__name__)


class GenerateRouter:
    """`generate` of an optimized transformers model."""

    def __init__(self, model: torch.nn.Module, state: OptimizedState) -> None:
        self._model: Any = model
        self._state = state
        self._original: Any = model.generate
        named_like(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`.

        Plain greedy search over token ids runs in the engine. Where tokens are chosen in another way, transformers'
        own decoding loop runs over the step program. Everything else is as before, with the compiled forward.
        """
        try:
            found = self._plan(args, kwargs)
        except (UnsupportedError, ToolchainError) as error:
            log.warning("generate runs in transformers with the compiled forward: %s", error)
            found = str(error)
        if isinstance(found, str):
            self._state.report.note(f"generate runs in transformers with the compiled forward: {found}")
            return self._original(*args, **kwargs)
        plan, program = found
        if plan.loop is None:
            return self._in_engine(plan)
        self._state.report.note(f"generate runs in transformers' decoding loop over the step program: {plan.loop}")
        return self._in_loop(plan, program, args, kwargs)

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, StepProgram] | str:
        """How the step program serves a call, and the program with the present weights; or why it cannot."""
        if any(argument is not None for argument in args[1:]):
            return "positional arguments beyond the input ids"
        named = {"inputs": args[0], **kwargs} if args else kwargs
        engine = self._state.engine()
        plan = plan_generate(self._model, named, engine.max_model_len)
        if isinstance(plan, str):
            return plan
        # Compiled here, where a model that takes no embeddings still goes to transformers.
        program = engine.program(prompt_embeds=plan.embeddings)
        return self._refusal(plan, program) or (plan, program)

    def _refusal(self, plan: Plan, program: StepProgram) -> str | None:
        """Why the step program cannot serve a plan."""
        owner = next(cls for cls in type(self._model).__mro__ if "generate" in vars(cls))
        bound = getattr(self._original, "__func__", None)
        if owner.__name__ != "GenerationMixin" or bound is not vars(owner)["generate"]:
            return "generate is not transformers' own"
        if plan.loop is None:
            return None
        if cache_name(self._model) is None:
            return f"the forward takes no cache; {plan.loop}"
        if hasattr(self._model, "_reorder_cache"):
            return f"the model reorders its cache itself; {plan.loop}"
        options = self._state.options
        available = device_memory(program.executable.device)
        budget = options.kv_cache_memory_bytes or int(available * options.gpu_memory_utilization)
        lengths = [len(prompt) for prompt in plan.prompts]
        blocks = PagedRows.blocks_needed(lengths, plan.rows_per_prompt, plan.new_tokens, program.block_size)
        needed = blocks * program.bytes_per_block()
        return f"a KV cache of {needed} bytes, with room for {budget}" if needed > budget else None

    def _in_engine(self, plan: Plan) -> torch.Tensor:
        params = SamplingParams(
            temperature=0.0, max_tokens=plan.new_tokens, stop_token_ids=plan.eos_ids, ignore_eos=True
        )
        rows: list[list[int]] = [[] for _ in plan.prompts]
        jobs = [Job(prompt, params) for prompt in plan.prompts]
        with contextlib.closing(run_jobs(self._state.engine().core(), jobs)) as updates:
            for update in updates:
                if update.request.error is not None:
                    raise update.request.error
                if update.is_last:
                    rows[update.index] = update.request.generated
        ids = plan.ids
        new = torch.full((len(rows), max(map(len, rows))), plan.pad, dtype=ids.dtype)
        for row, tokens in enumerate(rows):
            new[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
        return torch.cat([ids, new.to(ids.device)], 1)

    def _in_loop(self, plan: Plan, program: StepProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = cache_name(self._model) or ""
        twin = with_paged_forward(self._model, self._model.forward, name)
        chunk = self._state.options.max_num_batched_tokens
        cache = PagedCache(program, plan.rows_per_prompt, plan.new_tokens, chunk)
        found = type(self._model).generate(twin, *args, **without_other_cache(kwargs), **{name: cache})
        return found if isinstance(found, torch.Tensor) else with_field(found, name, cache.to_dynamic(self._model))
