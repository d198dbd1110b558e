"""A digest of what a module would compute: its state, and all code that its forward may reach.

Source files would not do: whoever replaces a method of a class, a function of a module or an entry of a registry
changes what is computed and no file. So code is followed as it stands in memory: from the classes of the module's
parts, through the globals, closures and attributes that it names. Methods and attributes of modules count once any of
the code names them, which takes in more than is run. Python and PyTorch are covered by their versions and named only,
but for what does not come from their own files.

Values of tensors have no part; Python values that the code can read do.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import itertools
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, re.Pattern, range, slice),
)
_CALLED = ("forward", "__call__")
# Of these only classes, functions and modules count. What else progress bars hold comes to be when one is shown.
_VERSIONED = sys.stdlib_module_names | {"torch", "builtins", "tqdm"}
# Modules that code reaches through the package that they are in. Others come to be there when somebody imports them.
_PARTS = frozenset({"torch.nn", "torch.nn.functional", "torch.fft", "torch.linalg", "torch.special"})
# Where transformers read a model from: a copied folder holds the same model.
_ORIGIN = ("_name_or_path", "name_or_path")
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


def code_digest(module: nn.Module) -> str:
    """The digest; processes with equal versions of Python and PyTorch agree on it."""
    return _Walk(module).digest


class _Walk:
    """Describes everything once, in an order that depends on nothing but what is described."""

    def __init__(self, module: nn.Module) -> None:
        self._hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no number is given to two objects
        self._pending: list[Any] = []
        self._names: set[str] = set(_CALLED)
        self._spaces: list[tuple[bool, dict[str, Any]]] = []  # classes and modules: versioned, what is yet to be named
        self._add(self._refer(module))
        while self._pending or self._look_up():
            while self._pending:
                self._describe(self._pending.pop())
        self.digest = self._hash.hexdigest()

    def _add(self, text: str) -> None:
        self._hash.update(text.encode("utf-8", "backslashreplace") + b"\n")

    def _look_up(self) -> bool:
        """Refers to what classes and modules have under names that the code uses by now; whether there was any."""
        found = False
        for versioned, space in self._spaces:
            for name in sorted(name for name in space if name in self._names):
                value = space.pop(name)
                if not versioned or isinstance(value, type | types.FunctionType | types.ModuleType):
                    self._add(f"{name} {self._refer(value)}")
                    found = True
        return found

    def _refer(self, value: Any) -> str:
        """A text for a value; what has parts is described later, once."""
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, enum.Enum):
            return f"{_name(type(value))}.{value.name}"
        if isinstance(value, torch.Tensor):
            return f"tensor {value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
        if isinstance(value, types.BuiltinFunctionType):
            return f"builtin {value.__module__}.{value.__qualname__}"
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._numbers)
            self._kept.append(value)
            self._pending.append(value)
        return f"#{number}"

    def _all(self, values: Iterable[Any]) -> str:
        return " ".join(map(self._refer, values))

    def _describe(self, value: Any) -> None:
        self._add(f"#{self._numbers[id(value)]} is {self._text(value)}")

    def _text(self, value: Any) -> str:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            self._spaces.append((_versioned(value.__name__), _contents(value)))
            return f"module {value.__name__}"
        if isinstance(value, types.MethodType):
            return f"method {self._all((value.__func__, value.__self__))}"
        if isinstance(value, staticmethod | classmethod):
            return f"{type(value).__name__} {self._refer(value.__func__)}"
        if isinstance(value, property):
            return f"property {self._all((value.fget, value.fset))}"
        if isinstance(value, functools.cached_property):
            return f"property {self._refer(value.func)}"
        if isinstance(value, functools.partial):
            return f"partial {self._all((value.func, value.args, value.keywords))}"
        return self._instance(value)

    def _function(self, function: types.FunctionType) -> str:
        text = (
            f"function {function.__module__}.{function.__qualname__} {self._refer(vars(function).get('__wrapped__'))}"
        )
        cells = self._all(_content(cell) for cell in function.__closure__ or ())
        code = function.__code__
        if _is_versioned_file(code.co_filename):
            return f"{text} {cells}"  # a decorator of PyTorch's holds the function that it decorates
        space = function.__globals__
        used = [name for name in dict.fromkeys(_names(code)) if name in space]
        read = " ".join(f"{name}={self._refer(space[name])}" for name in used)
        defaults = self._all((function.__defaults__, function.__kwdefaults__))
        return f"{text} {cells} {self._refer(code)} {defaults} {read}"

    def _code(self, code: types.CodeType) -> str:
        self._names.update(code.co_names)
        self._names.update(c for c in code.co_consts if type(c) is str and c.isidentifier())  # getattr(x, "name")
        constants = self._all(code.co_consts)
        layout = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
        return f"code {code.co_code.hex()} {code.co_exceptiontable.hex()} {layout} {constants}"

    def _class(self, cls: type) -> str:
        if cls.__module__.partition(".")[0] not in sys.stdlib_module_names:
            space, versioned = dict(vars(cls)), _versioned(cls.__module__)
            if versioned:
                space.pop("__init__", None)  # Dynamo replaces that of nn.Module once it has been at work
            self._spaces.append((versioned, space))
        return f"class {_name(cls)} {self._all(cls.__bases__)}"

    def _instance(self, value: Any) -> str:
        """Containers by their items, others by class and attributes; what PyTorch keeps for itself is left out."""
        kind = type(value)
        text = f"instance {self._refer(kind)}"
        if isinstance(value, set | frozenset):
            return f"{text} {sorted(self._refer(item) for item in value if type(item) in _PLAIN)} {len(value)}"
        if isinstance(value, dict | types.MappingProxyType):
            text += " " + self._all(itertools.chain.from_iterable(list(value.items())))
        elif isinstance(value, list | tuple):
            text += " " + self._all(value)
        wrapped = getattr(value, "__wrapped__", None) if isinstance(value, functools._lru_cache_wrapper) else None
        if wrapped is not None:
            return f"{text} {self._refer(wrapped)}"
        if isinstance(value, nn.Module) or not _versioned(kind.__module__):
            state = getattr(value, "__dict__", None)
            if isinstance(state, Mapping):
                text += " " + self._all(
                    itertools.chain.from_iterable(item for item in state.items() if _is_state(item))
                )
        return text


def _is_state(item: tuple[Any, Any]) -> bool:
    """Whether an attribute has part; a hash that an object keeps of itself is another one in each process."""
    name = str(item[0])
    return not name.endswith("_hash") and name not in _ORIGIN


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _contents(module: types.ModuleType) -> dict[str, Any]:
    """What a module holds, without the modules that are below it."""

    def is_below(name: str, item: Any) -> bool:
        # By type: some objects of PyTorch warn when they are asked for their class.
        known = issubclass(type(item), types.ModuleType) and item.__name__ == f"{module.__name__}.{name}"
        return known and item.__name__ not in _PARTS

    return {name: item for name, item in vars(module).items() if not is_below(name, item)}


def _versioned(module: str) -> bool:
    return module.partition(".")[0] in _VERSIONED


def _is_versioned_file(name: str) -> bool:
    """Whether a source file is Python's or PyTorch's own; what claims a module of theirs need not be."""
    if name.startswith("<frozen"):
        return True
    return name.startswith(_TORCH) or (name.startswith(_STDLIB) and "site-packages" not in Path(name).parts)


def _names(code: types.CodeType) -> Iterable[str]:
    """Names that a function's code uses, those of the functions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
