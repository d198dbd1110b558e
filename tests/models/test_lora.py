"""Several adapters and none in one batch: a request's tokens are those of a model with its adapter merged by hand."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import Folder, make_adapter, merged
from models.zoo import build, cases, eager_logits, greedy, prompts
from safetensors import safe_open
from safetensors.torch import save_file

import llmopt
from llmopt import LLM, BeamSearchParams, LoRARequest, SamplingParams
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report
from llmopt.engine import ModelEngine
from llmopt.errors import AdapterError, InputError, ProgramFileError
from llmopt.runtime import program_file
from llmopt.runtime.adapters import Adapter
from llmopt.runtime.engine_core import EngineCore
from llmopt.runtime.request import Request

TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS)
FLOAT_TOLERANCE = 2e-4
# Layers by the ends of their names: all, the attention's, and two that merged products hold beside others.
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("_proj",), ("o_proj", "k_proj"), ("q_proj", "up_proj", "lm_head")),
    "qwen2": (("_proj",), ("o_proj", "k_proj"), ("v_proj", "gate_proj")),
    "gpt2": (("c_attn", "c_proj", "c_fc"), ("c_attn",), ("mlp.c_proj", "lm_head")),
    "mixtral": (("_proj",), ("o_proj",), ("q_proj", "v_proj")),
}
CASES = cases(LAYERS, "llama", "gpt2")


SETTINGS: dict[str, Any] = {"block_size": 4, "fallback": "error", "max_model_len": 128}
ADAPTED: dict[str, Any] = {**SETTINGS, "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


@functools.cache
def llm() -> LLM:
    """The LLM over `engine_of("llama")`."""
    return LLM(build("llama"), **ADAPTED)


@functools.cache
def plain_llm() -> LLM:
    """A Llama without the option."""
    return LLM(build("llama"), **SETTINGS)


@functools.cache
def engine_of(name: str, **options: Any) -> ModelEngine:
    """One compiled program for all tests; its cores differ."""
    if name == "llama" and not options:
        return engine_in(llm())
    return ModelEngine(build(name), Options.make({**ADAPTED, **options}), Report())


def engine_in(model: LLM) -> ModelEngine:
    engine = model._model._engine
    assert engine is not None
    return engine


def core_of(name: str, num_blocks: int = 0, **options: Any) -> EngineCore:
    """An engine over pages full of NaN, on a program whose slots hold NaN behind each adapter's rank."""
    engine = engine_of(name)
    program = engine.program()
    if num_blocks:
        options["kv_cache_memory_bytes"] = num_blocks * program.bytes_per_block()
    core = EngineCore(program, engine.info, Options.make({"block_size": 4, **options}), 128)
    for tensor in core.cache.tensors:
        tensor.fill_(float("nan"))
    assert program.adapters is not None
    program.adapters.tensors[0].fill_(float("nan"))
    program.adapters._held = [None] * program.adapters.spec.max_loras
    return core


