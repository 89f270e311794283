"""The label classes of a dataset: RSNA's six by default."""

from __future__ import annotations

import re
from collections.abc import Sequence

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
ANY = "any"
RSNA_CLASSES = (*SUBTYPES, ANY)
UNKNOWN = -1  # in label arrays; null in tables

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def is_rsna(classes: Sequence[str]) -> bool:
    """Return whether these are RSNA's six classes in their order, so that ``any`` is the OR of the five subtypes."""
    return tuple(classes) == RSNA_CLASSES


def class_name_problem(classes: Sequence[str]) -> str | None:
    """Return what is wrong with the names of ``classes``, None if they are valid.

    A name is ``[a-z][a-z0-9_]*`` and does not start with ``x_``, the prefix of user columns.
    """
    if not classes:
        return "at least one class is needed"
    for name in classes:
        if not _NAME.fullmatch(name):
            return f"{name!r} is not a class name: use lower-case letters, digits and _, starting with a letter"
        if name.startswith("x_"):
            return f"{name!r} is not a class name: x_ is the prefix of user columns"
    if len(set(classes)) != len(classes):
        return "a class is named twice"
    return None
