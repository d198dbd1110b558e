"""Working with FX graphs: typed access to values, insertion of nodes that keep their metadata, printing.

Every node that computes something carries `meta["val"]`, the fake tensor, symbolic integer or tuple that it stands for.
All passes insert nodes through `Rewriter`, which computes that value, so shapes, dtypes and strides never go stale.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError, VerificationError

aten = torch.ops.aten

# Ops whose result shares the memory of their first argument.
VIEW_OPS: frozenset[Any] = frozenset(
    {
        aten.alias.default,
        aten.chunk.default,
        aten.detach.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.mT.default,
        aten.narrow.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.swapaxes.default,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)


def is_op(node: object, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> Any:
    """The fake value of a node; raises KeyError when a pass forgot to set it."""
    return node.meta["val"]


def tensor(node: Node) -> torch.Tensor:
    """The fake tensor of a node that computes one."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor but {type(val).__name__}")
    return val


def is_tensor(node: object) -> bool:
    """Whether `node` is a graph node that computes one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def to_expr(size: Any) -> sympy.Expr:
    """A size (int, SymInt, or the node of one) as a sympy expression."""
    if isinstance(size, Node):
        size = value(size)
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return bool(sympy.expand(to_expr(a) - to_expr(b)) == 0)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def may_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal at the sizes that the graph was captured with; true where these are not known."""
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in (a, b)]
    return None in hints or bool(hints[0] == hints[1])


def is_view(node: Node) -> bool:
    """Whether a node always looks at its first argument's memory: a view op, or an element of one that splits."""
    viewed = node.args[0] if node.target is operator.getitem else node
    return isinstance(viewed, Node) and viewed.op == "call_function" and viewed.target in VIEW_OPS


def view_base(node: Node) -> Node:
    """The node that owns the memory which `node` looks at: walks up views and elements of split results."""
    while is_view(node):
        node = node.args[0]
    return node


def location(node: Node) -> str | None:
    """The line of the user's model that a node came from: "file.py:12 in forward, code: ..."."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    rows = [row.strip() for row in trace.strip().splitlines() if row.strip()]
    for i in range(len(rows) - 1, -1, -1):
        if rows[i].startswith("File "):
            file, line, where = (part.strip() for part in [*rows[i][5:].split(","), "", ""][:3])
            code = f", code: {rows[i + 1]}" if i + 1 < len(rows) else ""
            return f"{file.strip(chr(34))}:{line.removeprefix('line ')} {where}{code}"
    return None


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the values of `graph` belong to."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise UnsupportedError("the graph computes no tensor")


def fake_call(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `target` returns on the fake values of the nodes in `args` and `kwargs`."""
    args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    # Inference tensors and autograd views would leak into the strides and versions of fakes.
    with mode, torch.no_grad(), enable_python_dispatcher():
        return target(*args, **kwargs)