@functools.cache
def folders(name: str, root: Path) -> tuple[Folder, ...]:
    """Three adapters of different ranks, layers and ways to scale."""
    model = build(name)
    every, some, others = LAYERS[name]
    return (
        make_adapter(root / "every", model, every, rank=8, alpha=16, seed=1),
        make_adapter(root / "some", model, some, rank=3, alpha=2, seed=2, use_rslora=True, fan_in_fan_out=True),
        make_adapter(
            root / "others", model, others, rank=4, seed=3, ranks={others[0]: 2}, alpha_pattern={others[0]: 5.0}
        ),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def adapters(core: EngineCore, name: str, root: Path) -> list[Adapter | None]:
    requests = [LoRARequest(folder.path.name, folder.path) for folder in folders(name, root / name)]
    return [*map(core.adapter, requests), None]


@functools.cache
def model_with(name: str, root: Path, number: int) -> Any:
    """With adapter `number` merged; 3 is the model as it is."""
    return build(name) if number == 3 else merged(build(name), folders(name, root / name)[number])


@functools.cache
def wanted(name: str, root: Path, number: int, row: tuple[int, ...], count: int = TOKENS) -> list[int]:
    return greedy(model_with(name, root, number), row, count)


def finish(core: EngineCore) -> None:
    while core.has_unfinished:
        core.step()
        core.scheduler.check_books()
    assert core.cache.pool.num_held == 0


@pytest.mark.parametrize("name", CASES)
def test_random_arrivals_and_preemption(name: str, root: Path) -> None:
    """Three adapters and none; chunks of prompts beside decodes, in a pool that is too small."""
    generator = torch.Generator().manual_seed(3)
    rows = prompts([1, 40, 17, 5, 30, 9, 22, 3], seed=5)
    core = core_of(name, 30, max_num_batched_tokens=16, max_num_seqs=4)
    known, requests = adapters(core, name, root), []
    for number, row in enumerate(rows):
        requests.append(core.add_request(row, GREEDY, adapter=known[number % 4]))
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            core.step()
    core.scheduler.preempt(core.scheduler.running[-1])
    finish(core)
    results = [request.generated for request in requests]
    assert results == [wanted(name, root, number % 4, tuple(row)) for number, row in enumerate(rows)]
    assert core.metrics().num_preemptions > 0
    # The comparison can fail: no adapter's tokens are the model's own.
    assert all(results[n] != wanted(name, root, 3, tuple(rows[n])) for n in (0, 1, 2))
    assert engine_of(name).report.graphs[0].fallbacks == []


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, root: Path) -> None:
    """A prompt's logits under each adapter, with the others in the same batch: within the tolerance of float32."""
    core = core_of(name)
    row = prompts([33], seed=8)[0]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    requests = [core.add_request(row, params, adapter=adapter) for adapter in adapters(core, name, root)]
    finish(core)
    for number, request in enumerate(requests):
        logits = eager_logits(model_with(name, root, number), row).log_softmax(-1)
        expected = logits[:-1].gather(1, torch.tensor(row[1:])[:, None]).flatten()
        mine = torch.tensor([next(iter(entry.top_logprobs.values())) for entry in request.prompt_logprobs])
        torch.testing.assert_close(mine, expected, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE)


def test_more_adapters_than_slots(root: Path) -> None:
    """Six adapters and none on three slots: all are served, slots change hands, and one that is used is not taken."""
    core = core_of("llama", max_num_seqs=6)
    model, rows = build("llama"), prompts([9, 3, 14, 6, 11, 2, 7] * 3, seed=4)
    made = [make_adapter(root / f"more{i}", model, ("q_proj", "down_proj"), seed=10 + i) for i in range(6)]
    known: list[Adapter | None] = [core.adapter(LoRARequest(f"more{i}", folder.path)) for i, folder in enumerate(made)]
    assert core.program.adapters is not None
    before = core.program.adapters.num_loads
    requests = [core.add_request(row, GREEDY, adapter=[*known, None][n % 7]) for n, row in enumerate(rows)]
    used = 0
    while core.has_unfinished:
        core.step()
        core.scheduler.check_books()
        used = max(used, len({r.adapter for r in core.scheduler.running if r.adapter is not None}))
    assert used == 3 and core.program.adapters.num_loads - before > 6
    models = [*(merged(model, folder) for folder in made), model]
    for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
        assert request.generated == greedy(models[number % 7], row, TOKENS), number


def test_who_waits_for_a_slot_is_overtaken_by_those_who_need_none(root: Path) -> None:
    core = core_of("llama", max_num_seqs=6)
    made = [make_adapter(root / f"wait{i}", build("llama"), ("q_proj",), seed=20 + i) for i in range(4)]
    known = [core.adapter(LoRARequest(f"wait{i}", folder.path)) for i, folder in enumerate(made)]
    (row,) = prompts([5])
    first = [core.add_request(row, GREEDY, adapter=adapter) for adapter in known]
    again, base = core.add_request(row, GREEDY, adapter=known[0]), core.add_request(row, GREEDY)
    core.step()
    running = core.scheduler.running
    assert [r in running for r in first] == [True, True, True, False]
    assert base in running
    assert again not in running, "it would keep the slots busy for ever"
    finish(core)


