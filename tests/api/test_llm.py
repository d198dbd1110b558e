"""`llmopt.LLM` over a trained model: text in, text out, as transformers would continue it."""

from __future__ import annotations

import pytest
import torch
from models.target import FOLDER, PROMPT, target_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt import LLM, RequestOutput, SamplingParams
from llmopt.errors import InputError, OptionError
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
    assert llm._codec is not None
    assert cut.outputs[0].text == llm._codec.decode(ids[:count])


def test_bad_paths_and_options() -> None:
    with pytest.raises(InputError, match=r"no config.json"):
        LLM("/nonexistent/model")
    with pytest.raises(OptionError, match=r"'max_seqs'.*max_num_seqs"):
        LLM(FOLDER, max_seqs=3)
    with pytest.raises(OptionError, match=r"'block_size'.*got 0"):
        LLM(FOLDER, block_size=0)
