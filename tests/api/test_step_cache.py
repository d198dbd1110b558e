"""Step programs that an earlier process compiled from the same folder: the same bits; another entry otherwise."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models.adapters import make_adapter
from models.target import FOLDER
from models.zoo import ZOO, build, cases
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaAttention

import llmopt
from llmopt import engine, graph_cache, graph_key, step_cache
from llmopt.codegen import program_json
from llmopt.codegen.cpu import object_cache
from llmopt.compiler.options import Options
from llmopt.graph_key import step_key
from llmopt.huggingface import load_model

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12]]
GREEDY = llmopt.SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def prefix(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the entries of a test, which begins with none, in a cache that keeps its kernels for other tests."""
    found = f"test-{secrets.token_hex(8)}-"
    monkeypatch.setenv("LLMOPT_GRAPH_CACHE", "1")
    monkeypatch.setattr(graph_cache, "_file", lambda key: f"{found}{key}.graph")
    yield found
    for file in entries(found):
        file.unlink()


def entries(prefix: str) -> list[Path]:
    return sorted(object_cache.cache_folder().glob(f"{prefix}*"))


def save(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder)
    shutil.copy(FOLDER / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


class Compiled(NamedTuple):
    """What the first process made of a folder: its LLM, which has answered, and the entry that it left."""

    llm: llmopt.LLM
    answers: list[Any]
    key: str
    entry: bytes


@pytest.fixture(scope="module")
def compiled(llama: Path) -> Compiled:
    """Of `llama`, for the tests that need an entry to begin with."""
    prefix = f"test-{secrets.token_hex(8)}-"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPT_GRAPH_CACHE", "1")
        patch.setattr(graph_cache, "_file", lambda key: f"{prefix}{key}.graph")
        llm = llmopt.LLM(llama)
        found = answers(llm)
    assert not llm.report.graphs[0].from_cache
    (file,) = entries(prefix)
    content = object_cache.read(file.name) or b""
    file.unlink()
    return Compiled(llm, found, file.name.removeprefix(prefix).removesuffix(".graph"), content)


@pytest.fixture
def kept(compiled: Compiled, prefix: str) -> Compiled:
    """The same, with its entry in the test's cache."""
    object_cache.write(f"{prefix}{compiled.key}.graph", compiled.entry)
    return compiled


def answers(llm: llmopt.LLM, **more: Any) -> list[Any]:
    """Tokens and log probabilities, which are equal only where the logits are."""
    outputs = llm.generate(PROMPTS, GREEDY, **more)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


def compiles_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "trace_forward", lambda *_, **__: pytest.fail("captured again"))


# Plain, weights in another layout, windowed layers besides full ones, experts, and what options make of a step.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
    "int8 cache": ("llama", {"kv_cache_dtype": "int8", "block_size": 8}),
    "batch invariant": ("llama", {"batch_invariant": True}),
}


@pytest.mark.parametrize("case", cases(CASES, "gemma2", "int8 cache"))
def test_a_second_process_compiles_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = CASES[case]
    folder = save(name, tmp_path / name)
    first = llmopt.LLM(folder, **options)
    expected = answers(first)
    with monkeypatch.context() as patch:
        compiles_nothing(patch)
        second = llmopt.LLM(folder, **options)
        assert answers(second) == expected
    (fresh,), (kept,) = first.report.graphs, second.report.graphs
    assert kept.from_cache and not fresh.from_cache
    assert kept.kind == "step" and "taken from the cache" in str(second.report)
    assert (kept.inputs, kept.kernels, kept.batch_invariant) == (fresh.inputs, fresh.kernels, fresh.batch_invariant)
    assert [(p.name, p.matched, p.skipped) for p in kept.passes] == [
        (p.name, p.matched, p.skipped) for p in fresh.passes
    ]


def test_adapters_come_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "adapter", build("llama"), ("q_proj", "down_proj"))
    request = llmopt.LoRARequest("a", tmp_path / "adapter")
    first = llmopt.LLM(llama, enable_lora=True)
    expected = answers(first, lora_request=[request, None])
    compiles_nothing(monkeypatch)
    assert answers(llmopt.LLM(llama, enable_lora=True), lora_request=[request, None]) == expected


def test_weights_are_those_of_the_folder(llama: Path, kept: Compiled, tmp_path: Path) -> None:
    """Nothing of them is kept: a folder whose weights were replaced is served by the same program."""
    file, before = llama / "model.safetensors", tmp_path / "before"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    others = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    file.rename(before)  # another LLM has it mapped
    try:
        save_file(others, file, {"format": "pt"})
        expected = answers(llmopt.LLM(llama, graph_cache=False))
        llm = llmopt.LLM(llama)
        assert answers(llm) == expected != kept.answers
    finally:
        before.replace(file)
    assert llm.report.graphs[0].from_cache