def test_prefixes_are_shared_within_an_adapter_only(root: Path) -> None:
    core = core_of("llama")
    known = adapters(core, "llama", root)
    (row,) = prompts([30])
    for number, adapter in [(0, known[0]), (1, known[1]), (3, None)]:
        for hits in (0, 28):
            request = core.add_request(row, GREEDY, adapter=adapter)
            finish(core)
            assert request.num_hit == hits
            assert request.generated == wanted("llama", root, number, tuple(row))


def test_continuations_of_one_prompt_share_its_adapter(root: Path) -> None:
    core = core_of("llama")
    adapter = adapters(core, "llama", root)[0]
    (row,) = prompts([30])
    parent = core.add_request(row, GREEDY, adapter=adapter)
    while not parent.num_generated:
        core.step()
    child = core.fork(parent, stream=1)
    finish(core)
    assert parent.generated == child.generated == wanted("llama", root, 0, tuple(row))


def test_a_request_without_an_adapter_has_the_bits_of_a_model_without_adapters(root: Path) -> None:
    """Llama's products are what they are without the option: adapters leave such rows alone."""
    rows = prompts([33, 7, 12], seed=2)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)

    def probabilities(core: EngineCore, used: Sequence[Adapter | None]) -> Request:
        requests = [core.add_request(row, params, adapter=a) for row, a in zip(rows, used, strict=True)]
        finish(core)
        return requests[0]

    plain = engine_in(plain_llm())
    alone = probabilities(EngineCore(plain.program(), plain.info, plain.options, 128), [None] * 3)
    core = core_of("llama")
    known = adapters(core, "llama", root)
    mixed = probabilities(core, [None, known[0], known[1]])
    assert mixed.generated == alone.generated and mixed.logprobs == alone.logprobs
    assert plain.program().adapters is None
    assert not any("lora" in kernel.template for kernel in plain.program().program.kernels)


def test_batch_invariance(root: Path) -> None:
    """With `batch_invariant` a request's log probabilities are the same bits alone and among others."""
    engine = engine_of("llama", batch_invariant=True)
    core = EngineCore(engine.program(), engine.info, Options.make({"block_size": 4}), 128)
    known, rows = adapters(core, "llama", root), prompts([70, 9, 40, 3], seed=6)
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2)
    together = [core.add_request(row, params, adapter=a) for row, a in zip(rows, known, strict=True)]
    finish(core)
    for row, adapter, other in zip(rows, known, together, strict=True):
        core.reset_prefix_cache()
        alone = core.add_request(row, params, adapter=adapter)
        finish(core)
        assert (alone.generated, alone.logprobs) == (other.generated, other.logprobs)


# ---- LLM -----------------------------------------------------------------------------------------------------------


def test_llm(root: Path, tmp_path: Path) -> None:
    """Names, lists, streams, changed files, and a program file with places for adapters."""
    model, made = llm(), folders("llama", root / "llama")
    requests = [LoRARequest(folder.path.name, str(folder.path)) for folder in made]
    rows = prompts([20, 7, 12, 9], seed=1)
    expected = [wanted("llama", root, number, tuple(row)) for number, row in enumerate(rows)]
    assert model.add_lora(requests[0]) and not model.add_lora(requests[0])
    assert model.list_loras() == {"every"}
    outputs = model.generate(rows, GREEDY, lora_request=[*requests, None])
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert model.list_loras() == {"every", "some", "others"}
    streamed = [chunk.token_id for chunk in model.stream(rows[1], GREEDY, lora_request=requests[1])]
    assert streamed == expected[1]
    assert model.remove_lora("some") and not model.remove_lora("some")
    assert model.list_loras() == {"every", "others"}

    path = tmp_path / "model.engine"
    llmopt.export(model, path)
    again = llmopt.load(path)
    outputs = again.generate(rows, GREEDY, lora_request=[*requests, None])
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    with pytest.raises(InputError, match="max_loras=8 was decided"):
        LLM(path, max_loras=8)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[program_file.DESCRIPTION])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    for change in ({"max_rank": 7}, {"max_loras": 0}, {"targets": [["a", 1, -1]]}, {"targets": {}}, {"dtype": "int64"}):
        changed = json.dumps({**described, "lora": {**described["lora"], **change}})
        digest = hashlib.sha256(changed.encode()).hexdigest()
        save_file(tensors, tmp_path / "bad", {program_file.DESCRIPTION: changed, program_file.CHECKSUM: digest})
        with pytest.raises(ProgramFileError):
            llmopt.load(tmp_path / "bad")

    # The same name, other files: read again, and nothing of the old keys and values is used.
    folder = tmp_path / "changing"
    shutil.copytree(made[0].path, folder)
    changing = LoRARequest("changing", folder)
    first = again.generate(rows[0], GREEDY, lora_request=changing)[0]
    assert list(first.outputs[0].token_ids) == expected[0]
    for file in made[1].path.iterdir():
        shutil.copy(file, folder / file.name)
    second = again.generate(rows[0], GREEDY, lora_request=changing)[0]
    assert second.num_cached_tokens == 0
    assert list(second.outputs[0].token_ids) == wanted("llama", root, 1, tuple(rows[0]))

    with pytest.raises(AdapterError, match="'changing' is the adapter in"):
        again.add_lora(LoRARequest("changing", made[0].path))
    with pytest.raises(InputError, match="4 prompts but 2 LoRA requests"):
        again.generate(rows, GREEDY, lora_request=requests[:2])
    with pytest.raises(InputError, match="must be a LoRARequest"):
        again.generate(rows[0], GREEDY, lora_request=["every"])  # type: ignore[list-item]
    with pytest.raises(AdapterError, match="no folder of a PEFT adapter"):
        again.generate(rows[0], GREEDY, lora_request=LoRARequest("missing", tmp_path / "nowhere"))


