"""From what Dynamo hands over to a functional ATen graph over symbolic shapes.

`aot_export_module(pre_dispatch=True)` functionalises (an in-place write becomes a value and an entry in
`Captured.mutations`) and keeps composite ops such as linear, scaled_dot_product_attention and silu whole.

Parameters stay placeholders, so weights are inputs and never constants. Floats that Dynamo passes as zero-dimensional
tensors (module attributes such as an epsilon, under `dynamic=True`) are the one thing that is specialised: their
values are part of `Captured`, and the caller must capture again when one has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from llmopt.compiler.errors import UnsupportedError
from llmopt.compiler.graph import aten, fake_mode, mark_values, outputs, placeholders, refresh_values

# The graph may contain anything eager accepts here; quantized and complex numbers have no kernels and no tests yet.
SUPPORTED_DTYPES = frozenset(
    {
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)

SUPPORTED_DEVICES = ("cpu", "cuda")


@dataclass
class Captured:
    """A functional graph and how its inputs and outputs relate to the caller's.

    graph: placeholders are the caller's arguments one for one; the output lists first the new values of `mutations`,
        then what the caller returns.
    mutations: index of each argument that the caller's code wrote to, in the order of the first outputs.
    weights: for each argument the qualified name of the parameter or buffer that it is, or None for a user input.
    float_values: values that were specialised, by argument index.
    constants: tensors that the model's code makes from Python numbers; they are further arguments, behind the caller's.
    told: the fake values of the outputs, None for those of `mutations`: how they lie in memory is what Dynamo knows.
    """

    graph: fx.Graph
    mutations: list[int]
    weights: list[str | None]
    float_values: dict[int, float] = field(default_factory=dict)
    constants: list[torch.Tensor] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)

    @property
    def num_returned(self) -> int:
        """How many values the caller returns."""
        return len(outputs(self.graph)) - len(self.mutations)


def specialized_floats(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, float]:
    """Arguments that are Python floats which Dynamo wrapped into tensors, with their present values."""
    arguments = _arguments(gm, example_inputs)
    return {i: float(example_inputs[i]) for i, argument in enumerate(arguments) if argument.is_float}


def weight_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str | None]:
    """For each argument the qualified name of the parameter or buffer that it is, or None for a user input."""
    return [argument.weight for argument in _arguments(gm, example_inputs)]


@dataclass(frozen=True)
class _Argument:
    """What Dynamo knows about an argument: wrapped float or not, the weight that it is, its fake value."""

    is_float: bool
    weight: str | None
    value: Any


def _arguments(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[_Argument]:
    """Noted in the graph at its first capture: Dynamo clears its own notes, and other floats capture it again."""
    key = "llmopt_argument"
    for node, example in zip(placeholders(gm.graph), example_inputs, strict=True):
        if key not in node.meta:
            is_float = bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))
            node.meta[key] = _Argument(is_float, _weight_name(node), node.meta.get("example_value", example))
    return [node.meta[key] for node in placeholders(gm.graph)]


def _bake_floats(gm: fx.GraphModule, values: dict[int, float]) -> None:
    """Replaces `argument.item()` by the number wherever the argument is a wrapped float."""
    inputs = placeholders(gm.graph)
    for index, number in values.items():
        for item in list(inputs[index].users):
            if item.target != "item":
                raise UnsupportedError("a wrapped float is used as a tensor", operation=str(item.target))
            for user in list(item.users):
                swap = lambda n, item=item, number=number: number if n is item else n  # noqa: E731
                user.args = fx.node.map_arg(user.args, swap)
                user.kwargs = fx.node.map_arg(user.kwargs, swap)
            gm.graph.erase_node(item)
    gm.recompile()


def _drop_dropouts(gm: fx.GraphModule) -> None:
    """Replaces each dropout that does nothing by its input, which is what PyTorch returns then.

    Exporting refuses a write to a dropout's result, which models do at inference.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in (torch.nn.functional.dropout, torch.dropout):
            continue
        names = ("input", "p", "train" if node.target is torch.dropout else "training")
        given = {"p": 0.5, "training": True} | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        active = given.get("train", given["training"])
        if (active is False or given["p"] == 0) and isinstance(given["input"], Node):
            node.replace_all_uses_with(given["input"])
            gm.graph.erase_node(node)
    gm.recompile()


