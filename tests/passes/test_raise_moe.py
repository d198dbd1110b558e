"""Mixtures of experts as transformers traces them, and changed ones that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.capturing import randomise
from graphs.rewriting import assert_golden, must_not_fire, ops_when_disabled, rewrite
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from llmopt.compiler.graph import nodes_of, tensor
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.raise_moe import RaiseMoe

HIDDEN, INNER, EXPERTS = 16, 24, 4
X = torch.randn(1, 5, HIDDEN)


def block(k: int = 2, act: str = "silu") -> nn.Module:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=k,
        hidden_act=act,
    )
    config._experts_implementation = "grouped_mm"
    return randomise(MixtralSparseMoeBlock(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "act", "word"), [(2, "silu", "silu"), (1, "gelu", "gelu_erf"), (3, "relu", "relu")])
def test_mixtral(k: int, act: str, word: str, dtype: torch.dtype) -> None:
    result = rewrite(RaiseMoe(), block(k, act).to(dtype), X.to(dtype), marked=[(0, 1)])
    assert result.report.matched == 1 and result.count("llmopt.moe") == 1
    (node,) = nodes_of(result.after, llmopt_ops.moe.default)
    assert node.args[5] == word
    assert int(tensor(node.args[1]).shape[1]) == k
    assert [n.op for n in node.args[3:5]] == ["placeholder", "placeholder"], "no copy of the experts"
    assert not [t for t in result.targets() if "grouped_mm" in t or "sort" in t]


def test_disabled() -> None:
    targets = ops_when_disabled(RaiseMoe(), block(), X)
    assert "llmopt.moe" not in targets and targets.count("llmopt.grouped_linear") == 2


def test_golden() -> None:
    assert_golden(
        rewrite(RaiseMoe(), block(), X),
        """\
