"""Everything that llmopt raises on purpose. One small tree, so that a caller can catch as widely as it wants."""

from __future__ import annotations

from collections.abc import Iterable


class LlmoptError(Exception):
    """Base of every error of llmopt."""


class OptionError(LlmoptError, ValueError):
    """An option that does not exist, or a value that it does not take.

    Attributes: `option`, `value` and `allowed`, a sentence or list of what would have been accepted.
    """

    def __init__(self, option: str, value: object, allowed: str | Iterable[object]) -> None:
        self.option, self.value = option, value
        self.allowed = allowed if isinstance(allowed, str) else "one of " + ", ".join(map(repr, allowed))
        super().__init__(f"option {option!r}: got {value!r}, allowed is {self.allowed}")

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, object, str]]:
        """Made again from its arguments: what `Exception` keeps for pickle is only the message."""
        return type(self), (self.option, self.value, self.allowed)


class InputError(LlmoptError, ValueError):
    """A request that cannot be served as it stands: an empty prompt, a token id out of range, a prompt too long."""


class AdapterError(InputError):
    """A LoRA adapter that cannot be used: its files are missing or damaged, or do not fit the model or the options."""


class QueueFullError(LlmoptError):
    """As many requests wait as `max_num_queued` allows. Nothing is wrong with the request: send it again later."""


class RequestError(LlmoptError, RuntimeError):
    """A request that failed while it ran, alone: logits that are not finite, or an exception in its step.

    The exception behind it is its `__cause__`.
    """


class EngineDeadError(LlmoptError, RuntimeError):
    """The engine is no more, and with it all its requests: it failed outside of any one of them, or was shut down.

    The exception behind it is its `__cause__`.
    """


class SamplingError(RequestError):
    """No token can be chosen for one sequence: its logits hold NaN, nothing may follow, or its grammar failed.

    Given in place of a token, so that the other sequences of the batch go on.
    """


class UnsupportedError(LlmoptError):
    """A model, dtype or device that llmopt does not handle, with the operation and the line of the user's model.

    Attributes: `reason`, `operation` (the node's target, or None) and `location` ("file.py:12 in forward", or None).
    """

    def __init__(self, reason: str, *, operation: str | None = None, location: str | None = None) -> None:
        self.reason, self.operation, self.location = reason, operation, location
        where = f"\n  at {location}" if location else ""
        super().__init__(f"{operation}: {reason}{where}" if operation else f"{reason}{where}")


class ToolchainError(LlmoptError):
    """No usable C++ compiler, or one that failed; says which package to install, or what the compiler printed."""


class VerificationError(LlmoptError):
    """A graph broke an invariant of its level, or a pass changed a result by more than its budget."""


class ProgramFileError(LlmoptError):
    """A program file that is damaged, hostile, or made for something else than this machine and version."""


class BackwardError(LlmoptError, RuntimeError):
    """A backward pass through a compiled program, which computes inference only."""
