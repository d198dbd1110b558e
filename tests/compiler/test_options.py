"""Options: every field with valid and invalid values, unknown names, and the environment."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llmopt.compiler.errors import LlmoptError, OptionError
from llmopt.compiler.options import Options

# name -> (valid values, invalid values, what the error must say is allowed)
CASES: dict[str, tuple[list[Any], list[Any], str]] = {
    "dtype": (["auto", "float32", "bfloat16", "float16"], ["int8", "fp16", "", None, 16, True], "'bfloat16'"),
    "threads": ([0, 1, 1024], [-1, 1025, 1.0, "2", None, True], "0 to 1024"),
    "block_size": ([1, 16, 1024], [0, 1025, 16.0, "16", None, True], "1 to 1024"),
    "kv_cache_dtype": (["auto", "fp8", "int8", "int4"], ["bfloat16", "fp16", "", None, 8, True], "'int8'"),
    "kv_cache_memory_bytes": ([0, 1 << 40], [-1, 1e9, "1GB", None, False], "0 or more"),
    "gpu_memory_utilization": ([0.01, 0.9, 1], [0, 0.0, -0.5, 1.1, float("nan"), "0.9", None, True], "up to 1"),
    "swap_space_bytes": ([0, 1 << 40], [-1, 1e9, "1GB", None, False], "0 or more"),
    "enable_prefix_caching": ([True, False], [0, 1, "no", None], "True"),
    "max_model_len": ([0, 131072], [-1, 2.5, "4096", None, True], "0 or more"),
    "max_num_seqs": ([1, 4096], [0, -3, 4097, "8", None, True], "1 to 4096"),
    "max_num_batched_tokens": ([1, 1 << 20], [0, -1, 0.5, "2048", None, True], "1 or more"),
    "max_num_queued": ([0, 1, 1 << 20], [-1, 0.5, "9", None, True], "0 or more"),
    "async_scheduling": ([True, False, "auto"], [0, 1, "yes", None], "auto"),
    "batch_invariant": ([True, False], [0, 1, "yes", None], "True"),
    "enable_lora": ([True, False], [0, 1, "yes", None], "True"),
    "max_loras": ([1, 256], [0, -1, 257, 2.0, "4", None, True], "1 to 256"),
    "max_lora_rank": ([1, 16, 512], [0, 513, 8.0, "16", None, True], "1 to 512"),
    "enable_prompt_embeds": ([True, False], [0, 1, "yes", None], "True"),
    "disabled_passes": ([(), ("raise_rope",)], ["raise_rope", (1,), None, 3], "tuple of pass names"),
    "fuel": ([-1, 0, 7], [-2, 1.0, "7", None, True], "-1 or more"),
    "verify": ([True, False, "revert"], [0, 1, "yes", None], "True"),
    "record_graphs": ([True, False], [0, 1, "yes", None], "True"),
    "rewrite_log": (["", "rewrites.jsonl"], [0, None, True, ("a",)], "path"),
    "huge_pages": ([True, False], [0, 1, "yes", None], "True"),
    "graph_cache": ([True, False], [0, 1, "yes", None], "True"),
    "fallback": (["silent", "warn", "error"], ["ignore", "", None, True], "'warn'"),
}
VALID = [(name, value) for name, (good, _, _) in CASES.items() for value in good]
INVALID = [(name, value, allowed) for name, (_, bad, allowed) in CASES.items() for value in bad]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMOPT_DISABLE", "LLMOPT_FUEL", "LLMOPT_VERIFY", "LLMOPT_REWRITE_LOG", "LLMOPT_GRAPH_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_every_option_is_tested_and_documented() -> None:
    names = [field.name for field in dataclasses.fields(Options)]
    assert names == list(CASES)
    assert Options.__doc__ is not None
    for name in names:
        assert f"    {name}: " in Options.__doc__


@pytest.mark.parametrize(("name", "value"), VALID)
def test_valid_values(name: str, value: Any) -> None:
    assert getattr(Options.make({name: value}), name) == value
    assert getattr(Options(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value", "allowed"), INVALID)
def test_invalid_values(name: str, value: Any, allowed: str) -> None:
    for construct in (lambda: Options.make({name: value}), lambda: Options(**{name: value})):
        with pytest.raises(OptionError) as caught:
            construct()
        assert (caught.value.option, caught.value.value) == (name, value)
        assert allowed in caught.value.allowed
        assert name in str(caught.value) and repr(value) in str(caught.value) and allowed in str(caught.value)


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(OptionError) as caught:
        Options.make({"blocksize": 16})
    assert caught.value.option == "blocksize"
    assert "block_size" in caught.value.allowed
    assert isinstance(caught.value, LlmoptError) and isinstance(caught.value, ValueError)
    with pytest.raises(OptionError, match="quantisation"):
        Options.make(None, quantisation="int4")


def test_spellings_that_are_converted() -> None:
    assert Options.make({"dtype": torch.bfloat16}).dtype == "bfloat16"
    assert Options.make({"dtype": "float16"}).torch_dtype == torch.float16
    assert Options.make(None).torch_dtype is None
    assert Options.make({"disabled_passes": ["normalize"]}).disabled_passes == ("normalize",)
    with pytest.raises(OptionError, match="float64"):
        Options.make({"dtype": torch.float64})


def test_options_are_frozen_hashable_and_combined() -> None:
    options = Options.make({"fuel": 3}, verify=True)
    assert options == Options(fuel=3, verify=True) and hash(options) == hash(Options(fuel=3, verify=True))
    assert Options.make(options) is options
    assert Options.make(options, fuel=4) == Options(fuel=4, verify=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.fuel = 5  # type: ignore[misc]
    with pytest.raises(OptionError, match="fuel"):
        Options.make(options, fuel=-9)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_DISABLE", "raise_rope, raise_moe,")
    monkeypatch.setenv("LLMOPT_FUEL", "12")
    monkeypatch.setenv("LLMOPT_VERIFY", "1")
    options = Options.make()
    assert options.disabled_passes == ("raise_rope", "raise_moe")
    assert (options.fuel, options.verify) == (12, True)
    # What the caller gives wins; a finished Options is no longer touched.
    assert Options.make({"fuel": 3}).fuel == 3
    assert Options.make(Options()).fuel == -1
    monkeypatch.setenv("LLMOPT_VERIFY", "0")
    monkeypatch.setenv("LLMOPT_GRAPH_CACHE", "0")
    assert Options.make().verify is False and Options.make().graph_cache is False


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("LLMOPT_FUEL", "many", "whole number"),
        ("LLMOPT_VERIFY", "yes", "'1'"),
        ("LLMOPT_FUEL", "-5", "-1 or more"),
        ("LLMOPT_GRAPH_CACHE", "on", "'1'"),
    ],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(OptionError, match=value) as caught:
        Options.make()
    assert allowed in caught.value.allowed
