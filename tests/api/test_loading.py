"""`LLM(folder)`: how much memory loading takes, what a damaged folder says, and what else the folder decides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.target import FOLDER, write_shallow
from models.zoo import build
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import llmopt
from llmopt.checkpoint import INDEX, WEIGHTS
from llmopt.errors import InputError, OptionError, UnsupportedError
from llmopt.huggingface import load_model, load_tokenizer
from llmopt.runtime.chat_template import ChatTemplate

MIB = 1 << 20
SHARD = 8 * MIB
# What the process may need for itself, and freed memory that the allocator has not returned yet.
KEPT = 48 * MIB


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 shards, in bfloat16."""
    folder = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose file holds each expert by itself, where transformers has one tensor for all of a layer."""
    folder = tmp_path_factory.mktemp("experts")
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of a small folder, for a test to damage: two shards and an index."""
    build("llama").save_pretrained(tmp_path / "model", max_shard_size=300_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


_MEASURE = """
import sys, threading, time
import torch, transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
from transformers.models.auto import modeling_auto
from llmopt.huggingface import load_model
from llmopt.engine import ModelEngine
from llmopt.compiler.options import Options
from llmopt.compiler.report import Report

def anonymous(key="RssAnon"):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key + ":")).split()[1]) * 1024

def measured(work):
    before, highest, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.0005):
            highest[0] = max(highest[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, max(highest[0], anonymous()) - before

torch.set_num_threads(1)
before = anonymous("VmHWM")
model, peak = measured(lambda: load_model(sys.argv[1], getattr(torch, sys.argv[2])))
weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
print(sum(weights.values()), peak, anonymous("VmHWM") - before)
"""


# Whole huge pages, where the system gives them unasked, would count as memory that was never touched.
_SMALL_PAGES = """
import ctypes, sys
PR_SET_THP_DISABLE = 41  # since Linux 3.15
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
"""


def numbers(code: str, *arguments: str | Path) -> list[int]:
    """What the code prints in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, "-c", _SMALL_PAGES + code, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for word in ran.stdout.split()]


def measure(folder: Path, dtype: str) -> tuple[int, int, int]:
    """Bytes of the weights, most bytes allocated while loading, and growth of the peak of resident memory."""
    weights, allocated, resident = numbers(_MEASURE, folder, dtype)
    return weights, allocated, resident


def test_loading_takes_the_result_and_one_shard(sharded: Path) -> None:
    """As stored, the weights are the mapped files. In another dtype, all that is allocated is the result."""
    assert len(list(sharded.glob("*.safetensors"))) >= 6
    weights, allocated, resident = measure(sharded, "bfloat16")
    assert weights > 6 * SHARD
    assert resident < weights + SHARD
    assert allocated < SHARD
    weights, allocated, resident = measure(sharded, "float32")
    assert 0.95 * weights < allocated < weights + SHARD  # what was free before may be used again
    assert resident < weights + 2 * SHARD, "what has been converted has left memory"


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_merged_experts_take_the_result_and_one_shard(experts: Path, dtype: str) -> None:
    """What was merged goes layer by layer, mapped or converted. Beside it there is what the allocator keeps of it."""
    assert len(list(experts.glob("*.safetensors"))) >= 12
    stored = sum(file.stat().st_size for file in experts.glob("*.safetensors"))
    weights, allocated, resident = measure(experts, dtype)
    assert max(allocated, resident) < weights + SHARD + KEPT < weights + stored - SHARD


_GENERATE = """
import sys
import torch, llmopt

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key + ":")).split()[1]) * 1024

