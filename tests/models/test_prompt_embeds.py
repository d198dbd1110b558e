"""Prompts given as embeddings, through every door: the tokens of transformers' `generate(inputs_embeds=...)`."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs.causal_models import TinyCausal
from models.target import PROMPT, write_adapter, write_shallow
from models.zoo import VOCABULARY, build, cases, greedy, prompts
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from llmopt.compiler.options import Options
from llmopt.errors import InputError, OptionError, UnsupportedError
from llmopt.runtime.engine_core import EngineCore

NEW = 9
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
# Sizes on both sides of a page of 4 and of a chunk of 24.
LENGTHS = (1, 4, 5, 33)
NAMES = ("llama", "gemma2", "gpt2", "qwen3", "gemma3", "opt", "bloom", "gpt-neox", "phi3", "qwen3-moe")


def embeddings(name: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """`[S, H]` of random tokens, moved to where no token is."""
    generator, found = torch.Generator().manual_seed(seed), []
    embedding = build(name).get_input_embeddings()
    for row in prompts(list(lengths), seed):
        own = embedding(torch.tensor(row)).detach()
        found.append(own + 0.5 * own.std() * torch.randn(own.shape, generator=generator))
    return found


@torch.no_grad()
def expected(model: Any, rows: Tensor, new: int = NEW, **more: Any) -> list[int]:
    """What transformers generates after embeddings."""
    mask = torch.ones(1, len(rows), dtype=torch.int64)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    out = model.generate(inputs_embeds=rows[None], attention_mask=mask, **settings)
    return list(out[0].tolist())


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


@functools.cache
def llm_of(name: str) -> LLM:
    return LLM(
        build(name),
        enable_prompt_embeds=True,
        block_size=4,
        max_num_batched_tokens=24,
        max_num_seqs=4,
        fallback="error",
    )


@pytest.mark.parametrize("name", cases(NAMES, "gemma2", "gpt2"))
def test_beside_tokens_in_one_batch(name: str) -> None:
    """Gemma scales embeddings in its forward or in its embedding module, GPT-2 adds learned positions."""
    model, llm = build(name), llm_of(name)
    given, ids = embeddings(name), prompts([17, 3])
    mixed: list[Any] = [{"prompt_embeds": given[0]}, ids[0], *({"prompt_embeds": rows} for rows in given[1:])]
    outputs = llm.generate([*mixed, {"prompt_token_ids": ids[1]}], GREEDY)
    assert [tokens(outputs[i]) for i in (0, 2, 3, 4)] == [expected(model, rows) for rows in given]
    assert [tokens(outputs[i]) for i in (1, 5)] == [greedy(model, row, NEW) for row in ids]
    assert outputs[0].prompt is None and outputs[0].prompt_token_ids == ()
    assert outputs[1].prompt_token_ids == tuple(ids[0])
    assert llm._engine_core(fresh=False).program.executable.program.fallbacks == []


def test_a_tokens_own_embedding_is_the_token() -> None:
    model, llm = build("gemma2"), llm_of("gemma2")
    (row,) = prompts([21])
    given = model.get_input_embeddings()(torch.tensor([row])).detach()
    by_ids, by_embeddings = llm.generate([row, {"prompt_embeds": given}], GREEDY.replace(logprobs=3))
    assert tokens(by_ids) == tokens(by_embeddings)
    for one, other in zip(by_ids.outputs[0].logprobs or (), by_embeddings.outputs[0].logprobs or (), strict=True):
        assert {t: v.logprob for t, v in one.items()} == pytest.approx({t: v.logprob for t, v in other.items()})


@pytest.mark.parametrize("swap", [0, 1 << 22])
def test_preempted_and_taken_up_again(swap: int) -> None:
    """A pool for little more than one request: the others are computed again, or brought back from the swap space."""
    model, engine = build("llama"), llm_of("llama")._model._engine
    assert engine is not None
    options = {"block_size": 4, "max_num_batched_tokens": 24, "swap_space_bytes": swap}
    pages = {"kv_cache_memory_bytes": 50 * engine.program().bytes_per_block(), "enable_prefix_caching": False}
    core = EngineCore(engine.program(), engine.info, Options.make({**options, **pages}), 128)
    given = embeddings("llama", (66, 70, 75))
    requests = [core.add_request(rows, GREEDY.replace(max_tokens=40)) for rows in given]
    while core.has_unfinished:
        core.step()
        core.scheduler.check_books()
    assert [request.generated for request in requests] == [expected(model, rows, 40) for rows in given]
    metrics = core.metrics()
    assert metrics.num_preemptions > 0 and (metrics.num_swapped_out > 0) == (swap > 0)


def test_continuations_share_the_prompt_and_draw_for_themselves() -> None:
    llm = llm_of("llama")
    (rows,) = embeddings("llama", (22,))
    params = SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=6, ignore_eos=True)
    first, again = (llm.generate({"prompt_embeds": rows}, params)[0] for _ in range(2))
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert len({c.token_ids for c in first.outputs}) == 3


def test_penalties_count_what_was_generated() -> None:
    """A prompt of embeddings has no ids that could be repeated; so it is in transformers."""
    model, llm = build("llama"), llm_of("llama")
    (rows,) = embeddings("llama", (12,))
    (output,) = llm.generate({"prompt_embeds": rows}, GREEDY.replace(repetition_penalty=1.7, max_tokens=20))
    assert tokens(output) == expected(model, rows, 20, repetition_penalty=1.7) != expected(model, rows, 20)


def test_what_is_given_may_be_changed_afterwards() -> None:
    llm = llm_of("llama")
    (rows,) = embeddings("llama", (12,))
    chunks = llm.stream({"prompt_embeds": rows}, GREEDY)
    first = next(chunks).token_id
    kept = rows.clone()
    rows.zero_()
    rest = [chunk.token_id for chunk in chunks]
    assert [first, *rest] == expected(build("llama"), kept)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a trained model, with its tokenizer."""
    return write_shallow(tmp_path_factory.mktemp("shallow") / "target")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def served(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", enable_prompt_embeds=True, enable_lora=True, max_model_len=256)


def prompt_rows(trained: Any, length: int, seed: int) -> Tensor:
    ids = torch.randint(5, 4000, (length,), generator=torch.Generator().manual_seed(seed))
    rows: Tensor = trained.get_input_embeddings()(ids).detach()
    return rows


def test_prefixes_are_found_by_their_content(trained: Any, served: LLM) -> None:
    """Pages of 16: of 40 rows two are whole. One other number, a salt, or tokens that are all 0, share nothing."""
    rows = prompt_rows(trained, 40, 1)
    other, late = rows.clone(), rows.clone()
    other[0, 0] += 0.25
    late[39, 3] += 0.25
    cached = [
        served.generate({"prompt_embeds": given}, GREEDY, cache_salt=salt)[0]
        for given, salt in ((rows, None), (rows, None), (other, None), (late, None), (rows, "salt"))
    ]
    assert [output.num_cached_tokens for output in cached] == [0, 32, 0, 32, 0]
    assert tokens(cached[1]) == tokens(cached[0]) == tokens(cached[4]) == expected(trained, rows)
    assert tokens(cached[2]) == expected(trained, other) and tokens(cached[3]) == expected(trained, late)
    (ids,) = served.generate([[0] * 40], GREEDY)
    assert ids.num_cached_tokens == 0


def test_with_adapters(trained: Any, served: LLM, folder: Path, tmp_path: Path) -> None:
    adapter, rows = write_adapter(tmp_path / "adapter", base=folder), prompt_rows(trained, 20, 2)
    base, adapted = served.generate([{"prompt_embeds": rows}] * 2, GREEDY, lora_request=[None, adapter])
    assert tokens(base) == expected(trained, rows) != tokens(adapted)
    ids = torch.randint(5, 4000, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    assert tokens(served.generate([ids], GREEDY, lora_request=adapter)[0]) == tokens(adapted)


def test_async_and_from_a_program_file(trained: Any, served: LLM, tmp_path: Path) -> None:
    path, rows = tmp_path / "target.engine", [prompt_rows(trained, length, length) for length in (3, 18)]
    served.export(path)

    async def last(engine: AsyncLLM, prompt: Any) -> RequestOutput:
        return [output async for output in engine.generate(prompt, GREEDY)][-1]

    async def main() -> list[RequestOutput]:
        async with AsyncLLM(path) as engine:
            with pytest.raises(InputError, match="prompt_embeds must be a dense tensor"):
                await last(engine, {"prompt_embeds": rows[0][:, :5]})
            given = [{"prompt_embeds": rows[0]}, {"prompt": PROMPT}, {"prompt_embeds": rows[1]}]
            return await asyncio.gather(*(last(engine, prompt) for prompt in given))

    outputs = asyncio.run(main())
    assert [tokens(outputs[0]), tokens(outputs[2])] == [expected(trained, each) for each in rows]
    assert outputs[1].prompt == PROMPT


def test_beam_search(trained: Any, served: LLM) -> None:
    rows = prompt_rows(trained, 19, 7)
    (output,) = served.beam_search({"prompt_embeds": rows}, BeamSearchParams(beam_width=3, max_tokens=NEW))
    found = list(output.sequences[0].token_ids)
    assert output.prompt_token_ids == ()
    assert found == expected(trained, rows, num_beams=3, eos_token_id=1)[: len(found)]


HIDDEN = build("llama").config.hidden_size
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("one row", torch.zeros(HIDDEN), InputError, "prompt_embeds must be a dense tensor"),
    ("a batch", torch.zeros(2, 3, HIDDEN), InputError, "prompt_embeds must be a dense tensor"),
    ("another size", torch.zeros(3, HIDDEN + 1), InputError, rf"\[S, {HIDDEN}\], got \[3, {HIDDEN + 1}\]"),
    ("no rows", torch.zeros(0, HIDDEN), InputError, "empty"),
    ("another dtype", torch.zeros(3, HIDDEN, dtype=torch.float16), InputError, "must be torch.float32"),
    ("whole numbers", torch.zeros(3, HIDDEN, dtype=torch.int64), InputError, "must be torch.float32"),
    ("not a number", torch.full((3, HIDDEN), torch.nan), InputError, "not finite"),
    ("infinite", torch.full((3, HIDDEN), torch.inf), InputError, "not finite"),
    ("sparse", torch.zeros(3, HIDDEN).to_sparse(), InputError, "dense"),
    ("a list", [[0.0] * HIDDEN], InputError, "prompt_embeds must be a Tensor"),
    ("too long", torch.zeros(5000, HIDDEN), InputError, "longest sequence"),
]


@pytest.mark.parametrize(("given", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_embeddings(given: Any, error: type[Exception], message: str) -> None:
    llm = llm_of("llama")
    steps = llm._engine_core(fresh=False).program.num_steps
    with pytest.raises(error, match=message):
        llm.generate([prompts([3])[0], {"prompt_embeds": given}], GREEDY)
    assert llm._engine_core(fresh=False).program.num_steps == steps and not llm._engine_core().has_unfinished


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"embeds": torch.zeros(3, HIDDEN)},
        {"prompt_embeds": torch.zeros(3, HIDDEN), "prompt_token_ids": [1]},
        {"prompt": [1, 2]},
        {"prompt_token_ids": "ab"},
    ],
    ids=str,
)
def test_bad_dicts(prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        llm_of("llama").generate(prompt, GREEDY)


def test_what_embeddings_cannot_have() -> None:
    llm = llm_of("llama")
    with pytest.raises(OptionError, match="prompt_logprobs"):
        llm.generate({"prompt_embeds": torch.zeros(3, HIDDEN)}, GREEDY.replace(prompt_logprobs=1))
    without = LLM(TinyCausal().eval())
    with pytest.raises(InputError, match="need the option enable_prompt_embeds=True"):
        without.generate({"prompt_embeds": torch.zeros(3, HIDDEN)}, GREEDY)


class Counted(torch.nn.Module):
    """Uses its token ids twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q = x.view(1, -1, 2, 8).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        logits: Tensor = self.head(x + y.transpose(1, 2).reshape(x.shape)) + ids[..., None]
        return logits


def test_a_model_that_needs_the_ids() -> None:
    llm = LLM(Counted().eval(), enable_prompt_embeds=True)
    with pytest.raises(UnsupportedError, match="besides their embeddings"):
        llm.generate([[1, 2]], GREEDY)
