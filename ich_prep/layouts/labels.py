"""Label tables: keys and class values, the rule ``any`` = OR of the subtypes, and the join of labels to slices.

Tables in, tables out: no file is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import RSNA_CLASSES, SUBTYPES, UNKNOWN, is_rsna
from ich_prep.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = Literal["sop_instance_uid", "series_instance_uid", "subject"]


@dataclass(frozen=True)
class LabelRules:
    """Which labels a layout reads, and which label problems do not stop the build."""

    classes: tuple[str, ...] = RSNA_CLASSES
    allow_contradictions: bool = False  # contradictory labels are unknown
    allow_unlabelled: bool = False  # a tree without a label file has no labels


DEFAULT_RULES = LabelRules()


@dataclass(frozen=True)
class LabelTable:
    """The labels of a source, one line per labelled slice, series or subject.

    ``keys`` (string, unique) are SOP Instance UIDs, Series Instance UIDs or subjects, as ``key`` says. ``values`` is
    int8 (len(keys), len(classes)) in the order of ``classes``, -1 where unknown. ``listed`` are keys that the source
    lists without a label, in its order (RSNA's sample submission). ``contradicted`` are keys for
    which two lines disagree; their class is then unknown. ``notes`` are messages for the log, with counts.
    """

    key: Key
    keys: pa.Array
    values: NDArray[np.int8]
    listed: pa.Array
    contradicted: pa.Array
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = RSNA_CLASSES


def no_labels(classes: tuple[str, ...] = RSNA_CLASSES) -> LabelTable:
    """Return an empty label table."""
    empty = pa.array([], pa.string())
    values = np.empty((0, len(classes)), np.int8)
    return LabelTable("sop_instance_uid", empty, values, empty, empty, classes=classes)


def labels_from_long_table(
    keys: pa.Array,
    columns: NDArray[np.intp],
    values: NDArray[np.int8],
    *,
    classes: tuple[str, ...] = RSNA_CLASSES,
    allow_contradictions: bool = False,
) -> LabelTable:
    """Return labels from lines of (key, class, value), where a class of a key may occur several times with one value.

    ``keys`` string (n,), ``columns`` (n,) indices into ``classes``, ``values`` (n,) of 0 or 1. Keys keep the order of
    their first line. Raises ``SourceError`` if two lines contradict each other, unless that is allowed.
    """
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    unique = encoded.dictionary
    table = np.full((len(unique), len(classes)), UNKNOWN, np.int8)
    table[codes, columns] = values
    clash = np.flatnonzero(table[codes, columns] != values)
    if len(clash) and not allow_contradictions:
        named = sorted({f"{keys[int(i)].as_py()} ({classes[columns[i]]})" for i in clash[:5]})
        raise SourceError(
            f"{len(clash)} label lines contradict another line of the same key and class, among them "
            f"{', '.join(named)}. Expected equal values for duplicates: correct the label file, or treat such labels "
            "as unknown with --allow-contradictions."
        )
    surplus = len(codes) - int((table != UNKNOWN).sum())
    table[codes[clash], columns[clash]] = UNKNOWN
    contradicted = unique.take(pa.array(np.unique(codes[clash])))
    notes = (f"{surplus} duplicate label lines (ignored)",) if surplus else ()
    return LabelTable("sop_instance_uid", unique, table, pa.array([], pa.string()), contradicted, notes, classes)


def fill_any(labels: LabelTable) -> LabelTable:
    """Return ``labels`` with ``any`` set to the OR of the five subtypes where it was unknown, and checked elsewhere.

    Labels of other classes than RSNA's are returned unchanged. Raises ``SourceError`` if ``any`` is 0 with a positive
    subtype, or, in labels by slice, 1 with all five subtypes 0. Labels by series or subject may have ``any`` without a
    subtype: readers who agree on a bleed can differ on its type.
    """
    if not is_rsna(labels.classes):
        return labels
    subtypes, stated = labels.values[:, : len(SUBTYPES)], labels.values[:, -1]
    positive = (subtypes == 1).any(axis=1)
    negative = (subtypes == 0).all(axis=1)
    wrong = (stated == 0) & positive
    if labels.key == "sop_instance_uid":
        wrong |= (stated == 1) & negative
    if wrong.any():
        named = ", ".join(labels.keys[int(i)].as_py() for i in np.flatnonzero(wrong)[:5])
        raise SourceError(
            f"{int(wrong.sum())} labels have an 'any' that is not the OR of the five subtypes, among them {named}. "
            "Expected any = 1 if and only if a subtype is 1: correct the label file, or omit the column."
        )
    implied = np.where(positive, 1, np.where(negative, 0, UNKNOWN)).astype(np.int8)
    values = labels.values.copy()
    values[:, -1] = np.where(stated == UNKNOWN, implied, stated)
    return replace(labels, values=values)


@dataclass(frozen=True)
class Joined:
    """Labels brought into the order of the slices.

    ``values`` int8 (n, classes); ``label_line`` int64 (n,), the index of the slice's key among the keys or listed keys of
    its subset's file, -1 if it is not there; ``unlabelled`` bool (n,); ``without_image`` the keys without a slice.
    """

    values: NDArray[np.int8]
    label_line: NDArray[np.int64]
    unlabelled: NDArray[np.bool_]
    without_image: pa.Array


def join_labels(labels: LabelTable, keys: pa.ChunkedArray | pa.Array) -> Joined:
    """Return the labels of each of ``keys`` (string, (n,)), a slice's own key of the kind ``labels.key``."""
    index = pc.index_in(keys, value_set=labels.keys).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    listed = pc.index_in(keys, value_set=labels.listed).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    padded = np.concatenate([labels.values, np.full((1, len(labels.classes)), UNKNOWN, np.int8)])
    values = padded[index]  # -1 selects the line of unknowns at the end
    used = np.zeros(len(labels.keys), bool)
    used[index[index >= 0]] = True
    return Joined(
        values=values,
        label_line=np.where(index >= 0, index, listed),
        unlabelled=(values == UNKNOWN).all(axis=1),
        without_image=labels.keys.filter(pa.array(~used)),
    )