class Rewriter:
    """Edits one graph. `call` inserts where `at(node)` points, with values and the origin of the node replaced."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = fake_mode(graph)
        self._origin: Node | None = None

    def before(self, node: Node) -> Any:
        """Context manager: insert before `node`, inheriting its source location."""
        self._origin = node
        return self.graph.inserting_before(node)

    def after(self, node: Node) -> Any:
        """Context manager: insert after `node`, inheriting its source location."""
        self._origin = node
        return self.graph.inserting_after(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Inserts `target(*args, **kwargs)` with its fake value."""
        val = fake_call(self.mode, target, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = val
        node.meta[_MADE_FROM] = _Operands.of(node)
        if self._origin is not None and "stack_trace" in self._origin.meta:
            node.meta["stack_trace"] = self._origin.meta["stack_trace"]
        return node

    def reshape(self, node: Node, sizes: Sequence[Any]) -> Node:
        """Inserts a view of `node` in another shape, of a dense copy where its strides allow no view."""
        try:
            return self.call(aten.view.default, node, list(sizes))
        except (RuntimeError, ValueError):
            dense = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
            return self.call(aten.view.default, dense, list(sizes))

    def replace(self, node: Node, by: Node) -> None:
        """Every user of `node` reads `by` from now on; `node` and what only it needed is erased.

        Raises VerificationError, with the graph as it was, where `by` is of another dtype, device or shape.
        """
        if not _stands_for(node.meta.get("val"), by.meta.get("val")):
            old, new = (_type_and_device(n.meta.get("val")) for n in (node, by))
            raise VerificationError(f"{node.name} ({node.target}) would change from {old} to {new}")
        node.replace_all_uses_with(by)
        self.erase(node)

    def erase(self, node: Node) -> None:
        """Removes `node` if nothing uses it, and then its arguments likewise."""
        if node.users or node.op in ("placeholder", "output") or node.graph is not self.graph:
            return
        inputs = node.all_input_nodes
        if node._erased:
            return
        self.graph.erase_node(node)
        for child in inputs:
            self.erase(child)


def refresh_values(graph: fx.Graph) -> None:
    """Recomputes `meta["val"]` of every node that reads other values than those that it was computed from, in order.

    Inserts a copy before a view whose input no longer allows it.
    """
    rewriter = Rewriter(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.meta.get(_MADE_FROM) == _Operands.of(node):
            continue
        with rewriter.before(node):
            try:
                fresh = _evaluate(rewriter, node)
            except (RuntimeError, ValueError):
                if not is_op(node, aten.view.default):
                    raise
                flat = rewriter.call(aten.clone.default, node.args[0], memory_format=torch.contiguous_format)
                node.update_arg(0, flat)
                fresh = _evaluate(rewriter, node)
        if not _alike(node.meta.get("val"), fresh):  # else what reads it need not be computed again
            node.meta["val"] = fresh
        node.meta[_MADE_FROM] = _Operands.of(node)


def mark_values(graph: fx.Graph) -> None:
    """Declares that every node's `meta["val"]` is what its op gives on the values that it reads, as after tracing."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta[_MADE_FROM] = _Operands.of(node)


def _evaluate(rewriter: Rewriter, node: Node) -> Any:
    return fake_call(rewriter.mode, node.target, node.args, node.kwargs)


_MADE_FROM = "made_from"  # in a node's meta: what its value was computed from


class _Operands:
    """An op with its arguments, nodes by their values, which are told apart by identity: nobody changes a value."""

    __slots__ = ("call", "values")

    def __init__(self, call: Any, values: list[Any]) -> None:
        self.call, self.values = call, values

    @classmethod
    def of(cls, node: Node) -> _Operands:
        values: list[Any] = []
        call = fx.node.map_arg((node.args, node.kwargs), lambda n: values.append(n.meta.get("val")))
        return cls((node.target, call), values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Operands) or len(self.values) != len(other.values):
            return False
        return all(map(operator.is_, self.values, other.values)) and bool(self.call == other.call)

    __hash__ = None  # type: ignore[assignment]


def _alike(old: Any, new: Any) -> bool:
    """Whether two fake values are the same to whoever reads them: type, sizes, and where the entries lie."""
    if isinstance(new, list | tuple):
        return isinstance(old, list | tuple) and len(old) == len(new) and all(map(_alike, old, new))
    if not isinstance(new, torch.Tensor):
        return type(old) is type(new) and _size_or_self(old) == _size_or_self(new)
    if not isinstance(old, torch.Tensor) or old.dtype != new.dtype or old.device != new.device or old.ndim != new.ndim:
        return False
    pairs: list[tuple[Any, Any]] = [*zip(old.shape, new.shape, strict=True)]
    pairs += zip(old.stride(), new.stride(), strict=True)
    pairs.append((old.storage_offset(), new.storage_offset()))
    return all(_size_or_self(a) == _size_or_self(b) for a, b in pairs)


def _stands_for(old: Any, new: Any) -> bool:
    """Whether users of a value may read the other: a tensor of the same dtype, device and shape."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) == isinstance(new, torch.Tensor)
    # Sizes at capture: two expressions of one size need not be proved equal by every rewrite.
    alike = old.ndim == new.ndim and all(map(may_equal, old.shape, new.shape))
    return alike and old.dtype == new.dtype and old.device == new.device


def _size_or_self(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def nodes_of(graph: fx.Graph, *targets: Any) -> Iterator[Node]:
    """The calls of `targets`, in graph order; safe against erasing while iterating."""
    for node in list(graph.nodes):
        if not node._erased and is_op(node, *targets):
            yield node


def placeholders(graph: fx.Graph) -> list[Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def outputs(graph: fx.Graph) -> list[Any]:
    """The flat list of what a graph returns."""
    return list(graph.output_node().args[0])


def reachable(start: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All nodes that `step` leads to from `start`, `start` included."""
    seen: set[Node] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(step(node))
    return seen


def _type_text(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        short = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b8"}
        name = str(val.dtype).removeprefix("torch.")
        stem = name.rstrip("0123456789")
        sizes = ", ".join(str(s) for s in val.shape)
        return f"{short.get(stem, stem)}{name[len(stem) :]}[{sizes}]"
    if isinstance(val, torch.SymInt):
        return f"Sym({val})"
    if isinstance(val, list | tuple):
        return "(" + ", ".join(_type_text(v) for v in val) + ")"
    return type(val).__name__


def _type_and_device(val: Any) -> str:
    device = f" on {val.device}" if isinstance(val, torch.Tensor) else ""
    return f"{_type_text(val)}{device}"


def _arg_text(arg: Any) -> str:
    if isinstance(arg, list | tuple):
        return "[" + ", ".join(map(_arg_text, arg)) + "]"
    return str(arg)


def graph_text(graph: fx.Graph, renumber: bool = True) -> str:
    """A graph as readable Python, one line a node with its type.

    `renumber` names nodes by op in order of definition, so that equal graphs print equally. Without it they keep their
    own names, which a pass does not change: so two states of one graph can be compared line by line.
    """
    names: dict[Node, str] = {}
    count: dict[str, int] = {}
    rows = []
    rename = lambda arg: fx.node.map_arg(arg, lambda n: _Name(names.get(n, n.name)))  # noqa: E731
    for node in graph.nodes:
        if node.op == "output":
            rows.append(f"return {_arg_text(rename(node.args[0]))}")
            continue
        if node.op == "placeholder":
            stem = "arg"
        else:
            stem = (
                str(node.target).split(".")[-2] if "." in str(node.target) else node._pretty_print_target(node.target)
            )
            stem = stem.split(".")[-1]
        number = count[stem] = count.get(stem, -1) + 1
        names[node] = f"{stem}_{number}" if number or node.op == "placeholder" else stem
        if not renumber:
            names[node] = node.name
        label = f"{names[node]}: {_type_text(node.meta.get('val'))}"
        if node.op == "placeholder":
            rows.append(label)
            continue
        args = [_arg_text(rename(a)) for a in node.args]
        args += [f"{k}={_arg_text(rename(v))}" for k, v in node.kwargs.items()]
        target = str(node.target) if "." in str(node.target) else stem
        rows.append(f"{label} = {target}({', '.join(args)})")
    return "\n".join(rows)


class _Name(str):
    """A node's printed name, which must not be quoted."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
