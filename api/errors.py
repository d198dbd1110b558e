"""Everything that llmopt raises on purpose, for `except llmopt.errors.InputError`."""

from __future__ import annotations

from llmopt.compiler.errors import (
    AdapterError,
    BackwardError,
    EngineDeadError,
    InputError,
    LlmoptError,
    OptionError,
    ProgramFileError,
    QueueFullError,
    RequestError,
    SamplingError,
    ToolchainError,
    UnsupportedError,
    VerificationError,
)

__all__ = [
    "AdapterError",
    "BackwardError",
    "EngineDeadError",
    "InputError",
    "LlmoptError",
    "OptionError",
    "ProgramFileError",
    "QueueFullError",
    "RequestError",
    "SamplingError",
    "ToolchainError",
    "UnsupportedError",
    "VerificationError",
]
