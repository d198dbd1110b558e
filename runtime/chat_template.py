"""Conversations as prompts: chat templates in Jinja, as transformers' tokenizers carry them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmopt.compiler.errors import InputError

MAX_TEMPLATE_LENGTH = 1 << 20


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not. The names and defaults are those of transformers.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` tells training what the model has said; a prompt has the text in it like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # What is set inside is not known outside, as in transformers.
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class ChatTemplate:
    """A chat template, which may come from anybody: it runs in Jinja's sandbox and changes nothing that it is given.

    Args:
        source: the template.
        special_tokens: variables such as bos_token and eos_token.

    Raises InputError for what is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        if len(source) > MAX_TEMPLATE_LENGTH:
            raise InputError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_LENGTH}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special = {name: token for name, token in (special_tokens or {}).items() if isinstance(token, str)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"the chat template is wrong: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation; raises InputError for messages that the template refuses or cannot take."""
        if not messages:
            raise InputError("the conversation has no messages")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"a message is a mapping with a role, got {message!r:.80}")
        try:
            return self._template.render(messages=list(messages), **self._special, **variables)
        # A template is a program of somebody else's: it may fail in any way.
        except Exception as error:
            raise InputError(f"the chat template failed: {error}") from error
