"""What Dynamo knows while it hands a graph over: the function, the break that ended the graph, the guards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._guards import CompileContext, TracingContext

from llmopt.compiler.graph import location
from llmopt.compiler.report import GraphBreak, GraphReport


def describe_capture(gm: fx.GraphModule, report: GraphReport) -> None:
    """Notes frame, break and guards of the graph that is being compiled; nothing outside of a compilation."""
    context = TracingContext.try_get()
    if context is None:
        return
    compile_id = CompileContext.current_compile_id()
    report.frame = f"{_frame(gm)} (compile id {compile_id})" if compile_id is not None else _frame(gm)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        report.ends_at = describe_break(reason)
    report.guards = _guards(context)


def _frame(gm: fx.GraphModule) -> str:
    """The captured function: the outermost line of the first node that has one."""
    for node in gm.graph.nodes:
        trace = node.meta.get("stack_trace")
        if trace:
            head = trace.strip().splitlines()[0].strip()
            file, line, where = (part.strip() for part in [*head.removeprefix("File ").split(","), "", ""][:3])
            return f"{where.removeprefix('in ')}, {file.strip(chr(34))}:{line.removeprefix('line ')}"
    return location(next(iter(gm.graph.nodes))) or "a function without operations"


def describe_break(reason: Any) -> GraphBreak:
    """Dynamo's reason as one line, with the innermost line of the user's code."""
    text = str(reason.reason).strip()
    lines = [line.strip() for line in text.splitlines()]
    first = lines[0] if lines else "no reason given"
    explanation = next((line.removeprefix("Explanation:").strip() for line in lines if "Explanation:" in line), "")
    where = ""
    if reason.user_stack:
        frame = reason.user_stack[-1]
        where = f"{frame.filename}:{frame.lineno} in {frame.name}" + (f", code: {frame.line}" if frame.line else "")
    return GraphBreak(f"{first}: {explanation}" if explanation else first, where, text)


def breaks_so_far() -> Sequence[Any]:
    """Every graph break of this process, as Dynamo notes them."""
    from torch._dynamo import output_graph  # here, because whoever has no graph needs no Dynamo

    return list(output_graph.graph_break_reasons)  # type: ignore[attr-defined]


# What a guard asks of its value, in words; the rest is counted by kind.
_WORDS = {
    "TENSOR_MATCH": "same dtype, device, rank and fixed sizes",
    "EQUALS_MATCH": "same value",
    "CONSTANT_MATCH": "same value",
    "TYPE_MATCH": "same type",
    "ID_MATCH": "same object",
    "DICT_KEYS_MATCH": "same keys",
    "SEQUENCE_LENGTH": "same length",
    "HASATTR": "same attributes",
    "NONE_MATCH": "still None",
    "BOOL_MATCH": "same truth value",
}


def _name(source: Any) -> str:
    """The name of a source or guard; a method in some versions of PyTorch, an attribute in others."""
    return str(source.name() if callable(source.name) else source.name)


def _guards(context: Any) -> list[str]:
    """Relations between sizes first, then what is asked of each argument, then how many guards of other kinds."""
    found: list[str] = []
    env = context.fake_mode.shape_env if context.fake_mode is not None else None
    if env is not None:
        known = getattr(env, "var_to_sources", {})
        sources = {symbol: _name(names[0]) for symbol, names in known.items() if names}
        for guard in env.guards:
            expression = guard.expr.xreplace({s: type(s)(sources[s]) for s in guard.expr.free_symbols if s in sources})
            found.append(f"{expression}, from {guard.sloc}".split(" (_")[0])
    counts: Counter[str] = Counter()
    asked: dict[str, list[str]] = {}
    for guard in context.guards_context.dynamo_guards:
        kind, name = guard.create_fn_name(), _name(guard)
        if guard.source.name == "LOCAL" and kind in _WORDS:
            asked.setdefault(name, []).append(_WORDS[kind])
        elif kind != "SHAPE_ENV":
            counts[kind] += 1
    found += [f"{name}: {', '.join(dict.fromkeys(words))}" for name, words in asked.items()]
    if counts:
        listed = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        found.append(f"{sum(counts.values())} on modules, parameters and global state ({listed})")
    return list(dict.fromkeys(found))
