"""Structured output: JSON schemas, regular expressions, choices and grammars, held by llguidance.

llguidance (Microsoft, MIT licence; an Earley parser over derivative-based regular expressions) says before each token
which ones may follow. Its work is bounded by `LLParserLimits`, counted in steps and not in time, so that a hostile
schema fails the same way on every machine; size and nesting are bounded here, before llguidance sees the text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmopt.compiler.errors import InputError, OptionError
from llmopt.runtime.sampling.checks import shortened
from llmopt.runtime.sampling.params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits

MAX_LENGTH = 1 << 16  # characters of a schema, grammar or list of choices
MAX_REGEX_LENGTH = 1 << 12
MAX_DEPTH = 64  # brackets inside brackets
# The product of the counts of nested {m,n}, which llguidance would write out, in one regular expression.
MAX_REPETITIONS = 1 << 16


class GrammarCompiler:
    """Compiles structured outputs for one tokenizer.

    Args:
        tokenizer: JSON text, as `tokenizers.Tokenizer.to_str` gives it.
        vocab_size: width of the model's logits; ids that the tokenizer does not know are never allowed.
        eos_token_ids: allowed where the output is complete.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        # A dependency that costs time to load, and that few requests need.
        from llguidance import LLTokenizer

        if not eos_token_ids:
            raise InputError("structured_outputs needs a model with an end of sequence: eos_token_ids is empty")
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"structured_outputs cannot use this tokenizer: {shortened(str(error), 400)}") from error
        self._vocab_size = vocab_size

    def source(self, wanted: StructuredOutputsParams) -> str:
        """The grammar in llguidance's own form. Raises OptionError for what is too large or too deep."""
        from llguidance import LLMatcher, grammar_from

        if wanted.regex is not None:
            check_size("regex", wanted.regex, MAX_REGEX_LENGTH)
            check_repetitions("regex", wanted.regex)
            return LLMatcher.grammar_from_regex(wanted.regex)
        if wanted.choice is not None:
            check_size("choice", "".join(wanted.choice), MAX_LENGTH, brackets=False)
            texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
            # One terminal, so that the lexer and not the parser tells the texts apart: there may be thousands.
            return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(texts))
        if wanted.grammar is not None:
            check_size("grammar", wanted.grammar, MAX_LENGTH)
            check_repetitions("grammar", wanted.grammar)
            try:
                return grammar_from("grammar", wanted.grammar)
            except (ValueError, RecursionError) as error:
                raise OptionError("grammar", shortened(wanted.grammar), f"a grammar: {error}") from error
        schema = {"type": "object"} if wanted.json is None else _schema(wanted.json)
        space: dict[str, object] = {"whitespace_flexible": not wanted.disable_any_whitespace}
        if wanted.whitespace_pattern is not None:
            check_size("whitespace_pattern", wanted.whitespace_pattern, 256)
            check_repetitions("whitespace_pattern", wanted.whitespace_pattern)
            space = {"whitespace_pattern": wanted.whitespace_pattern}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=space)  # type: ignore[arg-type]

    def compile(self, kind: str, source: str) -> Grammar:
        """A grammar from `source`; `kind` names the option in errors. Raises OptionError for one that is wrong."""
        from llguidance import LLMatcher

        limits = _limits()
        problem = LLMatcher.validate_grammar(source, self._tokenizer, limits=limits)
        if problem and not problem.startswith("WARNING"):
            raise OptionError(kind, shortened(source), f"what llguidance compiles within its limits: {_line(problem)}")
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        # The first mask builds most of the automaton: what is too costly shows here.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise OptionError(
                kind, shortened(source), f"what llguidance compiles within its limits: {_line(matcher.get_error())}"
            )
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """A compiled grammar, from which each sequence starts anew."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> GrammarState:
        """A state at the beginning of the output."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def accept(self, token: int) -> None:
        """Moves on by a token; one that is not allowed is an error, which `error` then gives."""
        self.matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of sequence may follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    def error(self, vocab_size: int) -> str:
        """Why this sequence cannot go on, or "" if it can."""
        if self.matcher.is_error():
            return f"the grammar of structured_outputs failed: {_line(self.matcher.get_error())}"
        if self.vocab_size != vocab_size:
            return f"structured_outputs was compiled for {self.vocab_size} token ids, the logits have {vocab_size}"
        return ""


