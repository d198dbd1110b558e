"""Lets tokens of a step be given as embeddings instead of ids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import Rewriter, aten, nodes_of, placeholders, reachable, tensor
from llmopt.compiler.input_embeddings import INPUT_EMBEDDINGS
from llmopt.compiler.pass_manager import Pass, PassContext, PassReport
from llmopt.compiler.step import EMBEDS_INPUTS
from llmopt.compiler.vocabulary import llmopt_ops
from llmopt.passes.step_inputs import add_input, behind_caches, new_size


@dataclass(frozen=True)
class InsertPromptEmbeds(Pass):
    """Before: `x = mark(f(input_ids))`, the embeddings of the tokens as the model's embedding module gives them.
    After: `x = where(prompt_embeds_index >= 0, prompt_embeds[prompt_embeds_index], f(input_ids))`.

    Runs on a step graph whose capture was marked (`compiler/input_embeddings.py`). Adds the inputs EMBEDS_INPUTS behind
    the caches. Raises UnsupportedError where the model uses ids for more than these embeddings, which tokens without
    ids could not have.
    """

    name = "insert_prompt_embeds"
    preserves_signature = False
    required = True

    def run(self, graph: fx.Graph, context: PassContext) -> PassReport:
        report = PassReport(self.name)
        named = {node.name: node for node in placeholders(graph)}
        if "prompt_embeds" in named:
            return report
        if "input_ids" not in named or "logits_indices" not in named:
            raise UnsupportedError("prompts of embeddings are for step programs")
        mark = _mark(graph, named["input_ids"])
        embeddings, before = tensor(mark), behind_caches(placeholders(graph))
        rewriter = Rewriter(graph)
        ids = tensor(named["input_ids"])
        shapes = (ids.shape, (new_size(rewriter, "num_prompt_embeds"), embeddings.shape[-1]))
        dtypes = (ids.dtype, embeddings.dtype)
        index, given = (
            add_input(rewriter, before, name, shape, dtype, ids.device)
            for name, shape, dtype in zip(EMBEDS_INPUTS, shapes, dtypes, strict=True)
        )
        with rewriter.before(mark):
            is_given = rewriter.call(aten.ge.Scalar, index, 0)
            row = rewriter.call(aten.embedding.default, given, rewriter.call(aten.clamp_min.default, index, 0))
            chosen = rewriter.call(
                aten.where.self,
                rewriter.call(aten.unsqueeze.default, is_given, -1),
                rewriter.call(aten.unsqueeze.default, row, 0),
                mark.args[0],
            )
        rewriter.replace(mark, chosen)
        report.matched = 1
        return report


def _mark(graph: fx.Graph, ids: Node) -> Node:
    """The one place where embeddings of the tokens are taken; nothing else may depend on the ids."""
    marks = list(nodes_of(graph, INPUT_EMBEDDINGS))
    if len(marks) != 1:
        raise UnsupportedError(f"the model takes embeddings of its tokens in {len(marks)} places, not in one")
    if marks[0] not in reachable([ids], lambda node: node.users):
        raise UnsupportedError("the model's first embedding is not that of its tokens")
    # Their number is no secret.
    ends = {marks[0], *nodes_of(graph, aten.sym_size.int)}
    past = reachable([ids], lambda node: () if node in ends else node.users)
    # What a layer keeps in its cache counts as well.
    if past & {graph.output_node(), *nodes_of(graph, llmopt_ops.paged_attention.default)}:
        raise UnsupportedError("the model uses token ids besides their embeddings, and a prompt of embeddings has none")
    return marks[0]