torch.set_num_threads(1)
params = llmopt.SamplingParams(temperature=0.0, max_tokens=2, detokenize=False)
llmopt.LLM(sys.argv[1], tokenizer=object()).generate([3, 4, 5], params)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
llm = llmopt.LLM(sys.argv[2], tokenizer=object())
llm.generate([3, 4, 5], params)
weights = {w.data_ptr(): w.nbytes for w in llm._engine_core().program.executable.weights}
print(sum(weights.values()), memory("VmHWM") - before)
"""


def test_from_the_folder_to_the_first_token(tmp_path: Path) -> None:
    """All projections of GPT-2 are transposed when they are bound. A small model before it pays for what any needs."""
    for name, size in (("small", 64), ("large", 1024)):
        config = GPT2Config(
            vocab_size=64, n_positions=32, n_embd=size, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name, max_shard_size=SHARD)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 4
    weights, resident = numbers(_GENERATE, tmp_path / "small", tmp_path / "large")
    # The largest projection is a shard of its own.
    assert resident < weights + 2 * SHARD + KEPT / 2 < 2 * weights - 2 * SHARD


def test_what_weights_were_made_of_is_let_go(tmp_path: Path) -> None:
    """GPT-2 stores projections transposed. An engine that owns its module keeps one copy, another the module's too."""
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    expected = twin.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    greedy = llmopt.SamplingParams(temperature=0.0, max_tokens=6, detokenize=False)
    for model, kept in ((tmp_path, False), (twin, True)):
        llm = llmopt.LLM(model, tokenizer=object())
        for _ in range(2):
            assert list(llm.generate(ids[0].tolist(), greedy)[0].outputs[0].token_ids) == expected
        assert llm._model._engine is not None
        module: Any = llm._model._engine.info.module
        projection, embedding = module.transformer.h[1].mlp.c_fc.weight, module.transformer.wte.weight
        assert projection.shape == (32, 128)
        assert (projection.untyped_storage().nbytes() == 4 * 32 * 128) == kept
        assert embedding.untyped_storage().nbytes() >= 4 * 64 * 32


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def cut_off(folder: Path) -> None:
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-8])


