"""Text of a filter -> tokens with their positions, and the error that shows where in the text a problem is."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum

from ich_prep.errors import UsageError

MAX_CHARACTERS = 10_000
MAX_DIGITS = 300  # of one number
EXCERPT_CHARACTERS = 72  # of the text, shown in an error

KEYWORDS = frozenset(("and", "or", "not", "in", "is", "null", "true", "false"))

_INT64 = range(-(2**63), 2**63)
_TOKEN = re.compile(
    r"""
      (?P<space>    [ \t\r\n]+)
    | (?P<number>   [+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | (?P<name>     [^\W\d]\w*(?:\.[^\W\d]\w*)?)
    | (?P<quoted>   `[^`]+`)
    | (?P<text>     '(?:[^']|'')*' | "(?:[^"]|"")*")
    | (?P<operator> <=|>=|==|!=|[<>=~(),])
    """,
    re.VERBOSE,
)
# What people write from habit, and what to write instead.
_INSTEAD = {
    "&": "write 'and'",
    "|": "write 'or'",
    "!": "write 'not', or '!=' for not equal",
    "-": "arithmetic is not supported",
    "+": "arithmetic is not supported",
    "*": "arithmetic is not supported",
    "/": "arithmetic is not supported",
    "[": "write a list in parentheses",
    "{": "write a list in parentheses",
    "‘": "use straight quotes",
    "’": "use straight quotes",
    "“": "use straight quotes",
    "”": "use straight quotes",
}


class Kind(StrEnum):
    """The kind of a token; the value is what messages call it."""

    NAME = "column"
    NUMBER = "number"
    TEXT = "text"
    KEYWORD = "keyword"
    OPERATOR = "operator"
    END = "end"


@dataclass(frozen=True)
class Token:
    """A token, its value (a name, number, text, lower-case keyword or operator) and its first character, from 0."""

    kind: Kind
    value: str | int | float
    start: int

    def __str__(self) -> str:
        if self.kind is Kind.END:
            return "the end"
        if self.kind is Kind.NUMBER:
            return str(self.value)
        return repr(self.value) if self.kind is Kind.TEXT else f"'{self.value}'"


def filter_error(text: str, position: int, message: str) -> UsageError:
    """Return the error for ``message`` with an excerpt of ``text`` and a caret below its character ``position``."""
    start = max(0, min(position - EXCERPT_CHARACTERS // 2, len(text) - EXCERPT_CHARACTERS))
    excerpt = text[start : start + EXCERPT_CHARACTERS]
    shown = "".join(character if character.isprintable() else " " for character in excerpt)
    before, after = "…" if start else "", "…" if start + len(excerpt) < len(text) else ""
    caret = " " * (len(before) + position - start) + "^"
    return UsageError(f"Invalid filter at character {position + 1}: {message}\n  {before}{shown}{after}\n  {caret}")


def tokenize(text: str) -> list[Token]:
    """Return the tokens of ``text``, an END last.

    Raises ``UsageError`` for a text that is empty, longer than ``MAX_CHARACTERS``, has control characters or a
    character that starts no token, and for an unclosed quote or a number that float64 cannot hold.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            f"A filter may have {MAX_CHARACTERS:,} characters; this one has {len(text):,}. Make it shorter."
        )
    if not text.strip():
        raise UsageError("The filter is empty. Write a condition such as: slice_spacing_mm < 6 and any == 1")
    _refuse_control_characters(text)
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _unknown(text, position)
        if match.lastgroup != "space":
            tokens.append(_token(text, match))
        position = match.end()
    return [*tokens, Token(Kind.END, "", len(text.rstrip()))]


def _refuse_control_characters(text: str) -> None:
    for position, character in enumerate(text):
        # Cs: half of a surrogate pair, which is what an argument that is not UTF-8 becomes.
        if unicodedata.category(character) in {"Cc", "Cs"} and character not in "\t\r\n":
            raise filter_error(text, position, f"control character U+{ord(character):04X}. Remove it.")


def _token(text: str, match: re.Match[str]) -> Token:
    group, word, start = match.lastgroup, match.group(), match.start()
    if group == "number":
        return Token(Kind.NUMBER, _number(text, word, start), start)
    if group == "text":
        return Token(Kind.TEXT, word[1:-1].replace(word[0] * 2, word[0]), start)
    if group == "operator":
        return Token(Kind.OPERATOR, "==" if word == "=" else word, start)
    if group == "name" and word.lower() in KEYWORDS:
        return Token(Kind.KEYWORD, word.lower(), start)
    return Token(Kind.NAME, word.strip("`"), start)


def _number(text: str, word: str, start: int) -> int | float:
    if len(word) > MAX_DIGITS or not math.isfinite(float(word)):
        raise filter_error(text, start, "this number is too large: expected one that a float64 can hold.")
    if word.lstrip("+-").isdigit() and int(word) in _INT64:
        return int(word)
    return float(word)


def _unknown(text: str, position: int) -> UsageError:
    character = text[position]
    if character in "'\"`":
        return filter_error(text, position, f"the quote {character} is never closed.")
    if character.isdigit() or character == ".":
        return filter_error(text, position, "this is not a number. Put text in quotes: 'text'.")
    hint = f": {_INSTEAD[character]}" if character in _INSTEAD else ""
    return filter_error(text, position, f"unexpected character {character!r}{hint}.")
