"""`llmopt.optimize` as function and decorator; `generate` on the step program where that gives the same tensor."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle  # noqa: TID251
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.zoo import VOCABULARY, build
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import llmopt
from llmopt.compiled_forward import beyond_the_class
from llmopt.errors import InputError, OptionError, UnsupportedError

PAD, EOS = 0, 7


@functools.cache
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An optimized model and its twin, compiled once for all tests."""
    return llmopt.optimize(build(name), block_size=4, fallback="error"), build(name)


def left_padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows with padding on the left, and their mask; no row holds PAD itself."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, max(lengths) - length :] = torch.randint(8, VOCABULARY, (length,), generator=generator)
        mask[row, max(lengths) - length :] = 1
    return ids, mask


def common_tokens(model: PreTrainedModel, ids: Tensor, mask: Tensor, count: int) -> list[int]:
    """Tokens that some but not all rows generate early: as ends of sequence they stop rows at different times."""
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :]
    firsts = [row.tolist() for row in out]
    return [firsts[0][2], firsts[1][5]]


def notes(model: PreTrainedModel) -> str:
    return "\n".join(llmopt.explain(model).notes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_left_padded_batch_gives_the_same_tensor(name: str) -> None:
    """Rows end at different times; what follows the end is padding, as in transformers."""
    model, twin = pair(name)
    ids, mask = left_padded([3, 24, 11, 1])
    settings: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": PAD}
    ends = common_tokens(twin, ids, mask, 8)
    for ending in (None, ends[0], ends):
        expected = twin.generate(ids, max_new_tokens=8, eos_token_id=ending, **settings)
        actual = model.generate(ids, max_new_tokens=8, eos_token_id=ending, **settings)
        assert torch.equal(actual, expected)
        assert ending is None or (expected[0, -2:] == PAD).all()
    expected = twin.generate(ids, max_length=30, **settings)
    assert torch.equal(model.generate(ids, max_length=30, **settings), expected)
    assert expected.shape == (4, 30)
    assert notes(model) == ""
    assert [graph.kind for graph in llmopt.explain(model).graphs] == ["step"]


def test_ways_to_say_how_long() -> None:
    """Keyword, configuration object, the model's own configuration, and transformers' default of 20 new tokens."""
    model, twin = pair("llama")
    ids, mask = left_padded([6, 9])
    calls: list[dict[str, Any]] = [
        {},
        {"generation_config": GenerationConfig(max_new_tokens=5, pad_token_id=PAD)},
        {"generation_config": GenerationConfig(max_length=12, pad_token_id=PAD)},
        {"max_new_tokens": 3, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 0.5, "top_k": 3},
        {"max_length": 12, "use_cache": False},
    ]
    lengths = []
    for settings in calls:
        expected = twin.generate(input_ids=ids, attention_mask=mask, **settings)
        actual = model.generate(input_ids=ids, attention_mask=mask, **settings)
        assert torch.equal(actual, expected), settings
        lengths.append(actual.shape[1])
    assert lengths == [29, 14, 12, 12, 12]
    for each in (model, twin):
        each.generation_config.max_length = 15
    assert torch.equal(model.generate(ids, attention_mask=mask), twin.generate(ids, attention_mask=mask))
    for each in (model, twin):
        each.generation_config.max_length = None
    assert notes(model) == ""


def test_padding_is_inferred_as_transformers_does() -> None:
    model, twin = pair("llama")
    ids, _ = left_padded([6, 9])
    for settings in ({"pad_token_id": PAD}, {"pad_token_id": PAD, "eos_token_id": PAD}):
        expected = twin.generate(ids, max_new_tokens=4, **settings)
        assert torch.equal(model.generate(ids, max_new_tokens=4, **settings), expected)
    assert notes(model) == ""


IDS = torch.randint(8, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("inputs_embeds and input_ids", {"inputs_embeds": torch.randn(1, 6, 64), "input_ids": IDS}),
        ("argument position_ids", {"inputs": IDS, "position_ids": torch.arange(6)[None]}),
        ("argument output_attentions", {"inputs": IDS, "output_attentions": True, "return_dict_in_generate": True}),
        ("argument negative_prompt_ids", {"inputs": IDS, "guidance_scale": 1.5, "negative_prompt_ids": IDS}),
        ("guidance_scale=1.5", {"inputs": IDS, "guidance_scale": 1.5}),
        ("prompt_lookup_num_tokens=2", {"inputs": IDS, "prompt_lookup_num_tokens": 2}),
        ("argument assistant_model", {"inputs": IDS, "assistant_model": build("llama")}),
        ("not on the left", {"inputs": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}),
        ("not on the left", {"inputs": IDS, "do_sample": True, "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}),
    ],
)
def test_other_ways_to_generate_stay_with_transformers(reason: str, arguments: dict[str, Any]) -> None:
    """What the step program would not reproduce runs as before, and explain says why."""
    model, twin = routed_away()
    model._llmopt.report.notes.clear()
    outputs = []
    for each in (model, twin):
        torch.manual_seed(5)
        out = each.generate(**{"max_new_tokens": 3, "pad_token_id": PAD, **arguments})
        outputs.append(out if isinstance(out, Tensor) else out.sequences)
    assert torch.equal(*outputs)
    assert reason in notes(model)
    assert "step" not in [graph.kind for graph in llmopt.explain(model).graphs]


@functools.cache
def routed_away() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose forward is not compiled anew for each of the calls above; where they go is what is tested."""
    model = llmopt.optimize(build("llama"))
    router_forward = model._llmopt.forward
    model.forward.run = router_forward
    return model, build("llama")


def test_longer_than_the_model_takes_stays_with_transformers() -> None:
    """Rope has no end, so transformers goes on where the step program's cache would stop."""
    model = llmopt.optimize(build("llama"), max_model_len=16)
    model.forward.run = model._llmopt.forward  # type: ignore[union-attr]
    out = model.generate(IDS, max_new_tokens=11, do_sample=False)
    assert out.shape == (1, 17)
    assert "more than max_model_len" in notes(model)


def test_training_mode_stays_with_transformers() -> None:
    model = llmopt.optimize(build("llama").train())
    model.forward.run = model._llmopt.forward  # type: ignore[union-attr]
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert "training mode" in notes(model)


def test_a_model_without_a_step_program_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Rope factors that depend on the length cannot be cached; the model still generates."""
    model = build("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    llmopt.optimize(model)
    model.forward.run = model._llmopt.forward  # type: ignore[union-attr]
    out = model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 8)
    assert "rope type 'dynamic' depends on the length" in notes(model)
    assert "rope type 'dynamic'" in caplog.text


SMALL = GPT2Config(vocab_size=17, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)


def small() -> Any:
    """One layer, so that it is soon compiled again."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**SMALL.to_dict(), "vocab_size": VOCABULARY})).eval()


def assert_optimized(model: nn.Module) -> None:
    """It answers, and its own report says that it was compiled."""
    model.eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = type(model).forward(model, ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 5)
    kinds = [graph.kind for graph in llmopt.explain(model).graphs]
    assert kinds == ["backend", "step"]
    assert "linear" in str(llmopt.explain(model))


def test_decorator_over_a_class() -> None:
    @llmopt.optimize
    class Small(GPT2LMHeadModel):
        """A user's model class."""

    class Derived(Small):
        """Its instances are their own business."""

    model = Small(SMALL)
    assert isinstance(model, Small) and Small.__name__ == "Small"
    assert_optimized(model)
    assert "_llmopt" not in vars(Derived(SMALL))


def test_decorator_with_options_over_a_function() -> None:
    @llmopt.optimize(dtype="bfloat16", block_size=8)
    def make(layers: int, *, heads: int = 2) -> GPT2LMHeadModel:
        """Makes a model."""
        return GPT2LMHeadModel(GPT2Config(**{**SMALL.to_dict(), "n_layer": layers, "n_head": heads})).eval()

    assert make.__name__ == "make" and make.__doc__ == "Makes a model."
    model = make(1, heads=4)
    assert model.dtype == torch.bfloat16
    assert model.config.n_head == 4
    assert model._llmopt.options.block_size == 8


def test_optimize_twice_is_once() -> None:
    model = llmopt.optimize(nn.Linear(2, 2))
    forward = model.forward
    assert llmopt.optimize(model).forward is forward


def test_a_plain_module_is_compiled_too() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    expected = model(torch.ones(3, 6))
    assert llmopt.optimize(model) is model
    with torch.no_grad():
        torch.testing.assert_close(model(torch.ones(3, 6)), expected)
    assert len(llmopt.explain(model).graphs) == 1


def test_bad_targets_and_options() -> None:
    with pytest.raises(OptionError, match=r"'quantisation'.*got 'int4'.*block_size"):
        llmopt.optimize(nn.Linear(2, 2), quantisation="int4")
    with pytest.raises(OptionError, match=r"'dtype'.*'float8'.*'bfloat16'"):
        llmopt.optimize(dtype="float8")
    with pytest.raises(InputError, match="a class of them or a function"):
        llmopt.optimize(3)
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got dict"):
        llmopt.optimize(lambda: {})()
    with pytest.raises(InputError, match="takes a model"):
        llmopt.explain(3)
    with pytest.raises(UnsupportedError, match=r"no torch.nn.Embedding"):
        llmopt.LLM(nn.Linear(2, 2).eval())
    with pytest.raises(InputError, match=r"this GPT2LMHeadModel is in training mode; call model.eval\(\) first"):
        llmopt.LLM(GPT2LMHeadModel(SMALL))


def test_other_options_for_an_optimized_model_are_refused() -> None:
    model = llmopt.optimize(nn.Linear(2, 2), block_size=8)
    assert llmopt.optimize(model) is llmopt.optimize(model, block_size=8) is model
    with pytest.raises(InputError, match=r"optimized with dtype='auto' already, not with 'bfloat16'"):
        llmopt.optimize(model, dtype="bfloat16")


# ---- copies --------------------------------------------------------------------------------------------------------


def deep_copy(model: Any) -> Any:
    return copy.deepcopy(model)


def through_a_file(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  # this test's own bytes


@pytest.mark.parametrize("copied", [deep_copy, through_a_file])
def test_a_copy_has_its_own_weights(copied: Callable[[Any], Any]) -> None:
    """Made after both doors were used, and edited as a merge or a moving average would."""
    model, twin = llmopt.optimize(small()), small()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        before, tokens = model(IDS).logits, model.generate(IDS, **settings)
    other = copied(model)
    assert type(other) is type(model) and other._llmopt.options == model._llmopt.options
    edited = small()
    with torch.no_grad():
        for each in (other, edited):
            each.lm_head.weight.copy_(twin.lm_head.weight.flip(0))
        torch.testing.assert_close(other(IDS).logits, edited(IDS).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.generate(IDS, **settings), edited.generate(IDS, **settings))
        assert torch.equal(model(IDS).logits, before) and torch.equal(model.generate(IDS, **settings), tokens)
    assert not torch.equal(other.generate(IDS, **settings), tokens)
    assert [graph.kind for graph in llmopt.explain(other).graphs] == ["backend", "step"]
    assert "input_ids" in inspect.signature(other.forward).parameters


# ---- hooks and replaced forwards -----------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    logits = (output if isinstance(output, Tensor) else output.logits).clone()
    logits[..., 9] += 1e3
    if isinstance(output, Tensor):
        return logits
    output.logits = logits
    return output


def hook(model: Any) -> None:
    model.register_forward_hook(steer)


def replaced(model: Any) -> None:
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: steer(model, args, forward(*args, **kwargs)))


@pytest.mark.parametrize("change", [hook, replaced])
@pytest.mark.parametrize("late", [False, True])
def test_what_a_call_does_beyond_its_class_is_kept(change: Callable[[Any], None], late: bool) -> None:
    """The model is steered to one token; that it was steered before or after `optimize` makes no difference."""
    if late:
        model = llmopt.optimize(small())
        change(model)
    else:
        model = small()
        change(model)
        with pytest.raises(UnsupportedError, match="forward"):
            llmopt.LLM(model)
        llmopt.optimize(model)
    assert model.generate(IDS, **GREEDY)[0, -3:].tolist() == [9, 9, 9]
    assert "transformers" in notes(model) and "forward" in notes(model)


def test_hooks_before_the_forward_count_too() -> None:
    model = llmopt.optimize(nn.Linear(2, 2))
    assert beyond_the_class(model) is None
    model.register_forward_pre_hook(lambda module, args: None)
    assert beyond_the_class(model) == "the model has forward hooks"


def test_hooks_and_forwards_of_modules_inside_are_kept() -> None:
    """Also those that come and go between two calls: each is part of the graph."""
    model: Any = llmopt.optimize(small())
    plain = model.generate(IDS, **GREEDY)
    handle = model.lm_head.register_forward_hook(steer)
    assert model.generate(IDS, **GREEDY)[0, -3:].tolist() == [9, 9, 9]
    handle.remove()
    assert torch.equal(model.generate(IDS, **GREEDY), plain)
    inner = model.lm_head.forward
    model.lm_head.forward = lambda states: steer(model, (), inner(states))
    assert model.generate(IDS, **GREEDY)[0, -3:].tolist() == [9, 9, 9]
    assert len(model._llmopt.engine()._latest) == 1, "a program that is out of date lets go of its weights"


# ---- models that cannot be captured --------------------------------------------------------------------------------


@pytest.mark.slow
def test_mamba_goes_to_transformers() -> None:
    """PyTorch cannot export its forward."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    expected = model.generate(IDS, **GREEDY)
    llmopt.optimize(model)
    model.forward.run = model._llmopt.forward
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert "cannot export" in notes(model)


def test_a_model_that_cannot_be_captured_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has changed."""
    traced = []

    def trace(*given: Any) -> Any:
        traced.append(given)
        raise UnsupportedError("the model breaks the graph")

    monkeypatch.setattr("llmopt.engine.trace_forward", trace)
    model = llmopt.optimize(GPT2LMHeadModel(SMALL).eval())
    model.forward.run = model._llmopt.forward
    ids = torch.tensor([[1, 2, 3]])
    for tries in (1, 1):
        assert model.generate(ids, **GREEDY).shape == (1, 6)
        assert len(traced) == tries
    assert "breaks the graph" in notes(model)
    model.double().generate(ids, **GREEDY)
    assert len(traced) == 2


def test_threads_share_the_first_compilation() -> None:
    model = llmopt.optimize(GPT2LMHeadModel(SMALL).eval())
    ids, results = torch.tensor([[1, 2, 3]]), []
    work = lambda: results.append(model.generate(ids, **GREEDY))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(each, results[0]) for each in results)
    assert [graph.kind for graph in llmopt.explain(model).graphs] == ["step"]
