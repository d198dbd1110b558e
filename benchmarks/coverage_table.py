"""What the coverage sweep found, in Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tiny_models import OTHERS, TYPES

Record = dict[str, Any]
GOOD_SHARE = 0.90


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _notes(record: Record) -> str:
    """What a reader has to know of a type: the error, refused graphs, and the fallbacks in short."""
    if "error" in record:
        return str(record["error"])[:120]
    refused = [re.search(r"error: .*", text) or re.match(".*", text) for text in record.get("refused", [])]
    parts = [f"refused: {text[0][:80]}" for text in refused[:1] if text]
    ops = Counter({f["op"].removeprefix("aten.").removesuffix(".default"): 0 for f in record.get("fallbacks", [])})
    for item in record.get("fallbacks", []):
        ops[item["op"].removeprefix("aten.").removesuffix(".default")] += item["count"]
    parts += [f"{count} {op}" for op, count in ops.most_common(5)]
    return ", ".join(parts) + (", ..." if len(ops) > 5 else "")


def _peer_fault(peer: Record) -> str:
    """What is wrong with a peer's result, in a word."""
    return "" if not peer or peer["right"] else " (error)" if "error" in peer else " (wrong)"


def summary(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The headline figures, by name."""
    causal = [record for record in records if record["type"] in TYPES]
    others = [record for record in records if record["type"] in OTHERS]
    statuses = Counter(record["status"] for record in causal)
    shares = [r["flop_share"] for r in causal if r["status"] == "right" and r.get("flop_share") is not None]
    good = sum(share >= GOOD_SHARE for share in shares)
    return [
        ("causal types", f"{len(TYPES)}, of which {len(causal)} were run"),
        ("of these with a batch of 1, too", str(sum([1, 19] in record.get("shapes", []) for record in causal))),
        ("run in eager mode", str(len(causal) - statuses["no eager"])),
        ("right", f"**{statuses['right']} of {len(TYPES)}**"),
        ("silently wrong", str(statuses["wrong"])),
        ("errors, crashes, timeouts", f"{statuses['error']}, {statuses['crash']}, {statuses['timeout']}"),
        ("same greedy tokens", str(sum(bool(record.get("tokens_equal")) for record in causal))),
        (f"right, with {GOOD_SHARE:.0%} or more of the FLOPs in llmopt's kernels", str(good)),
        ("encoders and others, right", f"{sum(r['status'] == 'right' for r in others)} of {len(OTHERS)}"),
        *_beside_inductor(causal),
    ]


def _beside_inductor(records: Sequence[Record]) -> list[tuple[str, str]]:
    """How many types Inductor gets right. Nothing where it was not run."""
    right = [record["inductor"]["right"] for record in records if "inductor" in record]
    return [("right by Inductor, of those that it was run on", f"{sum(right)} of {len(right)}")] if right else []


def table(
    records: Sequence[Record], shapes: Sequence[tuple[int, int]], tolerance: float, conditions: Mapping[str, Any]
) -> str:
    """The results in Markdown."""
    lines = ["# Coverage of transformers' models", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in summary(records)), ""]
    lines += [
        f"Tiny random models in float32 without a cache; shapes {', '.join(f'{b} x {s}' for b, s in shapes)}. Right: "
        f"no logit differs by more than {tolerance:g} standard deviations. FLOPs are those of matrix products and "
        "attention in eager mode; the share is what does not reach ATen. Compile time is that of the first call, "
        "beside other work and with what other types left in the caches: it says how long one waits, and compares "
        "nothing (`compile_cpu.py` does). Inductor runs without a batch of 1. "
        "`python benchmarks/model_coverage.py` makes this file.",
        "",
        ", ".join(f"{name} {value}" for name, value in conditions.items()),
        "",
        "| type | class | result | max diff | tokens | graphs | breaks | FLOP share | compile s | Inductor s | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        tokens = {True: "equal", False: "differ", None: "-"}[r.get("tokens_equal")]
        peer = r.get("inductor", {})
        other = f"{_number(peer.get('compile_s'), '.1f')}{_peer_fault(peer)}"
        share, difference = _number(r.get("flop_share"), ".0%"), _number(r.get("difference"), ".1e")
        cells = [r["type"], r["class"], r["status"], difference, tokens, _number(r.get("graphs"), "d")]
        cells += [_number(r.get("graph_breaks"), "d"), share, _number(r.get("compile_s"), ".1f"), other, _notes(r)]
        lines.append("| " + " | ".join(re.sub(r"[|\s]+", " ", cell) for cell in cells) + " |")
    return "\n".join([*lines, "", *_reasons(records)]) + "\n"


def _reasons(records: Sequence[Record]) -> list[str]:
    """Why ops run on ATen, and how often graphs end early, over all types."""
    calls, types = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    breaks: Counter[str] = Counter()
    for record in records:
        for item in record.get("fallbacks", []):
            calls[item["op"], item["reason"]] += item["count"]
        types.update({(item["op"], item["reason"]) for item in record.get("fallbacks", [])})
        breaks.update({re.split(r" Explanation:| Hint:", text)[0] for text in record.get("graph_break_reasons", [])})
    lines = ["## Ops on ATen, and why", "", "| op | reason | types | calls |", "|---|---|---|---|"]
    for (op, reason), number in types.most_common():
        lines.append(f"| `{op.removesuffix('.default')}` | {reason} | {number} | {calls[op, reason]} |")
    lines += ["", "## Breaks of the graph, as Dynamo explains them", "", "| reason | types |", "|---|---|"]
    return [*lines, *(f"| {reason} | {number} |" for reason, number in breaks.most_common())]
