"""Rules of the RSNA 2019 competition: its six classes, of which ``any`` counts twice."""

from __future__ import annotations

from collections.abc import Sequence

from ich_prep.dataset.classes import ANY, RSNA_CLASSES
from ich_prep.errors import UsageError


def is_rsna(classes: Sequence[str]) -> bool:
    """Return whether ``classes`` are the competition's six, in any order."""
    return sorted(classes) == sorted(RSNA_CLASSES)


def require_rsna(classes: Sequence[str], what: str) -> None:
    """Raise `UsageError` unless ``classes`` are the competition's; ``what`` is what needs them."""
    if not is_rsna(classes):
        raise UsageError(
            f"{what} needs the six classes of RSNA 2019 ({', '.join(RSNA_CLASSES)}); this dataset has {', '.join(classes)}."
        )


def class_weights(classes: Sequence[str]) -> tuple[float, ...]:
    """Return the weight of each class in the log loss: 2 for ``any`` of the competition's classes, 1 for all others."""
    twice = is_rsna(classes)
    return tuple(2.0 if twice and name == ANY else 1.0 for name in classes)
