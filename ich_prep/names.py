"""The nearest known name to one that is unknown: the one "did you mean" of every message."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Share of characters in common, 0 to 1, below which a name is not worth suggesting.
SIMILARITY = 0.6


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the one of ``known`` that is most like ``name``, case aside, or "" if none is similar."""
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), candidate)
    matches = get_close_matches(name.casefold(), folded, n=1, cutoff=SIMILARITY)
    return folded[matches[0]] if matches else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message, " Did you mean 'size'?", or "" if no known name is similar to ``name``."""
    match = nearest(name, known)
    return f" Did you mean {match!r}?" if match else ""
