"""`llmopt.LLM` over a trained model: text in, text out, as transformers would continue it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.target import FOLDER, PROMPT, target_llm
from models.zoo import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams, export, load
from llmopt.errors import InputError, OptionError
from llmopt.exporting import _cast_copy
from llmopt.llm import StreamChunk
from llmopt.runtime.text import REPLACEMENT

PROMPTS = [PROMPT, "import os\nimport sys\n", "class Queue:\n    def __init__(self"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def test_text_equals_transformers() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    outputs = target_llm().generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        ended = 1 in expected
        (completion,) = output.outputs
        assert isinstance(output, RequestOutput) and output.prompt == prompt
        assert list(output.prompt_token_ids) == ids["input_ids"][0].tolist()
        assert list(completion.token_ids) == expected
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if ended else "length")


def test_streams_add_up_to_the_outputs() -> None:
    llm = target_llm()
    params = [GREEDY, GREEDY.replace(max_tokens=5), SamplingParams(temperature=1.8, seed=3, max_tokens=24)]
    outputs = llm.generate(PROMPTS, params)
    chunks: list[list[StreamChunk]] = [[], [], []]
    for chunk in llm.stream(PROMPTS, params):
        chunks[chunk.index].append(chunk)
    for output, row in zip(outputs, chunks, strict=True):
        completion = output.outputs[0]
        assert [c.token_id for c in row] == list(completion.token_ids)
        assert "".join(c.text for c in row) == completion.text
        assert [c.finish_reason for c in row] == [None] * (len(row) - 1) + [completion.finish_reason]
        assert all(REPLACEMENT not in c.text for c in row[:-1])


def test_stop_strings_cut_text_and_end_the_request() -> None:
    llm = target_llm()
    (whole,) = llm.generate(PROMPT, GREEDY)
    text = whole.outputs[0].text
    stop = text[6:9]
    (cut,) = llm.generate(PROMPT, GREEDY.replace(stop=[stop]))
    assert cut.outputs[0].text == text.split(stop)[0]
    assert cut.outputs[0].finish_reason == "stop"
    assert len(cut.outputs[0].token_ids) < len(whole.outputs[0].token_ids)
    streamed = "".join(chunk.text for chunk in llm.stream(PROMPT, GREEDY.replace(stop=[stop])))
    assert streamed == cut.outputs[0].text
    (late,) = llm.generate(PROMPT, GREEDY.replace(stop=[stop], min_tokens=len(cut.outputs[0].token_ids) + 1))
    assert len(late.outputs[0].token_ids) > len(cut.outputs[0].token_ids)


def test_a_stop_token_is_not_in_the_text() -> None:
    llm = target_llm()
    (whole,) = llm.generate(PROMPT, GREEDY)
    ids = list(whole.outputs[0].token_ids)
    end = ids[4]
    (cut,) = llm.generate(PROMPT, GREEDY.replace(stop_token_ids=[end]))
    count = ids.index(end)
    assert list(cut.outputs[0].token_ids) == ids[: count + 1]
    assert llm._model.codec is not None
    assert cut.outputs[0].text == llm._model.codec.decode(ids[:count])
    (kept,) = llm.generate(PROMPT, GREEDY.replace(stop_token_ids=[end], include_stop_str_in_output=True))
    assert kept.outputs[0].token_ids == cut.outputs[0].token_ids and kept.outputs[0].stop_reason == end
    assert kept.outputs[0].text == llm._model.codec.decode(ids[: count + 1]) != cut.outputs[0].text


def test_bad_paths_and_options() -> None:
    for door in (LLM, load):
        with pytest.raises(InputError, match=r"/nonexistent/model does not exist"):
            door("/nonexistent/model")
    with pytest.raises(InputError, match=r"is a folder; llmopt.LLM takes one"):
        load(FOLDER)
    with pytest.raises(InputError, match=r"no config.json"):
        LLM(FOLDER.parent)
    with pytest.raises(OptionError, match=r"'max_seqs'.*max_num_seqs"):
        LLM(FOLDER, max_seqs=3)
    with pytest.raises(OptionError, match=r"'block_size'.*got 0"):
        LLM(FOLDER, block_size=0)


def test_several_continuations_are_distinct_and_repeatable() -> None:
    llm = target_llm()
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=8, n=3)
    (first,), (second,) = llm.generate(PROMPT, params), llm.generate(PROMPT, params)
    rows = [completion.token_ids for completion in first.outputs]
    assert first.finished and [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len(set(rows)) == 3 and rows == [completion.token_ids for completion in second.outputs]
    streamed: list[list[int | None]] = [[], [], []]
    for chunk in llm.stream(PROMPT, params):
        streamed[chunk.sequence].append(chunk.token_id)
    assert [tuple(row) for row in streamed] == rows


def test_best_of_gives_the_likeliest() -> None:
    llm = target_llm()
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=8, n=4, logprobs=0)
    (every,) = llm.generate(PROMPT, params)
    (best,) = llm.generate(PROMPT, params.replace(n=2, best_of=4, logprobs=None))
    ranked = sorted(every.outputs, key=lambda completion: -(completion.cumulative_logprob or 0.0))
    assert [completion.token_ids for completion in best.outputs] == [c.token_ids for c in ranked[:2]]
    assert [completion.index for completion in best.outputs] == [0, 1]
    with pytest.raises(InputError, match=r"best_of=4 cannot be streamed"):
        next(iter(llm.stream(PROMPT, params.replace(n=2, best_of=4))))


def test_logprobs_equal_those_of_the_eager_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    (output,) = target_llm().generate(PROMPT, GREEDY.replace(max_tokens=6, logprobs=3, prompt_logprobs=2))
    (completion,), prompt = output.outputs, output.prompt_token_ids
    ids = [*prompt, *completion.token_ids]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None
    found = [*output.prompt_logprobs[1:], *completion.logprobs]
    assert len(found) == len(ids) - 1
    for place, entry in enumerate(found):
        assert entry is not None and ids[place + 1] in entry
        assert len(entry) >= (2 if place < len(prompt) - 1 else 3)
        for token, one in entry.items():
            assert one.logprob == pytest.approx(expected[place, token].item(), abs=2e-3)
    total = sum(entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_structured_outputs_bad_words_and_no_text() -> None:
    llm = target_llm()
    schema = StructuredOutputsParams(
        json={"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    )
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=80, structured_outputs=schema))
    assert json.loads(output.outputs[0].text)["a"] in (1, 2)
    (whole,) = llm.generate(PROMPT, GREEDY)
    word = whole.outputs[0].text.split()[0]
    (other,) = llm.generate(PROMPT, GREEDY.replace(bad_words=[word]))
    assert other.outputs[0].token_ids != whole.outputs[0].token_ids
    (bare,) = llm.generate(PROMPT, GREEDY.replace(detokenize=False))
    assert bare.outputs[0].text == "" and bare.outputs[0].token_ids == whole.outputs[0].token_ids


def test_a_finished_structure_ends_before_the_least_number_of_tokens() -> None:
    choice = StructuredOutputsParams(choice=("ab", "cd"))
    params = SamplingParams(temperature=0.0, max_tokens=12, structured_outputs=choice)
    (expected,), (early,) = (target_llm().generate(PROMPT, params.replace(min_tokens=least)) for least in (0, 6))
    assert early.outputs == expected.outputs
    assert early.outputs[0].text in ("ab", "cd") and early.outputs[0].finish_reason == "stop"


def test_parameters_that_cannot_be_served() -> None:
    with pytest.raises(OptionError, match=r"regex.*unclosed group"):
        target_llm().generate(PROMPT, GREEDY.replace(structured_outputs=StructuredOutputsParams(regex="(")))


@pytest.mark.parametrize("width", [1, 3])
def test_beams_are_those_of_transformers(width: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(PROMPT, return_tensors="pt")
    count = ids["input_ids"].shape[1]
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, num_beams=width, num_return_sequences=width)
    (output,) = target_llm().beam_search(PROMPT, BeamSearchParams(beam_width=width, max_tokens=20))
    pad = model.generation_config.pad_token_id
    rows = [[t for t in row[count:].tolist() if t != pad] for row in expected]
    assert [list(s.token_ids) for s in output.sequences] == rows
    with pytest.raises(InputError, match="max_model_len"):
        target_llm().beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=5000))


def test_chat() -> None:
    llm = target_llm()
    template = (
        "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}# answer:{% endif %}"
    )
    talk = [{"role": "user", "content": "write a queue"}, {"role": "user", "content": "now"}]
    (output,) = llm.chat(talk, GREEDY, chat_template=template)
    assert llm._model.codec is not None
    prompt = llm._model.codec.encode("# user: write a queue\n# user: now\n# answer:", False)
    assert list(output.prompt_token_ids) == prompt
    assert output.outputs == llm.generate([prompt], GREEDY)[0].outputs
    assert len(llm.chat([talk, talk[:1]], GREEDY, chat_template=template)) == 2
    with pytest.raises(InputError, match="no chat template"):
        llm.chat(talk, GREEDY)
    with pytest.raises(InputError, match="failed"):
        llm.chat(talk, GREEDY, chat_template="{{ messages.append(1) }}")
    with pytest.raises(InputError, match="failed"):
        llm.chat(talk, GREEDY, chat_template="{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="odd"):
        llm.chat(talk, GREEDY, chat_template="{{ raise_exception('odd roles') }}")
    with pytest.raises(InputError, match="a role"):
        llm.chat([{"content": "x"}], GREEDY, chat_template=template)


# ---- export --------------------------------------------------------------------------------------------------------


def test_export_casts_a_copy(tmp_path: Path) -> None:
    model = build("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "half.engine", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.engine").values()} == {torch.bfloat16}
    after = model.state_dict()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())


def test_a_cast_copy_keeps_ties_and_shares_what_is_not_cast() -> None:
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.register_buffer("places", torch.arange(3))
    half, same = _cast_copy(model, torch.bfloat16), _cast_copy(model, torch.float32)
    assert half.lm_head.weight is half.transformer.wte.weight and half.lm_head.weight.dtype == torch.bfloat16
    assert half.places.data_ptr() == model.places.data_ptr()
    assert same.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert list(half.state_dict()) == list(model.state_dict())


def test_an_llm_is_exported_as_it_was_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype cannot be given with an LLM"):
        export(target_llm(), tmp_path / "x", dtype="bfloat16")
    with pytest.raises(InputError, match="a tokenizer cannot be given with an LLM"):
        export(target_llm(), tmp_path / "x", tokenizer=object())
