"""A cache-less model becomes a step over a paged cache, or is refused with the op and the line that forbid it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs.causal_models import HIDDEN, POSITIONS, VOCABULARY, Extra, TinyCausal, traced
from graphs.rewriting import Rewritten, assert_golden
from graphs.step_passes import BLOCK, AttentionOnly, graph_before, run_pass
from torch import Tensor, fx, nn

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import nodes_of, outputs, placeholders, tensor
from llmopt.compiler.options import Options
from llmopt.compiler.pass_manager import PassReport, copy_graph, run_pipeline
from llmopt.compiler.step import STEP_INPUTS, WINDOW_INPUTS, group_windows
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.insert_kv_cache import InsertKVCache
from llmopt.passes.pipeline import step_pipeline


def step_graph(model: Callable[[Tensor], Tensor], verify: bool = False) -> tuple[fx.Graph, PassReport]:
    graph = traced(model).graph
    reports = run_pipeline(graph, step_pipeline(BLOCK), Options(verify=verify))
    return graph, next(report for report in reports if report.name == "insert_kv_cache")


def run_step(graph: fx.Graph, model: nn.Module, rows: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits of every token of every row, computed as ragged batches of up to `chunk` tokens of each."""
    weights = {f"self.{k}": v for k, v in model.named_parameters()} | dict(model.named_parameters())
    caches: dict[str, Tensor] = {}
    per_row = -(-max(map(len, rows)) // BLOCK)
    # Blocks in an order of no meaning, and one that nobody owns.
    tables = torch.randperm(len(rows) * per_row + 1)[: len(rows) * per_row].view(len(rows), per_row)
    logits: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), chunk):
        live = [r for r, row in enumerate(rows) if len(row) > start]
        counts = [min(chunk, len(rows[r]) - start) for r in live]
        positions = torch.cat([torch.arange(start, start + n) for n in counts])
        owner = torch.repeat_interleave(torch.tensor(live), torch.tensor(counts))
        ends = torch.tensor(counts).cumsum(0)
        step = {
            "input_ids": torch.tensor(
                [t for r, n in zip(live, counts, strict=True) for t in rows[r][start : start + n]]
            ),
            "positions": positions,
            "slot_mapping": tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK,
            "cu_seqlens_q": torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
            "seq_lens": torch.tensor([start + n for n in counts]),
            "block_tables": tables[live],
            "logits_indices": torch.arange(int(ends[-1])),
        }
        # Layers with a window have other pages: the same ones in the opposite order.
        step["window_block_tables"] = tables.max() - step["block_tables"]
        own = tables.max() - tables[owner, positions // BLOCK]
        step["window_slot_mapping"] = own * BLOCK + positions % BLOCK
        dtypes = {**STEP_INPUTS, **WINDOW_INPUTS}
        arguments: list[Any] = []
        for node in placeholders(graph):
            if node.name in dtypes:
                arguments.append(step[node.name].to(dtypes[node.name]))
            elif "cache" in node.meta:
                shape = (tables.numel() + 1, *map(int, tensor(node).shape[1:]))
                arguments.append(caches.setdefault(node.name, torch.full(shape, torch.nan)))
            else:
                arguments.append(weights[node.meta["weight"]])
        with torch.no_grad():
            (out,) = fx.Interpreter(fx.GraphModule({}, graph)).run(*arguments)
        for r, part in zip(live, out.split(counts), strict=True):
            logits[r].append(part)
    return [torch.cat(parts) for parts in logits]


def check(model: TinyCausal, verify: bool = False) -> PassReport:
    """Ragged batches, whole and in chunks and token by token, against the model itself."""
    graph, report = step_graph(model, verify)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 4, 30)]
    for chunk in (1, 5, 30):
        for row, got in zip(rows, run_step(graph, model, rows, chunk), strict=True):
            with torch.no_grad():
                (expected,) = model(torch.tensor([row]))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    return report


def test_a_step_equals_the_model() -> None:
    report = check(TinyCausal(layers=2), verify=True)
    assert report.matched == 3 and report.notes == ["2 attention layers"]  # positions, and each attention


def _frequencies() -> Tensor:
    """`[1, HIDDEN, 1]`: times positions as a row, this is rope as older transformers write it."""
    return (0.1 * torch.arange(HIDDEN))[None, :, None]