arg_0: f32[1, 5, 16]
arg_1: f32[4, 16]
arg_2: f32[4, 48, 16]
arg_3: f32[4, 16, 24]
transpose: f32[4, 16, 48] = aten.transpose.int(arg_2, -2, -1)
transpose_1: f32[4, 24, 16] = aten.transpose.int(arg_3, -2, -1)
view: f32[5, 16] = aten.view.default(arg_0, [-1, 16])
linear: f32[5, 4] = llmopt.linear.default(view, [arg_1], [None])
softmax: f32[5, 4] = aten.softmax.int(linear, -1)
topk: (f32[5, 2], i64[5, 2]) = aten.topk.default(softmax, 2)
getitem: f32[5, 2] = getitem(topk, 0)
getitem_1: i64[5, 2] = getitem(topk, 1)
sum: f32[5, 1] = aten.sum.dim_IntList(getitem, [-1], True)
div: f32[5, 2] = aten.div.Tensor(getitem, sum)
view_1: i64[10] = aten.view.default(getitem_1, [-1])
sort: (i64[10], i64[10]) = aten.sort.default(view_1)
getitem_2: i64[10] = getitem(sort, 0)
getitem_3: i64[10] = getitem(sort, 1)
floor_divide: i64[10] = aten.floor_divide.default(getitem_3, 2)
index: f32[10, 16] = aten.index.Tensor(view, [floor_divide])
view_2: f32[10] = aten.view.default(div, [-1])
index_1: f32[10] = aten.index.Tensor(view_2, [getitem_3])
_to_copy: f32[10] = aten._to_copy.default(getitem_2, dtype=torch.float32)
histc: f32[4] = aten.histc.default(_to_copy, 4, 0, 3)
cumsum: i32[4] = aten.cumsum.default(histc, 0, dtype=torch.int32)
grouped_mm_fallback: f32[10, 48] = transformers.grouped_mm_fallback.default(index, transpose, cumsum)
split: (f32[10, 24], f32[10, 24]) = aten.split.Tensor(grouped_mm_fallback, 24, -1)
getitem_4: f32[10, 24] = getitem(split, 0)
getitem_5: f32[10, 24] = getitem(split, 1)
gated_act: f32[10, 24] = llmopt.gated_act.default(getitem_4, getitem_5, silu)
grouped_mm_fallback_1: f32[10, 16] = transformers.grouped_mm_fallback.default(gated_act, transpose_1, cumsum)
unsqueeze: f32[10, 1] = aten.unsqueeze.default(index_1, -1)
mul: f32[10, 16] = aten.mul.Tensor(grouped_mm_fallback_1, unsqueeze)
empty_like: i64[10] = aten.empty_like.default(getitem_3, pin_memory=False)
arange: i64[10] = aten.arange.default(10, device=cpu, pin_memory=False)
index_put: i64[10] = aten.index_put.default(empty_like, [getitem_3], arange)
index_2: f32[10, 16] = aten.index.Tensor(mul, [index_put])
view_3: f32[5, 2, 16] = aten.view.default(index_2, [5, 2, 16])
sum_1: f32[5, 16] = aten.sum.dim_IntList(view_3, [1])
view_4: f32[1, 5, 16] = aten.view.default(sum_1, [1, 5, 16])
return [view_4]
---
arg_0: f32[1, 5, 16]
arg_1: f32[4, 16]
arg_2: f32[4, 48, 16]
arg_3: f32[4, 16, 24]
view: f32[5, 16] = aten.view.default(arg_0, [-1, 16])
linear: f32[5, 4] = llmopt.linear.default(view, [arg_1], [None])
softmax: f32[5, 4] = aten.softmax.int(linear, -1)
topk: (f32[5, 2], i64[5, 2]) = aten.topk.default(softmax, 2)
getitem: f32[5, 2] = getitem(topk, 0)
getitem_1: i64[5, 2] = getitem(topk, 1)
sum: f32[5, 1] = aten.sum.dim_IntList(getitem, [-1], True)
div: f32[5, 2] = aten.div.Tensor(getitem, sum)
moe: f32[5, 16] = llmopt.moe.default(view, getitem_1, div, arg_2, arg_3, silu)
view_1: f32[1, 5, 16] = aten.view.default(moe, [1, 5, 16])
return [view_1]""",
    )


class Experts(nn.Module):
    """The traced computation written out, with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.turned = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.narrow = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 8))
        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Any:
        change, k = self.change, 2
        weights, ids = torch.topk(torch.softmax(F.linear(x, self.router), -1), k)
        if change == "ids as a vector":
            weights, ids = weights.reshape(-1), ids.reshape(-1)
        flat, order = torch.sort(ids.reshape(-1), descending=change == "sorted downwards")
        rows = x.repeat_interleave(k, 0) if change == "rows not gathered" else x[order // k]
        ends = torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        if change == "other ends":
            ends = torch.full_like(ends, 2).cumsum(0, dtype=torch.int32)
        mm = torch.ops.transformers.grouped_mm_fallback
        both = mm(rows, self.turned if change == "weights [E, K, N]" else self.gate_up.mT, ends)
        gate, up = both.split(8, -1)[:2] if change == "parts of more" else both.chunk(2, -1)
        if change == "up first":
            gate, up = up, gate
        hidden = F.silu(gate) + up if change == "no gate" else F.silu(gate) * up
        down = self.narrow if change == "parts of more" else self.down
        y = mm(hidden, down.mT, ends.clamp(max=3) if change == "ends of its own" else ends)
        if change == "rounded":
            y = y.bfloat16().float()
        if change != "not scaled":
            y = y * weights.reshape(-1)[flat if change == "scaled by others" else order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        if change == "one place":
            inverse[order] = torch.arange(1)
        else:
            inverse[order] = torch.arange(order.shape[0])
        back = y[order] if change == "scattered wrongly" else y[inverse]
        rows_of = back.view(-1, k, HIDDEN)
        return rows_of.amax(1) if change == "not summed" else rows_of.sum(1)


def test_the_computation_written_out() -> None:
    assert rewrite(RaiseMoe(), randomise(Experts()), X[0]).count("llmopt.moe") == 1


def test_weights_the_other_way_round() -> None:
    result = rewrite(RaiseMoe(), randomise(Experts("weights [E, K, N]")), X[0])
    (node,) = nodes_of(result.after, llmopt_ops.moe.default)
    assert tuple(tensor(node.args[3]).shape) == (EXPERTS, 2 * INNER, HIDDEN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rows not gathered", "rows are not gathered by expert"),
        ("not scaled", "expert outputs are not scaled by the router"),
        ("scaled by others", "expert outputs are not scaled by the router"),
        ("scattered wrongly", "expert outputs are not scattered back"),
        ("one place", "expert outputs are scattered by something else than the inverse order"),
        ("not summed", "expert outputs are not summed over the experts of a row"),
        ("sorted downwards", "expert ids are not sorted in ascending order"),
        ("other ends", "the ends of the groups are not counted from the expert ids"),
        ("ends of its own", "the two products are not over the same groups"),
        ("rounded", "expert outputs are not scaled by the router"),
        ("parts of more", None),
        ("no gate", None),
        ("up first", None),
    ],
)
def test_near_misses(change: str, reason: str | None) -> None:
    must_not_fire(RaiseMoe(), reason, randomise(Experts(change)), X[0])
