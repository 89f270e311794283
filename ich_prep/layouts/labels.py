"""The six labels: their order, the rule ``any`` = or of the others, and the join of labels to slices.

Everything here is tables in, tables out: no file is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
ANY = "any"
CLASSES = (*SUBTYPES, ANY)
UNKNOWN = -1

Key = Literal["sop_instance_uid", "series_instance_uid", "subject"]


@dataclass(frozen=True)
class Labels:
    """What a source says about its slices, one line for each thing that is labelled.

    ``keys`` (string, unique) are SOP Instance UIDs, Series Instance UIDs or subjects, as ``key`` says. ``values`` is
    int8 (len(keys), 6) in the order of ``CLASSES``, -1 where unknown. ``listed`` are keys that the source names without
    a label, in the order in which it names them (RSNA's sample submission). ``contradicted`` are keys of which two lines
    say different things, their class then unknown. ``notes`` are countable remarks for the log.
    """

    key: Key
    keys: pa.Array
    values: NDArray[np.int8]
    listed: pa.Array
    contradicted: pa.Array
    notes: tuple[str, ...] = ()


def no_labels() -> Labels:
    """Return labels that say nothing about anything."""
    empty = pa.array([], pa.string())
    return Labels("sop_instance_uid", empty, np.empty((0, len(CLASSES)), np.int8), empty, empty)


def gather_long(
    keys: pa.Array, classes: NDArray[np.intp], values: NDArray[np.int8], *, allow_contradictions: bool = False
) -> Labels:
    """Return labels from lines of (key, class, value), each class of each key once or several times with one value.

    ``keys`` string (n,), ``classes`` (n,) indices into ``CLASSES``, ``values`` (n,) of 0 or 1. Keys keep the order of
    their first line. Raises ``SourceError`` where two lines contradict each other, unless that is allowed.
    """
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    unique = encoded.dictionary
    table = np.full((len(unique), len(CLASSES)), UNKNOWN, np.int8)
    table[codes, classes] = values
    clash = np.flatnonzero(table[codes, classes] != values)
    if len(clash) and not allow_contradictions:
        named = sorted({f"{keys[int(i)].as_py()} ({CLASSES[classes[i]]})" for i in clash[:5]})
        raise SourceError(
            f"{len(clash)} label lines contradict another line of the same key and class, among them "
            f"{', '.join(named)}. Expected equal values wherever one stands twice: correct the label file, or take such "
            "labels as unknown with --allow-contradictions."
        )
    surplus = len(codes) - int((table != UNKNOWN).sum())
    table[codes[clash], classes[clash]] = UNKNOWN
    contradicted = unique.take(pa.array(np.unique(codes[clash])))
    notes = (f"{surplus} label lines stand more than once",) if surplus else ()
    return Labels("sop_instance_uid", unique, table, pa.array([], pa.string()), contradicted, notes)


def complete_any(labels: Labels) -> Labels:
    """Return ``labels`` with ``any`` filled in as the or of the five subtypes where it was unknown, and checked elsewhere.

    Raises ``SourceError`` where ``any`` is 0 beside a positive subtype, or 1 with all five subtypes 0 in labels by slice.
    Labels by series or subject may say ``any`` without a subtype: readers who agree on a bleed can differ on its type.
    """
    subtypes, stated = labels.values[:, : len(SUBTYPES)], labels.values[:, -1]
    positive = (subtypes == 1).any(axis=1)
    negative = (subtypes == 0).all(axis=1)
    wrong = (stated == 0) & positive
    if labels.key == "sop_instance_uid":
        wrong |= (stated == 1) & negative
    if wrong.any():
        named = ", ".join(labels.keys[int(i)].as_py() for i in np.flatnonzero(wrong)[:5])
        raise SourceError(
            f"{int(wrong.sum())} labels have an 'any' that is not the or of the five subtypes, among them {named}. "
            "Expected any = 1 exactly where a subtype is 1: correct the label file, or leave the column out."
        )
    implied = np.where(positive, 1, np.where(negative, 0, UNKNOWN)).astype(np.int8)
    values = labels.values.copy()
    values[:, -1] = np.where(stated == UNKNOWN, implied, stated)
    return Labels(labels.key, labels.keys, values, labels.listed, labels.contradicted, labels.notes)


@dataclass(frozen=True)
class Joined:
    """Labels brought into the order of the slices.

    ``values`` int8 (n, 6); ``label_line`` int64 (n,), the place of the slice's key among the keys and listed keys of its
    subset's file, -1 where it is not named; ``unlabelled`` bool (n,); ``without_image`` the keys no slice answers to.
    """

    values: NDArray[np.int8]
    label_line: NDArray[np.int64]
    unlabelled: NDArray[np.bool_]
    without_image: pa.Array


def join_labels(labels: Labels, keys: pa.ChunkedArray | pa.Array) -> Joined:
    """Return the labels of each of ``keys`` (string, (n,)), a slice's own key of the kind ``labels.key``."""
    found = pc.index_in(keys, value_set=labels.keys).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    listed = pc.index_in(keys, value_set=labels.listed).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    padded = np.concatenate([labels.values, np.full((1, len(CLASSES)), UNKNOWN, np.int8)])
    values = padded[found]  # -1 picks the line of unknowns at the end
    used = np.zeros(len(labels.keys), bool)
    used[found[found >= 0]] = True
    return Joined(
        values=values,
        label_line=np.where(found >= 0, found, listed),
        unlabelled=(values == UNKNOWN).all(axis=1),
        without_image=labels.keys.filter(pa.array(~used)),
    )
