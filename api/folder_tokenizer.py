"""The tokenizer of a Hugging Face folder, without transformers: tokenizer.json and the settings beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmopt.checkpoint import read_json
from llmopt.compiler.errors import InputError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class FolderTokenizer:
    """Has the attributes of a transformers tokenizer that llmopt looks at.

    backend_tokenizer: the tokenizer itself.
    chat_template: Jinja, None where the folder brings none.
    special_tokens_map: bos_token, eos_token and so on: variables of the template.
    """

    backend_tokenizer: Any
    chat_template: str | None = None
    special_tokens_map: Mapping[str, str] = field(default_factory=dict)


def load_tokenizer(folder: Path) -> FolderTokenizer:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Only the first must be there. Raises InputError for a file that is missing or no such file.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file} does not exist; pass token ids, or a tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file} is no tokenizer: {error}") from error
    # Lengths that the tokenizer was trained with are not the model's: a prompt is never cut off or filled up. What a
    # prompt begins with is in the file, too; add_bos_token and its like are for tokenizers without one.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    special = {name: text for name in _SPECIAL if (text := _text_of(settings.get(name))) is not None}
    return FolderTokenizer(tokenizer, _chat_template(folder, settings.get("chat_template")), special)


def _text_of(token: object) -> str | None:
    """A special token as the files write it: its text, or an object with its text and how it is matched."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, setting: object) -> str | None:
    """The template in a file of its own, else the one in tokenizer_config.json; of several, the one named default."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    if isinstance(setting, list):
        named = (entry for entry in setting if isinstance(entry, Mapping) and entry.get("name") == "default")
        setting = next((entry.get("template") for entry in named), None)
    return setting if isinstance(setting, str) else None
