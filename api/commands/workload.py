"""Prompts for `llmopt bench`: random ones of given lengths, or those of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.compiler.errors import InputError, OptionError

MAX_PROMPTS = 1_000_000
_LENGTH = "a whole number from 1, or a range such as 16:256"


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens from `least` to `most`, all equally likely."""

    least: int
    most: int

    @staticmethod
    def parse(option: str, text: str) -> Lengths:
        """From "128" or "16:256"; raises OptionError for anything else."""
        parts = text.split(":")
        if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
            raise OptionError(option, text, _LENGTH)
        least, most = int(parts[0]), int(parts[-1])
        if not 1 <= least <= most:
            raise OptionError(option, text, _LENGTH)
        return Lengths(least, most)

    def draw(self, chance: random.Random) -> int:
        """One of them."""
        return chance.randint(self.least, self.most)


@dataclass(frozen=True)
class Work:
    """A prompt, text or token ids, and how many tokens are generated for it, whatever they are."""

    prompt: str | Sequence[int]
    output_len: int


def random_work(count: int, inputs: Lengths, outputs: Lengths, vocab_size: int, seed: int) -> list[Work]:
    """Random tokens: no two prompts begin alike, but for chance."""
    chance = random.Random(seed)
    return [
        Work([chance.randrange(vocab_size) for _ in range(inputs.draw(chance))], outputs.draw(chance))
        for _ in range(count)
    ]


def work_from_file(path: Path, count: int | None, outputs: Lengths, seed: int) -> list[Work]:
    """One JSON object a line: "prompt" (a text or token ids) and, if given, "output_len". The first `count` of them.

    Raises InputError, with the line's number, for what is something else.
    """
    chance = random.Random(seed)
    found: list[Work] = []
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if count is not None and len(found) >= count:
                    break
                if line.strip():
                    found.append(_parse(line, f"{path}, line {number}", outputs, chance))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: {error.reason}") from None
    if not found or (count is not None and len(found) < count):
        raise InputError(f"{path} holds {len(found)} prompts, {count or 'at least 1'} are asked for")
    return found


def _parse(line: str, where: str, outputs: Lengths, chance: random.Random) -> Work:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise InputError(f'{where}: "prompt" is to be a text or a list of token ids, got {prompt!r:.80}')
    length = record.get("output_len", None)
    if length is None:
        length = outputs.draw(chance)
    if type(length) is not int or length < 1:
        raise InputError(f'{where}: "output_len" is to be a whole number from 1, got {length!r:.80}')
    return Work(prompt, length)
