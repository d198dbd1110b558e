"""Programs of tiny models, lowered but not compiled: what code generation emits, whatever machine it runs on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from graphs.capturing import catch, mark_weights

from llmopt.codegen.lower import lower
from llmopt.codegen.program import KernelCall, Program
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import run_pipeline
from llmopt.huggingface import describe
from llmopt.passes.pipeline import BACKEND, step_pipeline
from llmopt.runtime.executable import kernel_source
from llmopt.tracing import trace_forward

_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}


def _step(model: torch.nn.Module) -> Program:
    captured, _ = trace_forward(describe(model).forward, 255)
    mark_weights(captured)
    run_pipeline(captured.graph, step_pipeline(16), Options())
    return lower(captured.graph).program


def llama_step(layers: int, dtype: torch.dtype = torch.bfloat16) -> Program:
    """The step program of a Llama."""
    config = hf.LlamaConfig(**_LLAMA, num_hidden_layers=layers, tie_word_embeddings=True)
    return _step(hf.LlamaForCausalLM(config).eval().to(dtype))


def mixtral_step(layers: int) -> Program:
    """The step program of a mixture of experts."""
    config = hf.MixtralConfig(**_LLAMA, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    return _step(hf.MixtralForCausalLM(config).eval())


def bert_forward(layers: int) -> Program:
    """The backend's program of a BERT, at any batch size and length."""
    config = hf.BertConfig(
        vocab_size=131, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=112
    )
    model = hf.BertModel(config).eval()
    ids = torch.randint(0, 131, (3, 9))
    caught = catch(lambda ids: model(input_ids=ids).last_hidden_state, ids, dynamic=True)
    run_pipeline(caught.graph, BACKEND, Options())
    return lower(caught.graph, caught.captured.mutations).program


def sources(program: Program) -> list[str]:
    """The translation unit of each kernel."""
    return [kernel_source(spec) for spec in program.kernels]


def listing(program: Program) -> str:
    """What is emitted for a program: every kernel's source, then the steps in order."""
    lines = []
    for number, source in enumerate(sources(program)):
        lines += [f"==== kernel {number}", source.rstrip()]
    lines.append("==== steps")
    for step in program.steps:
        if isinstance(step, KernelCall):
            barrier = " |" if step.sync_after else ""
            lines.append(f"kernel {step.kernel} for {step.origin}{barrier}")
        else:
            lines.append(f"ATen {step.op}: {step.reason}")
    return "\n".join(lines) + "\n"