def fill_masks(states: Sequence[GrammarState], vocab_size: int) -> np.ndarray:
    """Which tokens may follow, `[N, V]` uint8, for all states in one call that uses several threads.

    A state whose limits are exceeded has an error afterwards, and nothing is allowed.
    """
    words = -(-vocab_size // 32)
    masks = np.zeros((len(states), words), dtype=np.uint32)
    if len(states) == 1:
        states[0].matcher.unsafe_compute_mask_ptr(masks.ctypes.data, words * 4)
    else:
        matchers = [(state.matcher, row) for row, state in enumerate(states)]
        _executor().unsafe_compute_mask_ptr(matchers, masks.ctypes.data, words * 4, len(states))
    for row, state in enumerate(states):
        if state.matcher.is_error():
            masks[row] = 0
    return np.unpackbits(masks.view(np.uint8), axis=1, count=vocab_size, bitorder="little")


@functools.cache
def _executor() -> LLExecutor:
    """The threads that fill masks, started when first needed."""
    from llguidance import LLExecutor

    return LLExecutor()


def check_size(option: str, text: str, longest: int, *, brackets: bool = True) -> None:
    """Refuses a text that is too long, or whose brackets are nested too deeply (also where they may be quoted)."""
    if len(text) > longest:
        raise OptionError(option, shortened(text), f"at most {longest} characters")
    depth = 0
    for character in text if brackets else "":
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            raise OptionError(option, shortened(text), f"brackets nested at most {MAX_DEPTH} deep")


_REPETITION = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def check_repetitions(option: str, pattern: str) -> None:
    """Refuses counted repetitions that multiply to more than `MAX_REPETITIONS`.

    An upper bound: those that stand side by side add up, but within one bracket of the outermost level they are
    multiplied here.
    """
    worst, product, depth = 1, 1, 0
    for part in re.finditer(r"\\.|[()]|\{\d*(?:,\d*)?\}", pattern, re.DOTALL):
        text = part.group()
        if text == "(":
            depth += 1
        elif text == ")":
            depth = max(0, depth - 1)
        elif counted := _REPETITION.fullmatch(text):
            times = max((int(digits[:9]) for digits in counted.groups() if digits), default=1)
            product *= max(times, 1)
            worst = max(worst, product)
        if depth == 0 and text != ")":
            product = 1
    if worst > MAX_REPETITIONS:
        raise OptionError(option, shortened(pattern), f"nested repetitions of at most {MAX_REPETITIONS} in all")


def _schema(given: str | Mapping[str, object]) -> object:
    try:
        text = given if isinstance(given, str) else json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError("json", type(given).__name__, f"a JSON schema: {error}") from error
    check_size("json", text, MAX_LENGTH)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise OptionError("json", shortened(text), f"a JSON schema: {error}") from error
    if not isinstance(schema, dict | bool):
        raise OptionError("json", shortened(text), "a JSON schema: an object")
    _check_schema_patterns(schema)
    return schema


def _check_schema_patterns(schema: object) -> None:
    """Patterns inside a schema are bounded as any other regular expression."""
    if isinstance(schema, list):
        for item in schema:
            _check_schema_patterns(item)
    if not isinstance(schema, dict):
        return
    for key, entry in schema.items():
        if key == "pattern" and isinstance(entry, str):
            check_size("json", entry, MAX_REGEX_LENGTH)
            check_repetitions("json", entry)
        elif key == "patternProperties" and isinstance(entry, dict):
            for pattern in entry:
                check_repetitions("json", pattern)
        _check_schema_patterns(entry)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=100_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _line(message: str) -> str:
    return shortened(" ".join(message.split()), 300)