def test_beams(root: Path) -> None:
    """Those of transformers on the merged model, also while others hold all slots; none without an adapter."""
    model, rows = llm(), prompts([20, 7, 12, 9], seed=1)
    requests = [LoRARequest(folder.path.name, folder.path) for folder in folders("llama", root / "llama")]
    params = BeamSearchParams(beam_width=3, max_tokens=TOKENS)
    held = [model.stream(row, GREEDY, lora_request=each) for row, each in zip(rows, requests, strict=False)]
    first = [next(chunks).token_id for chunks in held]
    core = model._engine_core(fresh=False)
    assert len(core.scheduler.running) == 3
    outputs = model.beam_search(rows, params, lora_request=[*requests, None])
    for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        ids = torch.tensor([row])
        found = model_with("llama", root, number).generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=TOKENS, do_sample=False
        )
        tokens = list(output.sequences[0].token_ids)
        assert tokens == found[0, len(row) :].tolist()[: len(tokens)]
    assert len({output.sequences[0].token_ids for output in model.beam_search([rows[0]] * 4, params)}) == 1
    for number, (token, chunks) in enumerate(zip(first, held, strict=True)):
        rest = [chunk.token_id for chunk in chunks]
        assert [token, *rest] == wanted("llama", root, number, tuple(rows[number])), "nobody's slot was taken"
    with pytest.raises(InputError, match="4 prompts but 2 LoRA requests"):
        model.beam_search(rows, params, lora_request=requests[:2])


def test_without_the_option() -> None:
    model = plain_llm()
    with pytest.raises(InputError, match="enable_lora=True"):
        model.generate([[1, 2]], GREEDY, lora_request=LoRARequest("name", "folder"))
    with pytest.raises(InputError, match="enable_lora=True"):
        model.beam_search([1, 2], BeamSearchParams(beam_width=2), lora_request=LoRARequest("name", "folder"))
    assert model.list_loras() == set() and not model.remove_lora("name")


@pytest.mark.parametrize(("name", "path"), [("", "folder"), (3, "folder"), ("name", 3)])
def test_what_is_no_request(name: Any, path: Any) -> None:
    with pytest.raises(InputError, match="lora_"):
        LoRARequest(name, path)


def test_experts_have_no_place_for_an_adapter(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", build("llama"), ("q_proj",))
    folder.pairs = {"model.layers.0.mlp.experts.0.w1": next(iter(folder.pairs.values()))}
    with pytest.raises(AdapterError, match=r"'model.layers.0.mlp.experts.0.w1'.*model.layers.\*.self_attn.q_proj"):
        core_of("llama").adapter(LoRARequest("a", folder.save()))
