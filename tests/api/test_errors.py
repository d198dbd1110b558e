"""`llmopt.errors`: each class survives a process boundary with all that it says."""

from __future__ import annotations

import pickle  # noqa: TID251

import pytest

from llmopt import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_can_be_pickled(name: str) -> None:
    kind = getattr(errors, name)
    given: dict[type[Exception], Exception] = {
        errors.OptionError: errors.OptionError("threads", -1, ("0", "1")),
        errors.UnsupportedError: errors.UnsupportedError("no kernel", operation="aten.sin", location="model.py:3"),
    }
    error = given[kind] if kind in given else kind("what went wrong")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # this test's own bytes
    assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