def test_layers_with_a_window_have_pages_of_their_own() -> None:
    """Only where others have none."""
    model = TinyCausal(windows=(5, 0, 3))
    report = check(model, verify=True)
    assert report.notes == ["3 attention layers, 2 of them with a window and pages of their own"]
    graph, _ = step_graph(model)
    names = [node.name for node in placeholders(graph)]
    assert names[:9] == [*STEP_INPUTS, *WINDOW_INPUTS] and names[9] == "k_cache_0"
    specs = [node.meta["cache"] for node in placeholders(graph) if "cache" in node.meta][::2]
    assert [(spec.window, spec.group) for spec in specs] == [(5, 1), (0, 0), (3, 1)]
    assert group_windows(specs) == [0, 5]
    for windows in ((5, 3), (0, 0)):
        graph, _ = step_graph(TinyCausal(windows=windows))
        assert not WINDOW_INPUTS.keys() & {node.name for node in placeholders(graph)}
        specs = [node.meta["cache"] for node in placeholders(graph) if "cache" in node.meta]
        assert group_windows(specs) == [max(windows)]


def _visible(x: Tensor) -> Tensor:
    """A mask as callers without padding give it."""
    return torch.ones(1, x.shape[1], dtype=torch.int64)


ACCEPTED: dict[str, Extra] = {
    "pointwise": lambda m, x, p: x.tanh() * 2 + x,
    "softmax over features": lambda m, x, p: x.softmax(-1) + x,
    "sum over features": lambda m, x, p: x / (1 + x.abs().sum(-1, keepdim=True)),
    "sort of features": lambda m, x, p: x.sort(-1)[0],
    "transposed and back": lambda m, x, p: x.mT.tanh().mT,
    "squared positions": lambda m, x, p: x + 0.01 * (p * p)[None, :, None],
    "halved positions": lambda m, x, p: x + m.places(p // 2),
    "a table of waves": lambda m, x, p: x + torch.sin(p[:, None] / 10.0 ** (torch.arange(HIDDEN) / HIDDEN)),
    "waves by a product": lambda m, x, p: x + torch.sin(_frequencies() @ p[None, None, :].float()).transpose(1, 2),
    "split and joined": lambda m, x, p: torch.cat(x.chunk(2, -1)[::-1], -1),
    "positions as numbers": lambda m, x, p: x + 0.01 * p[None, :, None],
    "shifted positions": lambda m, x, p: x + m.places(p + 2),
    "doubled positions": lambda m, x, p: x + m.places(torch.arange(x.shape[1]) * 2 + 1),
    "clamped positions": lambda m, x, p: x + m.places(p.clamp(max=15)),
    "positions in turn": lambda m, x, p: x + m.places(p % 20),
    "positions up to some place": lambda m, x, p: x + m.places(torch.where(p > 20, 3, p)),
    "a scale that grows by steps": lambda m, x, p: x * (1 + torch.log(1 + torch.floor(p / 16)))[None, :, None],
    "the first rows of a table": lambda m, x, p: x + m.places.weight[: x.shape[1]],
    "later rows of a table": lambda m, x, p: x + m.places.weight[None].narrow(1, 3, x.shape[1]),
    "positions out of a list": lambda m, x, p: x + m.places(torch.arange(POSITIONS)[None, : x.shape[1]]),
    "the same row everywhere": lambda m, x, p: x + m.norm.bias.expand(1, x.shape[1], HIDDEN),
    "the same number everywhere": lambda m, x, p: x * torch.full((x.shape[1], 1), 0.5),
    "positions without what is hidden": lambda m, x, p: (
        x + m.places(_visible(x).cumsum(1).masked_fill(_visible(x) == 0, 1) - 1)
    ),
    "positions from a mask": lambda m, x, p: x + m.places(torch.ones(1, x.shape[1], dtype=torch.int64).cumsum(1) - 1),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_row_local_computations_are_accepted(name: str) -> None:
    check(TinyCausal(ACCEPTED[name]))


def _conv(model: TinyCausal, x: Tensor, positions: Tensor) -> Tensor:
    return model.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def _outside(model: TinyCausal, x: Tensor, positions: Tensor) -> Tensor:
    return torch.tril(x @ x.transpose(1, 2)) @ x


# name -> (what is computed between the layers, part of the op's name, part of the reason)
REFUSED: dict[str, tuple[Extra, str, str]] = {
    "running sum": (lambda m, x, p: x.cumsum(1), "cumsum", "mixes rows"),
    "mean": (lambda m, x, p: x - x.mean(1, keepdim=True), "mean", "mixes rows"),
    "maximum": (lambda m, x, p: x - x.amax(1, keepdim=True), "amax", "mixes rows"),
    "softmax over tokens": (lambda m, x, p: x.softmax(1), "softmax", "mixes rows"),
    "flip": (lambda m, x, p: x.flip(1), "flip", "mixes rows"),
    "token shift": (lambda m, x, p: x + torch.roll(x, 1, 1), "roll", "mixes rows"),
    "first token": (lambda m, x, p: x + x[:, :1], "slice", "mixes rows"),
    "last token": (lambda m, x, p: x + x[:, -1:], "slice", "mixes rows"),
    "shifted slice": (lambda m, x, p: x + torch.cat([x[:, :1], x[:, :-1]], 1), "slice", ""),
    "sorted tokens": (lambda m, x, p: x.sort(1)[0], "sort", "mixes rows"),
    "norm over tokens": (lambda m, x, p: x / x.norm(dim=1, keepdim=True), "norm", ""),
    "convolution over time": (_conv, "pad", ""),
    "linear attention": (_outside, "batched_linear", "pairs of positions"),
    "length": (lambda m, x, p: x * (1 / x.shape[1]), "mul", "the number of tokens"),
    "length in a power": (lambda m, x, p: x * x.shape[1] ** 0.5, "mul", "the number of tokens"),
    "length as a tensor": (
        lambda m, x, p: x / torch.tensor(x.shape[1]).sqrt(),
        "scalar_tensor",
        "the number of tokens",
    ),
    "length in a fill": (lambda m, x, p: x * torch.full((1,), x.shape[1]), "full", "the number of tokens"),
    "length in every row": (
        lambda m, x, p: x * torch.full((x.shape[1], 1), x.shape[1]),
        "full",
        "the number of tokens",
    ),
    "last row of a table": (lambda m, x, p: x + m.places.weight[x.shape[1] - 1], "select", "the number of tokens"),
    "last rows of a table": (lambda m, x, p: x + m.places.weight[-x.shape[1] :], "slice", "depend on the length"),
    "largest position": (lambda m, x, p: x * (p.max() + 1), "max", "not known"),
    "random rows": (lambda m, x, p: x * torch.rand(x.shape[1], 1), "rand", "the number of tokens"),
    "product with a mask": (lambda m, x, p: x.mT.reshape(1, -1, HIDDEN) + x, "view", "mixes rows"),
    "global sum": (lambda m, x, p: x + x.sum(), "sum", "not known"),
    "summed positions": (lambda m, x, p: x + p.cumsum(0)[None, :, None], "cumsum", "mixes rows"),
    "delayed positions": (
        lambda m, x, p: x + torch.cat([p[:1], torch.arange(x.shape[1] - 1)])[None, :, None],
        "arange",
        "values are counted along the sequence",
    ),
    "positions by the length": (
        lambda m, x, p: x * (p / x.shape[1])[None, :, None],
        "div",
        "the number of tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_is_refused_with_its_line(name: str) -> None:
    extra, operation, reason = REFUSED[name]
    with pytest.raises(UnsupportedError) as caught:
        step_graph(TinyCausal(extra))
    error = caught.value
    assert operation in str(error.operation), error
    assert reason in error.reason
    assert "test_insert_kv_cache.py:" in str(error.location), error
    assert "the model cannot run over a paged KV cache" in str(error)


def _reversed(length: int) -> Tensor:
    return torch.arange(length - 1, -1, -1)


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        (_reversed, "positions depend on the length"),
        (lambda n: torch.arange(n) + n, "the number of tokens is computed with"),
        (lambda n: torch.arange(n).flip(0), "mixes rows"),
    ],
)
def test_positions_that_do_not_count_upwards(positions: Callable[[int], Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        step_graph(TinyCausal(positions=positions))
    assert ".py:" in str(caught.value.location)


class Other(TinyCausal):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.kind == "no attention":
            return self.head(x)
        q = x.view(1, -1, 2, HIDDEN // 2).transpose(1, 2)
        if self.kind == "of features":  # each token's own
            q = x.view(-1, 4, 2, HIDDEN // 8).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        elif self.kind == "bidirectional":
            y = nn.functional.scaled_dot_product_attention(q, q, q)
        else:
            mask = (ids[0][None, :] == ids[0][:, None]).tril()
            y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None])
        return self.head(y.transpose(1, 2).reshape(1, -1, HIDDEN))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no attention", "no attention was recognised"),
        ("bidirectional", "attention is not causal"),
        ("of features", "attention is over something else than the sequence"),
        ("mask of the tokens", "pairs of positions are computed outside attention"),
    ],
)
def test_attention_without_a_cache(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        step_graph(Other(kind))


def test_the_signature_of_a_step() -> None:
    graph, _ = step_graph(TinyCausal(layers=2))
    names = [node.name for node in placeholders(graph)]
    assert names[:7] == list(STEP_INPUTS)
    assert names[7:11] == ["k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]
    assert len(list(nodes_of(graph, llmopt_ops.paged_attention.default))) == 2
    (logits,) = outputs(graph)
    assert tensor(logits).ndim == 2 and int(tensor(logits).shape[1]) == VOCABULARY
    rows = next(n for n in placeholders(graph) if n.name == "logits_indices")
    assert str(tensor(logits).shape[0]) == str(tensor(rows).shape[0]), "logits only where they are asked for"
    specs = {node.meta["cache"] for node in placeholders(graph) if "cache" in node.meta}
    assert {(s.layer, s.kv_heads, s.key_size, s.window) for s in specs} == {(0, 2, 8, 0), (1, 2, 8, 0)}


@pytest.mark.parametrize(("kv_dtype", "row"), [("int8", 8 + 2), ("fp8", 8 + 2), ("int4", 16 + 4)])
def test_quantized_pages(kv_dtype: str, row: int) -> None:
    graph = traced(TinyCausal(layers=2)).graph
    reports = run_pipeline(graph, step_pipeline(BLOCK, kv_dtype), Options(verify=True))
    caches = [node for node in placeholders(graph) if "cache" in node.meta]
    assert {tensor(node).dtype for node in caches} == {torch.uint8}
    assert {tuple(map(int, tensor(node).shape[1:])) for node in caches} == {(2, BLOCK, row)}
    assert {node.args[14] for node in nodes_of(graph, llmopt_ops.paged_attention.default)} == {kv_dtype}
    assert caches[0].meta["cache"].bytes_per_token() == 2 * 2 * row
    (report,) = (report for report in reports if report.name == "insert_kv_cache")
    assert report.notes == [f"2 attention layers, keys and values in {kv_dtype}"]


def test_insertion_cannot_be_disabled() -> None:
    graph = traced(TinyCausal()).graph
    reports = run_pipeline(graph, step_pipeline(BLOCK), Options(disabled_passes=("insert_kv_cache",)))
    assert not any(report.disabled for report in reports)
    assert placeholders(graph)[0].name == "input_ids"


def test_golden() -> None:
    item = InsertKVCache(block_size=BLOCK)
    graph = graph_before(item, AttentionOnly())
    before = copy_graph(graph)
    report = run_pass(item, graph)
    assert_golden(
        Rewritten(before, graph, report),
        """\
arg_0: f32[23, 16]
arg_1: Sym(s27)
arg_2: i64[1, s27]
arg_3: f32[64, 16]
arg_4: f32[16]
arg_5: f32[16]
arg_6: f32[23, 16]
embedding: f32[1, s27, 16] = aten.embedding.default(arg_0, arg_2)
arange: i64[s27] = aten.arange.default(arg_1, device=cpu, pin_memory=False)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_3, arange)
add: f32[1, s27, 16] = aten.add.Tensor(embedding, embedding_1)
view: f32[1, s27, 2, 8] = aten.view.default(add, [1, -1, 2, 8])
attention: f32[1, s27, 2, 8] = llmopt.attention.default(view, view, view, None, True, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(attention, [1, -1, 16])
layer_norm: f32[1, s27, 16] = llmopt.layer_norm.default(view_1, arg_4, arg_5, 1e-05)
linear: f32[1, s27, 23] = llmopt.linear.default(layer_norm, [arg_6], [None])
return [linear]
---
arg_0: i64[s27]
arg_1: i64[s27]
arg_2: i64[s27]
arg_3: i32[s45 + 1]
arg_4: i32[s45]
arg_5: i32[s45, s66]
arg_6: i64[s54]
arg_7: f32[s83, 2, 4, 8]
arg_8: f32[s83, 2, 4, 8]
arg_9: f32[23, 16]
arg_10: f32[64, 16]
arg_11: f32[16]
arg_12: f32[16]
arg_13: f32[23, 16]
unsqueeze: i64[1, s27] = aten.unsqueeze.default(arg_0, 0)
embedding: f32[1, s27, 16] = aten.embedding.default(arg_9, unsqueeze)
embedding_1: f32[s27, 16] = aten.embedding.default(arg_10, arg_1)
add: f32[1, s27, 16] = aten.add.Tensor(embedding, embedding_1)
view: f32[1, s27, 2, 8] = aten.view.default(add, [1, -1, 2, 8])
paged_attention: f32[1, s27, 2, 8] = llmopt.paged_attention.default(view, view, view, arg_7, arg_8, arg_2, arg_5, arg_3, arg_4, 0.3535533905932738, 0.0, 0, None, None)
view_1: f32[1, s27, 16] = aten.view.default(paged_attention, [1, -1, 16])
index_select: f32[1, s54, 16] = aten.index_select.default(view_1, 1, arg_6)
layer_norm: f32[1, s54, 16] = llmopt.layer_norm.default(index_select, arg_11, arg_12, 1e-05)
linear: f32[1, s54, 23] = llmopt.linear.default(layer_norm, [arg_13], [None])
squeeze: f32[s54, 23] = aten.squeeze.dim(linear, 0)
return [squeeze]""",  # noqa: E501
    )