def _weight_name(node: Node) -> str | None:
    """Qualified name of the parameter or buffer behind a Dynamo placeholder, or None for a user's input."""
    argument = node.meta.get("grapharg")
    if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is None or argument is None:
        return None
    source, parts = argument.source, []
    while hasattr(source, "base"):
        key = getattr(source, "member", None) or getattr(source, "index", None)
        if isinstance(key, str) and key not in ("_modules", "_parameters", "_buffers"):
            parts.append(key)
        source = source.base
    return ".".join(reversed(parts)) or node.name


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Functionalises a Dynamo graph. `example_inputs` are the real arguments that Dynamo passed with it.

    Raises UnsupportedError, with the line of the user's model, for dtypes and devices that llmopt does not handle, and
    for what PyTorch's own export fails on.
    """
    nodes = placeholders(gm.graph)
    floats = specialized_floats(gm, example_inputs)
    weights = weight_names(gm, example_inputs)
    values = [argument.value for argument in _arguments(gm, example_inputs)]
    for node, val in zip(nodes, values, strict=True):
        if isinstance(val, torch.Tensor):
            _check_tensor(node, val)
    # Here, because it takes long to load and a graph that is kept from an earlier process is not captured.
    from torch._functorch.aot_autograd import aot_export_module

    copy = fx.GraphModule(gm, _copy_graph(gm.graph))
    _bake_floats(copy, floats)
    _drop_dropouts(copy)
    try:
        with torch.no_grad():
            module, signature = aot_export_module(copy, values, trace_joint=False, pre_dispatch=True, decompositions={})
    except Exception as error:  # whatever PyTorch cannot export, it runs
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedError(f"PyTorch cannot export the graph: {reason}") from error
    exported: Any = module
    mark_values(exported.graph)
    _drop_tokens(exported.graph, len(signature.input_tokens))
    inputs = {node.name: index for index, node in enumerate(placeholders(exported.graph))}
    if signature.buffers_to_mutate or signature.parameters_to_mutate:
        raise UnsupportedError("the model writes to a buffer that Dynamo did not lift to an input")
    mutations = [inputs[name] for name in signature.user_inputs_to_mutate.values()]
    constants = _lift_constants(exported)
    _move_to_device(exported.graph, constants)
    weights += [f"constant.{i}" for i in range(len(constants))]
    returned = [n.meta.get("val") if isinstance(n, Node) else n for n in outputs(exported.graph)[len(mutations) :]]
    return Captured(exported.graph, mutations, weights, floats, constants, [None] * len(mutations) + returned)


def _drop_tokens(graph: fx.Graph, count: int) -> None:
    """Removes the tokens that order side effects: the first arguments and outputs, which pure ops only pass on."""
    if not count:
        return
    results = outputs(graph)
    for token, result in zip(placeholders(graph)[:count], results[:count], strict=True):
        if token is not result or len(token.users) > 1:
            raise UnsupportedError("the graph has side effects that must keep their order")
    graph.output_node().args = (tuple(results[count:]),)
    for token in placeholders(graph)[:count]:
        graph.erase_node(token)


def _lift_constants(gm: fx.GraphModule) -> list[torch.Tensor]:
    """Turns tensor constants into placeholders behind the others, and returns their values.

    One without dimensions becomes the op that makes it, in which passes see the number.
    """
    mode, found = fake_mode(gm.graph), dict[str, Node]()
    constants: list[torch.Tensor] = []
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in found:
            constant = getattr(gm, name)
            if not isinstance(constant, torch.Tensor):
                raise UnsupportedError("the graph holds a constant that is no tensor", operation=name)
            how: dict[str, Any] = {"dtype": constant.dtype, "device": constant.device}
            if constant.ndim == 0:
                with gm.graph.inserting_before(node):
                    found[name] = gm.graph.call_function(aten.full.default, ([], constant.item()), how)
            else:
                inputs = placeholders(gm.graph)
                with gm.graph.inserting_after(inputs[-1]) if inputs else gm.graph.inserting_before():
                    found[name] = gm.graph.placeholder(f"constant_{len(constants)}")
                constants.append(constant.detach().clone())
            with mode:
                found[name].meta["val"] = torch.empty_strided(constant.shape, constant.stride(), **how)
        node.replace_all_uses_with(found[name])
        gm.graph.erase_node(node)
    return constants


def _move_to_device(graph: fx.Graph, constants: list[torch.Tensor]) -> None:
    """In a graph on a GPU, puts constants and numbers there too that the model's code makes on the CPU.

    Eager lets a zero-dimensional CPU tensor take part anywhere; a kernel on the GPU cannot read it.
    """
    inputs = placeholders(graph)
    devices = {n.meta["val"].device for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)}
    device = next((d for d in devices if d.type != "cpu"), None)
    if device is None:
        return
    mode = fake_mode(graph)
    for number, node in enumerate(inputs[len(inputs) - len(constants) :]):
        constant = constants[number] = constants[number].to(device)
        with mode:
            node.meta["val"] = torch.empty_strided(
                constant.shape, constant.stride(), dtype=constant.dtype, device=device
            )
    for node in graph.nodes:
        val = node.meta.get("val")
        if node.op == "call_function" and isinstance(val, torch.Tensor) and val.device.type == "cpu" and val.ndim == 0:
            kwargs = dict(node.kwargs)
            if "device" in kwargs:
                node.kwargs = {**kwargs, "device": device}
    refresh_values(graph)


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    mapping: dict[Node, Node] = {}
    result = copy.graph_copy(graph, mapping)
    copy.output(result)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy


def _check_tensor(node: Node, val: torch.Tensor) -> None:
    name = _weight_name(node) or node.name
    if val.dtype not in SUPPORTED_DTYPES:
        raise UnsupportedError(f"dtype {val.dtype} of {name} is not supported")
    if val.device.type not in SUPPORTED_DEVICES:
        known = ", ".join(SUPPORTED_DEVICES)
        raise UnsupportedError(f"device {val.device} of {name} is not supported; llmopt generates code for: {known}")
    if val.layout != torch.strided:
        raise UnsupportedError(f"layout {val.layout} of {name} is not supported")


def lift_checks(captured: Captured) -> list[str]:
    """Turns the checks of values that the caller's code makes into further results, and returns their messages.

    Each of those results must be true; whoever runs the graph raises RuntimeError with the message where it is not.
    """
    graph, messages = captured.graph, []
    found = graph.find_nodes(op="call_function", target=aten._assert_async.msg)
    for node in found:
        condition, message = node.args
        messages.append(message)
        captured.told.append(condition.meta["val"])
        graph.erase_node(node)
        graph.output_node().args = ((*outputs(graph), condition),)
    return messages


# Checks that exporting inserts; they hold by construction and only stand between other ops.
ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
        aten._assert_scalar.default,
    }
)