def test_an_export_from_the_cache_is_the_same(llama: Path, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        llmopt.export(llama, tmp_path / name)
        with safe_open(tmp_path / name, framework="pt") as file:
            written.append((file.metadata(), {tensor: file.get_tensor(tensor) for tensor in sorted(file.keys())}))
    (description, weights), (again, others) = written
    assert description == again and weights.keys() == others.keys()
    assert all(torch.equal(weights[tensor], others[tensor]) for tensor in weights)


def test_details_are_worked_out_by_compiling(llama: Path, kept: Compiled) -> None:
    second = llmopt.LLM(llama)
    answers(second)
    (fresh,), (again,) = kept.llm.report.graphs, second.report.graphs
    assert again.from_cache and again.details is not None and fresh.details is not None
    assert [(c.origin, c.cost.flops) for c in again.details.calls] == [
        (c.origin, c.cost.flops) for c in fresh.details.calls
    ]
    program = again.program() if again.program is not None else None
    assert program is not None and len(program.program.steps) == len(again.details.calls)


def key(folder: Path, **options: Any) -> str | None:
    model = load_model(folder, None)
    return step_key(model, 127, Options.make(options))


CONFIGS: dict[str, dict[str, Any]] = {
    "number": {"rms_norm_eps": 1e-3},
    "activation": {"hidden_act": "gelu"},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "attention": {"_attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_another_configuration_has_another_key(name: str, llama: Path, tmp_path: Path) -> None:
    model = load_model(llama, None)
    changed = type(model.config)(**{**model.config.to_dict(), **CONFIGS[name]})  # type: ignore[operator]
    if "_attn_implementation" in CONFIGS[name]:
        changed._attn_implementation = "eager"
    other = type(model)(changed).eval()
    same = type(model)(model.config).eval()
    options = Options.make()
    assert step_key(same, 127, options) == step_key(type(model)(model.config).eval(), 127, options)
    assert step_key(other, 127, options) != step_key(same, 127, options)


def test_weights_are_part_of_the_key(llama: Path) -> None:
    def keyed(change: Callable[[Any], object]) -> str | None:
        model = load_model(llama, None)
        change(model)
        return step_key(model, 127, Options.make())

    changes: list[Callable[[Any], object]] = [
        lambda model: None,
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.detach().clone().t())),
        lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
        lambda model: model.requires_grad_(False),
    ]
    assert len({keyed(change) for change in changes}) == len(changes)


def test_options_and_circumstances_are_part_of_the_key(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(llama, None)

    def keyed(length: int = 127, **options: Any) -> str | None:
        return step_key(model, length, Options.make(options))

    found = [keyed(), keyed(63), keyed(block_size=8), keyed(kv_cache_dtype="int8"), keyed(batch_invariant=True)]
    found += [keyed(enable_lora=True), keyed(enable_lora=True, max_loras=2), keyed(disabled_passes=("merge_linears",))]
    assert keyed(threads=1, max_num_seqs=3, max_model_len=17) == found[0]  # of running, not of compiling
    for owner, name, value in (
        (torch, "__version__", "0.1"),
        (graph_key, "_transformers_version", lambda: "0.1"),
        (graph_key, "_own_sources", lambda: "changed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(keyed())
    with monkeypatch.context() as patch:
        level = type("Level", (), {"name": "another"})()
        patch.setattr(graph_key, "host_level", lambda: level)
        found.append(keyed())
    assert None not in found and len(set(found)) == len(found)


def test_a_patched_class_is_compiled(llama: Path, kept: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaAttention.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, weights = original(self, *args, **kwargs)
        return result * 2, weights

    monkeypatch.setattr(LlamaAttention, "forward", doubled)
    llm = llmopt.LLM(llama)
    patched = answers(llm)
    assert patched != kept.answers and not llm.report.graphs[0].from_cache


@pytest.mark.parametrize(
    "options",
    [{"graph_cache": False}, {"record_graphs": True}, {"verify": True}, {"fuel": 3}, {"rewrite_log": "log"}],
    ids=lambda options: next(iter(options)),
)
def test_who_watches_the_compilation_gets_one(options: dict[str, Any], llama: Path) -> None:
    assert key(llama, **options) is None


def test_a_caller_s_module_is_not_kept(prefix: str) -> None:
    answers(llmopt.LLM(build("llama")))
    assert not entries(prefix)


DAMAGE: list[tuple[tuple[str, ...], Any]] = [
    (("more", "caches"), [["os.system", 1]]),
    (("more", "caches"), None),
    (("more", "lora"), {"targets": 3}),
    (("more", "lora"), [1]),
    (("more", "sources"), ["nowhere"]),
    (("more", "sources"), [99]),
    (("more", "sources"), [{}]),
    (("more", "sources"), None),
    (("more",), {}),
    (("more",), None),
    (("program", "steps"), [["os.system", 1]]),
    (("weights", "calls"), [["os.system.default", [], {}]]),
]


def test_an_entry_of_foreign_content_is_compiled_again(
    llama: Path, kept: Compiled, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    (entry,) = entries(prefix)
    name = kept.key
    weights = dict(load_model(llama, None).named_parameters(remove_duplicate=False))
    buffers = dict(load_model(llama, None).named_buffers())
    whole = kept.entry
    names = {**weights, **buffers}.keys()
    assert step_cache.find(name, names) is not None
    assert step_cache.find(name, set()) is None  # a model without such weights
    for path, foreign in DAMAGE:
        data = json.loads(whole)
        place = data
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = foreign
        object_cache.write(entry.name, json.dumps(data).encode())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = step_cache.find(name, names)
        assert found is None and "cannot be used" in caplog.text, (path, foreign)
    data = json.loads(whole)
    data["more"]["caches"] = None
    object_cache.write(entry.name, json.dumps(data).encode())
    llm = llmopt.LLM(llama)
    answers(llm)
    assert not llm.report.graphs[0].from_cache
    assert step_cache.find(name, names) is not None  # it was written anew


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_comes_back_from_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(name, tmp_path)
    first = llmopt.LLM(folder)
    expected = answers(first)
    compiles_nothing(monkeypatch)
    second = llmopt.LLM(folder)
    assert answers(second) == expected
    programs = [program_json.to_json(llm._model.core().program.program) for llm in (first, second)]
    assert programs[0] == programs[1]
