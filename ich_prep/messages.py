"""Text as it leaves the programs: nothing in it can steer a terminal or hide, and no message is longer than a screen.

File names, UIDs, keys of tables and header values come from strangers. A control character among them could move the
cursor, recolour the screen or forge a line of a log, and a bidirectional override could show a name backwards.
"""

from __future__ import annotations

import re

LONGEST_MESSAGE = 2000  # characters
_CUT = " [...] "
_END = 600  # characters of a long message's end that are kept: what to do next is said there

# C0 and C1 controls and DEL, line and paragraph separators, bidirectional controls (UAX #9, section 2), invisible
# characters that make different names look equal, and lone surrogates, which no terminal can encode.
_UNSAFE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
_IN_LINE = re.compile(f"[\t\n{_UNSAFE}]")
_IN_TEXT = re.compile(f"[{_UNSAFE}]")


def escaped(text: str) -> str:
    """Return ``text`` for a terminal: escapes such as ``\\x1b`` for characters that act; tabs and line ends stay."""
    return _IN_TEXT.sub(_escape, text)


def escaped_line(text: str) -> str:
    """Return ``text``, a name or a value, for one line: escapes for tabs and line ends too."""
    return _IN_LINE.sub(_escape, text)


def message(text: str) -> str:
    """Return ``text``, a whole message, as it may be printed: escaped, and without its middle if it is too long."""
    safe = escaped(text)
    if len(safe) <= LONGEST_MESSAGE:
        return safe
    return safe[: LONGEST_MESSAGE - _END - len(_CUT)] + _CUT + safe[-_END:]


def size_text(number: float) -> str:
    """Return ``number`` bytes as text, such as "1.5 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 1e3:,.1f} KB"


def duration_text(seconds: float) -> str:
    """Return ``seconds`` as text, such as "12 min"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