def damage(folder: Path) -> None:
    file = first_shard(folder)
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def drop_a_weight(folder: Path) -> None:
    """From its shard; the index still has it."""
    file = first_shard(folder)
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, {"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    # Whoever opens this with pickle is told so.
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\neval\n(V1/0\ntR.")


BROKEN: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "no JSON": (InputError, r"config\.json is no JSON", lambda f: (f / "config.json").write_text("{")),
    "a list": (InputError, r"config\.json holds list", lambda f: (f / "config.json").write_text("[]")),
    "no type": (InputError, "has no model_type", edit("config.json", lambda c: c.pop("model_type"))),
    "unknown type": (UnsupportedError, "'nonsense'", edit("config.json", lambda c: c.update(model_type="nonsense"))),
    "code": (
        UnsupportedError,
        "is never run",
        edit("config.json", lambda c: c.update(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})),
    ),
    "no language model": (UnsupportedError, "'vit' has no", edit("config.json", lambda c: c.update(model_type="vit"))),
    "wrong field": (InputError, "cannot be loaded", edit("config.json", lambda c: c.update(hidden_size="wide"))),
    "another size": (InputError, "cannot be loaded", edit("config.json", lambda c: c.update(vocab_size=32))),
    "one layer more": (InputError, "missing_keys", edit("config.json", lambda c: c.update(num_hidden_layers=3))),
    "pickle": (InputError, r"only pytorch_model\.bin; convert it to safetensors", only_a_pickle),
    "no shard": (InputError, "is missing", lambda f: first_shard(f).unlink()),
    "cut off": (InputError, "damaged or cut off", cut_off),
    "damaged": (InputError, "damaged or cut off", damage),
    "index": (InputError, r"index\.json is no JSON", lambda f: (f / INDEX).write_text("weights")),
    "empty index": (InputError, "has no weight_map", lambda f: (f / INDEX).write_text("{}")),
    "outside": (
        InputError,
        r"must be in a file of the folder, not in '\.\./x\.safetensors'",
        edit(INDEX, lambda c: c["weight_map"].update({"lm_head.weight": "../x.safetensors"})),
    ),
    "index of pickles": (
        InputError,
        "no safetensors file",
        edit(INDEX, lambda c: c["weight_map"].update({"lm_head.weight": "x.bin"})),
    ),
    "lost weight": (InputError, "lacks 1 of the weights", drop_a_weight),
    "named file": (
        InputError,
        "transformers_weights must name a file",
        edit("config.json", lambda c: c.update(transformers_weights="../model.safetensors")),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_says_what_is_wrong(case: str, small: Path) -> None:
    error, message, harm = BROKEN[case]
    harm(small)
    with pytest.raises(error, match=message):
        load_model(small, None)


def test_a_weight_that_nobody_has_is_no_random_number(small: Path) -> None:
    """One file, without an index that could disagree with it."""
    tensors = {name: t for file in small.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in small.glob("*.safetensors*"):
        file.unlink()
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, small / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing_keys of LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(small, None)


def test_a_weight_too_many_is_reported(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit("config.json", lambda c: c.update(num_hidden_layers=1))(small)
    model = load_model(small, None)
    assert len(model.model.layers) == 1  # type: ignore[union-attr, arg-type]
    assert "9 weights that LlamaForCausalLM does not use: model.layers.1" in caplog.text


# ---- what else a folder says --------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, *, base: Path = FOLDER, jinja: str | None = None, **settings: Any) -> Path:
    """The trained model's folder, or another, with other settings of its tokenizer."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".md":
            shutil.copy(file, folder)
    edit("tokenizer_config.json", lambda c: c.update(settings))(folder)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "import os"}]


@pytest.mark.parametrize(
    ("jinja", "setting"),
    [
        (None, TEMPLATE),
        (TEMPLATE, "not this one"),
        (None, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]),
    ],
)
def test_chat_templates_are_found(jinja: str | None, setting: Any, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", jinja=jinja, chat_template=setting)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    found = load_tokenizer(folder)
    assert found.chat_template is not None
    template = ChatTemplate(found.chat_template, found.special_tokens_map)
    assert template.render(CHAT, add_generation_prompt=True) == expected
    assert expected.startswith("<|bos|>user: import os<|eos|>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0] | tojson }}{{ messages | tojson(ensure_ascii=False) }}{{ messages | tojson(True, 2) }}",
        "{{ messages[0] | tojson(indent=2, separators=(',', ':'), sort_keys=True) }}",
        "{% set x = 1 %}{% for m in messages %}\n{% generation %}\n{% set x = 2 %}\n  {{ m.content }}{{ x }}\n"
        "{% endgeneration %}\n{{ x }}{% endfor %}",
    ],
)
def test_chat_templates_are_rendered_as_transformers_does(template: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "\u2028"}]
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer(tmp_path / "model"))
    expected = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)
    assert ChatTemplate(template).render(talk) == expected


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_added_as_transformers_does(add_bos: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", add_bos_token=add_bos)
    expected = AutoTokenizer.from_pretrained(folder)("def f(x):")["input_ids"]
    assert load_tokenizer(folder).backend_tokenizer.encode("def f(x):").ids == expected


def test_prompts_are_never_cut_off_or_filled_up(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(folder).backend_tokenizer
    whole = tokenizer.encode("import os, sys, json").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).backend_tokenizer.encode("import os, sys, json").ids == whole


def test_a_broken_tokenizer_says_what_is_wrong(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", jinja="{{ 1 }}")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(folder)


def test_chat_and_the_defaults_of_the_generation_configuration(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model", base=write_shallow(tmp_path / "shallow"), jinja=TEMPLATE)
    wanted = {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 3}
    edit("generation_config.json", lambda c: c.update(wanted, do_sample=True, eos_token_id=[1, 5]))(folder)
    llm = llmopt.LLM(folder, dtype="float32", max_model_len=64)
    params = llm.get_default_sampling_params()
    assert params == llmopt.SamplingParams(temperature=0.6, top_k=7, top_p=0.9, repetition_penalty=1.1, max_tokens=3)
    assert llm._model.eos_token_ids == (1, 5)
    torch.manual_seed(3)
    (default,) = llm.chat(CHAT)
    torch.manual_seed(3)
    assert llm.chat(CHAT, params)[0].outputs == default.outputs
    assert len(default.outputs[0].token_ids) <= 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert list(default.prompt_token_ids) == expected
    assert llmopt.LLM(build("llama")).get_default_sampling_params() == llmopt.SamplingParams()


def test_a_bad_generation_configuration_names_the_option(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "model")
    edit("generation_config.json", lambda c: c.update(temperature=-3.0))(folder)
    with pytest.raises((OptionError, InputError), match="temperature"):
        llmopt.LLM(folder, dtype="float32", max_model_len=64).get_default_sampling_params()
