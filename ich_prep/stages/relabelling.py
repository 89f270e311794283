"""Labels that change in a finished dataset: which they are then, what they describe, and what changed. Arrays in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import SUBTYPES, UNKNOWN, is_rsna
from ich_prep.dataset.tables import with_columns
from ich_prep.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LEVELS = ("none", "slice", "series", "study", "patient")  # from the finest


@dataclass(frozen=True)
class Update:
    """New labels of n slices: ``values`` int8 (n, classes), -1 for unknown, where ``stated``, bool (n, classes).

    ``level`` is what each of them describes: a word of ``LEVELS``. ``line`` int64 (n,) is where in its file the label of
    each slice is, -1 where it is not, None if the lines of that file are not to be recorded.
    """

    values: NDArray[np.int8]
    stated: NDArray[np.bool_]
    level: str
    line: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Relabelled:
    """The labels of n slices after an update: ``values`` int8 (n, classes), and ``levels``, indices into ``LEVELS``."""

    values: NDArray[np.int8]
    levels: NDArray[np.int64]


@dataclass(frozen=True)
class LabelChange:
    """How many ``slices`` changed a label from ``before`` to ``after``: 0, 1 or None for unknown."""

    label: str
    before: int | None
    after: int | None
    slices: int


def updated(values: NDArray[np.int8], levels: NDArray[np.int64], update: Update, classes: Sequence[str]) -> Relabelled:
    """Return ``values`` int8 (n, classes) and ``levels`` (n,), indices into ``LEVELS``, after ``update``.

    Of RSNA's classes, ``any`` follows the five subtypes where the update does not state it and it did so before. Slices
    whose labels do not change keep their level; otherwise it is the update's if that states all that is known, else the
    coarser one. Raises ``SourceError`` if ``any`` contradicts the subtypes.
    """
    new = np.where(update.stated, update.values, values)
    if is_rsna(classes):
        new[:, -1] = _any(values, new, update)
    changed = (new != values).any(axis=1)
    own = len(SUBTYPES) if is_rsna(classes) else None  # the classes that do not follow from others
    whole = (update.stated[:, :own] | (new[:, :own] == UNKNOWN)).all(axis=1)
    level = LEVELS.index(update.level)
    levels = np.where(changed, np.where(whole, level, np.maximum(levels, level)), levels)
    levels = np.where((new == UNKNOWN).all(axis=1), 0, levels)
    if is_rsna(classes):
        _check_any(new, levels)
    return Relabelled(new, levels)


def _any(before: NDArray[np.int8], after: NDArray[np.int8], update: Update) -> NDArray[np.int8]:
    """Return ``any`` of each slice: as stated, else the OR of its subtypes if it was that before, or if one is 1 now."""
    or_before, or_after = _or(before), _or(after)
    follows = (before[:, -1] == or_before) | (or_after == 1) | update.stated[:, -1]
    stated = update.stated[:, -1] & (update.values[:, -1] != UNKNOWN)
    touched = update.stated.any(axis=1)
    values: NDArray[np.int8] = np.where(touched & ~stated & follows, or_after, after[:, -1])
    return values


def _or(values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the OR of the five subtypes, int8 (n,): -1 where it depends on one that is unknown."""
    subtypes = values[:, : len(SUBTYPES)]
    positive, negative = (subtypes == 1).any(axis=1), (subtypes == 0).all(axis=1)
    return np.where(positive, 1, np.where(negative, 0, UNKNOWN)).astype(np.int8)


def _check_any(values: NDArray[np.int8], levels: NDArray[np.int64]) -> None:
    implied, stated = _or(values), values[:, -1]
    wrong = (stated == 0) & (implied == 1)
    wrong |= (stated == 1) & (implied == 0) & (levels == LEVELS.index("slice"))
    if wrong.any():
        raise SourceError(
            f"With the new labels {int(wrong.sum())} slices have an 'any' that is not the OR of the five subtypes; the "
            f"first is row {int(np.argmax(wrong))}. Correct the labels, or leave out those of 'any': it then follows the "
            "subtypes."
        )


def changes_of(before: NDArray[np.int8], after: NDArray[np.int8], classes: Sequence[str]) -> tuple[LabelChange, ...]:
    """Return what changed by label and direction, in the order of the ``classes``; only what happened."""
    found = []
    for column, name in enumerate(classes):
        pair = (before[:, column].astype(np.int64) + 1) * 3 + after[:, column] + 1
        for code, number in enumerate(np.bincount(pair, minlength=9).tolist()):
            old, new = code // 3 - 1, code % 3 - 1
            if number and old != new:
                found.append(LabelChange(name, _shown(old), _shown(new), number))
    return tuple(found)


def _shown(value: int) -> int | None:
    return None if value == UNKNOWN else value


def with_labels(
    slices: pa.Table, relabelled: Relabelled, line: NDArray[np.int64] | None, classes: Sequence[str]
) -> pa.Table:
    """Return the slice table with other labels, and the ``line`` of each in its file; see ``Update``."""
    slices = _with_labels(slices, relabelled.values, relabelled.levels, classes)
    if line is None:
        return slices
    lines = pc.if_else(pa.array(line >= 0), pa.array(line), slices["label_line"])
    return with_columns(slices, {"label_line": lines})


def with_series_labels(
    series: pa.Table, slices: pa.Table, classes: Sequence[str], counted: NDArray[np.bool_]
) -> pa.Table:
    """Return the series table with the labels of its ``slices``: the highest of those that are ``counted`` (n,)."""
    rows = np.flatnonzero(counted & slices["series_row"].is_valid().to_numpy())
    taken = slices.select(["series_row", "label_level", *classes]).take(pa.array(rows))
    owner = taken["series_row"].to_numpy()
    values = np.full((len(series), len(classes)), UNKNOWN, np.int8)
    for column, name in enumerate(classes):
        np.maximum.at(values[:, column], owner, taken[name].fill_null(UNKNOWN).to_numpy())
    levels = np.zeros(len(series), np.int64)
    np.maximum.at(levels, owner, level_codes(taken["label_level"]))
    return _with_labels(series, values, levels, classes)


def level_codes(levels: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the index of each label level among ``LEVELS``, (n,); a word that is not there counts as the coarsest."""
    known = pc.index_in(levels, value_set=pa.array(LEVELS)).fill_null(len(LEVELS) - 1)
    codes: NDArray[np.int64] = known.to_numpy().astype(np.int64)
    return codes


def _with_labels(
    table: pa.Table, values: NDArray[np.int8], levels: NDArray[np.int64], classes: Sequence[str]
) -> pa.Table:
    columns = {name: pa.array(values[:, i], mask=values[:, i] == UNKNOWN) for i, name in enumerate(classes)}
    columns["label_level"] = pa.array(LEVELS).take(pa.array(levels))
    return with_columns(table, columns)
