"""Weights are slots: whatever a user does to them after compilation shows in the next answer, through both doors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from models.zoo import VOCABULARY, build, greedy
from torch import Tensor, nn
from transformers import PreTrainedModel

import llmopt
from llmopt.backend import REPORT

Edit = Callable[[PreTrainedModel], object]

TOLERANCE = 2e-4
PROMPT = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))
NEW_TOKENS = 6


def other_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the same model, all different and as lively."""
    generator = torch.Generator().manual_seed(11)
    state = {}
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        state[key] = tensor * (1 + 0.3 * noise)
    # Tied weights must stay one.
    for key, tensor in model.state_dict().items():
        first = next(k for k, t in model.state_dict().items() if t.data_ptr() == tensor.data_ptr())
        state[key] = state[first]
    return state


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all parameters and buffers (rope's frequencies are in no state_dict, and `.to` rounds them)."""
    return {k: t.detach().clone() for k, t in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def restore(model: PreTrainedModel, saved: dict[str, Tensor]) -> None:
    """Puts a snapshot back, in place."""
    model.to(torch.float32)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(saved[key])


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """The last layer's attention projections: weights that passes merge or transpose."""
    names = ("q_proj", "v_proj", "o_proj", "c_attn", "c_proj", "down_proj")
    return [m for path, m in model.named_modules() if path.rsplit(".", 1)[-1] in names]


def load(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(model))


def load_assign(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(model), assign=True)
    model.tie_weights()


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """W += scale * B A, as peft merges an adapter."""
    generator = torch.Generator().manual_seed(3)
    for module in projections(model):
        weight = module.weight
        left = torch.randn(weight.shape[0], 4, generator=generator)
        right = torch.randn(4, weight.shape[1], generator=generator)
        weight += 0.1 * (left @ right).to(weight.dtype)


@torch.no_grad()
def edit_embedding(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.mul_(torch.linspace(-1, 1, VOCABULARY)[:, None])


def swap_data(model: PreTrainedModel) -> None:
    for module in projections(model):
        module.weight.data = module.weight.data.flip(0).clone()


def new_parameters(model: PreTrainedModel) -> None:
    for module in projections(model):
        module.weight = nn.Parameter(module.weight.detach().roll(1, 0).clone())


def to_bfloat16(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def there_and_back(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


def half(model: PreTrainedModel) -> None:
    model.half()


SAME_TYPE = (load, load_assign, merge_lora, edit_embedding, swap_data, new_parameters, there_and_back)
# GPT-2's weights are stored transposed and read through derived copies; tied embeddings are one weight in two places.
MODELS = ("llama-tied-rope3", "gpt2")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_backend_answers_with_the_new_weights(name: str) -> None:
    model = build(name)
    original = snapshot(model)
    forward = torch.compile(model.forward, backend="llmopt", dynamic=True, options={"fallback": "error"})

    def check() -> Tensor:
        logits, expected = forward(PROMPT, use_cache=False).logits, model(PROMPT, use_cache=False).logits
        assert logits.dtype == expected.dtype
        if expected.dtype == torch.float32:
            torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            error = (logits.float() - expected.float()).square().mean().sqrt()
            assert error < 0.05 * expected.float().std()
        return logits.float()

    before = check()
    for edit in (*SAME_TYPE, to_bfloat16):
        edit(model)
        assert (check() - before).abs().max() > 1e-3, f"{edit.__name__} changes nothing that could be seen"
        restore(model, original)
        torch.testing.assert_close(check(), before, rtol=TOLERANCE, atol=TOLERANCE)
    assert all(graph.refused is None for graph in REPORT.graphs)


@pytest.mark.parametrize("name", MODELS)
def test_generate_answers_with_the_new_weights(name: str) -> None:
    model, twin = build(name), build(name)
    original = snapshot(model)
    llmopt.optimize(model)
    (row,) = PROMPT.tolist()
    before = greedy(twin, row, NEW_TOKENS)
    assert greedy(model, row, NEW_TOKENS) == before
    changed = 0
    for edit in SAME_TYPE:
        edit(model)
        edit(twin)
        after = greedy(twin, row, NEW_TOKENS)
        assert greedy(model, row, NEW_TOKENS) == after, edit.__name__
        changed += after != before
        for each in (model, twin):
            restore(each, original)
        assert greedy(model, row, NEW_TOKENS) == before, edit.__name__
    assert changed >= len(SAME_TYPE) - 1, "the edits hardly change the tokens: nothing would be noticed"
    assert "transformers" not in "".join(llmopt.explain(model).notes)


@pytest.mark.parametrize("edit", [to_bfloat16, pytest.param(half, marks=pytest.mark.slow)])
@torch.no_grad()
def test_generate_after_a_change_of_type(edit: Edit) -> None:
    """The step program is compiled again for the new type; tokens may differ only where eager's choice is a tie."""
    model, twin = build("gpt2"), build("gpt2")
    llmopt.optimize(model)
    (row,) = PROMPT.tolist()
    before = greedy(model, row, NEW_TOKENS)
    edit(model)
    edit(twin)
    tokens = greedy(model, row, NEW_TOKENS)
    for count, token in enumerate(tokens):
        logits = twin(torch.tensor([[*row, *tokens[:count]]]), use_cache=False).logits[0, -1].float()
        assert logits.max() - logits[token] < 0.15 * logits.std()
    kinds = [graph.kind for graph in llmopt.explain(model).graphs]
    assert kinds.count("step") == 2
    restore(model, snapshot(build("gpt2")))
    assert greedy(model, row, NEW_TOKENS) == before


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    model = build("llama-tied-rope3")
    llmopt.optimize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    forward_logits = model(PROMPT, use_cache=False).logits
    model.lm_head.weight.mul_(2.0)
    twin = build("llama-tied-rope3")
    twin.lm_head.weight.mul_(2.0)
    logits, expected = model(PROMPT, use_cache=False).logits, twin(PROMPT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (logits - forward_logits).abs().max() > 0.1
    assert greedy(model, PROMPT[0].tolist(), NEW_TOKENS) == greedy(twin, PROMPT[0].tolist(), NEW_TOKENS)


def test_optimize_leaves_the_model_as_it_was() -> None:
    model, twin = build("gpt2"), build("gpt2")
    parameters = dict(model.named_parameters())
    pointers = {k: t.data_ptr() for k, t in model.state_dict().items()}
    assert llmopt.optimize(model) is model
    greedy(model, PROMPT[0].tolist(), 2)
    assert type(model) is type(twin)
    assert {k: t.data_ptr() for k, t in model.state_dict().items()} == pointers
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for (mine, tensor), (other, expected) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert mine == other
        assert torch.equal(tensor, expected)


@torch.no_grad()
def test_reset_clears_the_report() -> None:
    linear = nn.Linear(4, 4)
    torch.compile(linear, backend="llmopt")(torch.randn(2, 4))
    assert len(llmopt.explain().graphs) == 1
    assert "linear" in str(llmopt.explain())
    torch._dynamo.reset()
    assert llmopt.explain().graphs == []
    assert llmopt.explain().notes == []


@torch.no_grad()
def test_a_broken_tie_is_two_weights() -> None:
    """Tied weights are one argument of the graph; after untying, each must be read on its own."""
    model, twin = build("llama-tied-rope3"), build("llama-tied-rope3")
    llmopt.optimize(model)
    row = PROMPT[0].tolist()
    before = greedy(model, row, NEW_TOKENS)
    for each in (model, twin):
        each.lm_head.weight = nn.Parameter(each.lm_head.weight.flip(0).clone())
    assert greedy(model, row, NEW_TOKENS) == greedy(twin, row, NEW_TOKENS) != before


@torch.no_grad()
def test_a_weight_with_another_memory_layout() -> None:
    model, twin = build("llama"), build("llama")
    llmopt.optimize(model)
    row = PROMPT[0].tolist()
    before = greedy(model, row, NEW_TOKENS)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert greedy(model, row, NEW_TOKENS) == greedy(twin, row, NEW_TOKENS) == before


class _ScaledNorm(nn.Module):
    """Whose weight is read as `1 + weight`, a derived one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_new_weights_at_the_address_of_old_ones(assign: bool) -> None:
    memory = np.zeros(16, np.float32)
    module, x = _ScaledNorm(torch.from_numpy(memory)), torch.randn(3, 16)
    compiled = torch.compile(module, backend="llmopt", options={"fallback": "error"})
    for value in (0.0, 1.0, 2.0):
        before = module.weight.data_ptr(), module.weight._version
        if assign:
            module.load_state_dict({"weight": torch.empty(16)}, assign=True)  # the old weight is gone now
        else:
            module.weight.data = torch.empty(16)
        memory[:] = value
        fresh = torch.from_numpy(memory)
        if assign:
            module.load_state_dict({"weight": fresh}, assign=True)
        else:
            module.weight.data = fresh
        assert (module.weight.data_ptr(), module.weight._version) == before
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
