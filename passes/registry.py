"""Passes that users have registered, and where in the pipelines they run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.compiler.errors import InputError, OptionError
from llmopt.compiler.pass_manager import ALL_PASS_NAMES, Pass


@dataclass(frozen=True)
class _Registered:
    item: Pass
    anchor: str
    behind: bool


_REGISTERED: list[_Registered] = []
_LOCK = threading.Lock()


def register_pass(item: Pass, *, after: str | None = None, before: str | None = None) -> None:
    """Runs a pass of your own in every graph that is compiled from now on.

    Exactly one of `after` and `before` names a pass: yours runs behind the last place of the former or ahead of the
    first place of the latter, and only in pipelines that hold it (`insert_kv_cache` is in the step pipeline alone).
    Passes that are registered at one place run in the order of their registration. `LLMOPT_DISABLE`, `LLMOPT_FUEL` and
    `LLMOPT_VERIFY` hold for them, too.

    Raises InputError for what is no `Pass` or has a name that is taken, OptionError for an unknown anchor.
    """
    if not isinstance(item, Pass):
        raise InputError(f"register_pass takes an instance of llmopt.Pass, got {item!r}")
    if (after is None) == (before is None):
        raise OptionError("after, before", (after, before), "the name of one pass, in exactly one of them")
    with _LOCK:
        if item.name in ALL_PASS_NAMES:
            raise InputError(f"a pass named {item.name!r} exists already; unregister_pass takes a registered one out")
        anchor = after if after is not None else str(before)
        if anchor not in ALL_PASS_NAMES:
            raise OptionError("after" if after is not None else "before", anchor, sorted(ALL_PASS_NAMES))
        _REGISTERED.append(_Registered(item, anchor, after is not None))
        ALL_PASS_NAMES.add(item.name)


def unregister_pass(name: str) -> None:
    """Takes a registered pass out again; InputError for a name that no registered pass has, or that others stand at."""
    with _LOCK:
        found = [entry for entry in _REGISTERED if entry.item.name == name]
        if not found:
            raise InputError(f"no registered pass is named {name!r}: {[entry.item.name for entry in _REGISTERED]}")
        anchored = [entry.item.name for entry in _REGISTERED if entry.anchor == name]
        if anchored:
            raise InputError(f"{anchored} are placed by {name!r}; take them out first")
        _REGISTERED.remove(found[0])
        ALL_PASS_NAMES.discard(name)


def registered_passes() -> tuple[str, ...]:
    """Names of the registered passes, in the order of their registration."""
    return tuple(entry.item.name for entry in _REGISTERED)


def with_registered(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """`passes` with the registered ones in their places."""
    result = list(passes)
    placed: dict[tuple[str, bool], int] = {}
    for entry in _REGISTERED:
        names = [item.name for item in result]
        if entry.anchor not in names:
            continue
        if entry.behind:
            earlier = placed.get((entry.anchor, True), 0)
            place = len(names) - names[::-1].index(entry.anchor) + earlier
            placed[(entry.anchor, True)] = earlier + 1
        else:
            place = names.index(entry.anchor)
        result.insert(place, entry.item)
    return tuple(result)
