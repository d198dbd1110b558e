"""The parameters of a request, checked before any work."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.compiler.errors import OptionError
from llmopt.runtime.sampling.checks import (
    check_flag,
    check_real,
    check_whole,
    checked_bias,
    checked_ids,
    checked_texts,
    shortened,
)

# Bounds on what one request may ask for: generous for use, small against a process's memory.
MAX_SEQUENCES = 1024
MAX_LOGPROBS = 128
MAX_TOKENS = 1 << 24
# Stop texts: how many, how long each, and how long together, for they are made ready when a request comes.
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_CHARACTERS = 256, 4096, 16384
MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 1024, 256
MAX_IDS = 1 << 20
MAX_BIASES = 1 << 14
# Below this a temperature is greedy search, as in vLLM: logits divided by less lose all meaning.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must look like: exactly one of the first five, as in vLLM.

    json: a JSON schema, as text or as a dict.
    regex: a regular expression for the whole output (Rust's syntax: no look-around and no back references).
    choice: one of these texts.
    grammar: a context-free grammar, in Lark's format (llguidance's dialect) or GBNF.
    json_object: any JSON object.
    disable_any_whitespace: JSON without optional white space.
    whitespace_pattern: a regular expression for optional white space in JSON.

    Raises OptionError when none or several are given, or one has the wrong type. What it contains is checked when it is
    compiled (`ConstraintCompiler`).
    """

    json: str | Mapping[str, object] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        check_flag("json_object", self.json_object)
        check_flag("disable_any_whitespace", self.disable_any_whitespace)
        if self.choice is not None:
            object.__setattr__(self, "choice", checked_texts("choice", self.choice, 4096, 4096))
            if not self.choice:
                raise OptionError("choice", self.choice, "at least one text")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            raise OptionError("json", shortened(self.json), "a JSON schema as text or dict")
        for name in ("regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text):
                raise OptionError(name, shortened(text), "a non-empty text")
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise OptionError(
                "structured_outputs", given or None, "exactly one of json, regex, choice, grammar, json_object"
            )
        if given[0] not in ("json", "json_object"):
            for name in ("disable_any_whitespace", "whitespace_pattern"):
                if getattr(self, name):
                    raise OptionError(name, getattr(self, name), "for json and json_object only")
        elif self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise OptionError("whitespace_pattern", self.whitespace_pattern, "None with disable_any_whitespace")

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        texts = (name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None)
        return next(texts, "json_object")


class RequestOutputKind(enum.Enum):
    """Which outputs `AsyncLLM` gives of a request, as in vLLM.

    CUMULATIVE: all that is known, again and again. DELTA: what is new. FINAL_ONLY: one, at the end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is continued; names and defaults as in vLLM, `typical_p` as in transformers.

    n, best_of: how many continuations are returned, of how many that are generated (None: as many); the best have the
        highest sum of log probabilities.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens that were generated before, once, and
        once for each time. As in OpenAI's API.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and output (Keskar et al.,
        2019).
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p: nucleus, the likeliest tokens up to this probability (Holtzman et al., 2020).
    top_k: the k likeliest tokens; 0 or -1 is all.
    min_p: least probability, relative to the likeliest token (Nguyen et al., 2024).
    typical_p: the tokens whose information is nearest to its expectation, up to this probability (Meister et al.,
        2023).
    seed: makes a request repeatable, alone and in any batch; None takes one from torch's default generator.
    stop, stop_token_ids: texts and ids that end a request.
    include_stop_str_in_output: keep what ended the request, the stop text or the stop token's, at the end of the text.
    bad_words: texts that are not generated: the token that would complete one is not chosen.
    ignore_eos: go on at the end of sequence.
    max_tokens: how many tokens to generate at most; None is up to the longest sequence.
    min_tokens: before so many tokens neither the end of sequence nor stop tokens are chosen, and no stop text counts.
    logprobs, prompt_logprobs: give log probabilities of so many likeliest tokens, and of the one that stands there, at
        each position; of the model's own distribution, before anything else here changes it.
    detokenize: give text; without it only token ids.
    skip_special_tokens, spaces_between_special_tokens: leave special tokens out of the text; or keep them, with the
        spaces that the tokenizer puts between them or without.
    structured_outputs: what the output must look like.
    logit_bias: token ids and what is added to their logits.
    allowed_token_ids: no other token is chosen.
    output_kind: what `AsyncLLM` gives while the request runs; FINAL_ONLY with best_of above n, whose best are known at
        the end. `LLM` pays no attention to it.

    Raises OptionError, naming option, value and what is allowed.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                check_flag(field.name, getattr(self, field.name))
        given = self.structured_outputs
        if given is not None and not isinstance(given, StructuredOutputsParams):
            raise OptionError("structured_outputs", shortened(given), "StructuredOutputsParams or None")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise OptionError("output_kind", shortened(self.output_kind), list(RequestOutputKind))
        self._check_together()

    def _check_numbers(self) -> None:
        check_whole("n", self.n, 1, MAX_SEQUENCES)
        for name in ("presence_penalty", "frequency_penalty"):
            check_real(name, getattr(self, name), -2.0, 2.0)
        check_real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        check_real("temperature", self.temperature, 0.0, 100.0)
        check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_real("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        check_real("min_p", self.min_p, 0.0, 1.0)
        check_whole("top_k", self.top_k, -1, (1 << 31) - 1)
        check_whole("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        optional = {"max_tokens": (1, MAX_TOKENS), "seed": (0, (1 << 63) - 1), "best_of": (1, MAX_SEQUENCES)}
        optional |= {"logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS)}
        for name, (least, most) in optional.items():
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least, most)

    def _check_lists(self) -> None:
        object.__setattr__(self, "stop", checked_texts("stop", self.stop, MAX_STOPS, MAX_STOP_LENGTH))
        if (total := sum(map(len, self.stop))) > MAX_STOP_CHARACTERS:
            raise OptionError("stop", f"texts of {total} characters", f"at most {MAX_STOP_CHARACTERS} in all")
        words = checked_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "stop_token_ids", checked_ids("stop_token_ids", self.stop_token_ids, MAX_IDS))
        if self.allowed_token_ids is not None:
            allowed = checked_ids("allowed_token_ids", self.allowed_token_ids, MAX_IDS)
            if not allowed:
                raise OptionError("allowed_token_ids", (), "at least one token id, or None")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            bias = checked_bias("logit_bias", self.logit_bias, MAX_BIASES, 100.0)
            object.__setattr__(self, "logit_bias", bias)

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise OptionError("min_tokens", self.min_tokens, f"at most max_tokens = {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise OptionError("best_of", self.best_of, f"at least n = {self.n}")
        if self.is_greedy and self.num_sequences > 1:
            option = "n" if self.n > 1 else "best_of"
            raise OptionError(option, self.num_sequences, "1 for greedy search, whose continuations are all the same")
        if self.stop and not self.detokenize:
            raise OptionError("stop", self.stop, "() without detokenize: stop texts are looked for in the text")
        if self.structured_outputs is not None and self.ignore_eos:
            raise OptionError("ignore_eos", True, "False with structured_outputs, whose output has an end")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_sequences(self) -> int:
        """How many continuations are generated."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_likeliest(self) -> int:
        """`top_k`, with 0 for all."""
        return max(self.top_k, 0)

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
