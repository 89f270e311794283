"""Label tables: keys and class values, the rule ``any`` = OR of the subtypes, and the join of labels to slices.

Tables in, tables out: no file is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import RSNA_CLASSES, SUBTYPES, UNKNOWN, is_rsna
from ich_prep.errors import SourceError, count

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What a line of a label table is about, from the finest to the coarsest; ``subject`` is CQ500's.
Key = Literal[
    "sop_instance_uid", "series_instance_uid", "study_instance_uid", "accession_number", "patient_id", "subject"
]
UIDS: frozenset[Key] = frozenset(("sop_instance_uid", "series_instance_uid", "study_instance_uid"))
# What one label describes. A label of a CQ500 subject is that of its one scan.
LEVELS: Mapping[Key, str] = {
    "sop_instance_uid": "slice",
    "series_instance_uid": "series",
    "study_instance_uid": "study",
    "accession_number": "study",
    "patient_id": "patient",
    "subject": "series",
}


@dataclass(frozen=True)
class LabelOptions:
    """How to read a user's table, as given on the command line or in a recipe; see ``BuildOptions``."""

    key: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelRules:
    """Which labels a layout reads, how, and which label problems do not stop the build."""

    classes: tuple[str, ...] = RSNA_CLASSES
    allow_contradictions: bool = False  # contradictory labels are unknown
    allow_unlabelled: bool = False  # a tree without a label file has no labels
    options: LabelOptions = LabelOptions()


DEFAULT_RULES = LabelRules()


@dataclass(frozen=True)
class LabelLines:
    """The lines of a user's label table, before one key is chosen.

    ``keys`` has a string array (n,) for each key column, null where a line has none, the finest first; ``candidates`` are
    those of which one is to be chosen. ``values`` is int8 (n, classes), -1 where unknown. ``extra`` are the columns to keep,
    ``subset`` (string, null where not stated) and ``fold`` (int8 (n,), -1 where not stated) those of the same names.
    ``path`` is the table's, ``line_of`` returns where in it a line is.
    """

    path: str
    candidates: tuple[Key, ...]
    keys: Mapping[Key, pa.Array]
    values: NDArray[np.int8]
    extra: pa.Table | None
    subset: pa.Array | None
    fold: NDArray[np.int8] | None
    line_of: Callable[[int], str]
    allow_contradictions: bool


@dataclass(frozen=True)
class LabelTable:
    """The labels of a source, one line per labelled slice, series, study, patient or subject.

    ``keys`` (string, unique) are of the kind ``key``. ``values`` is int8 (len(keys), len(classes)) in the order of
    ``classes``, -1 where unknown. ``listed`` are keys that the source lists without a label, in its order (RSNA's sample
    submission). ``contradicted`` are keys for which two lines disagree; their class is then unknown. ``notes`` are
    messages for the log, with counts.

    A user's table may bring more, aligned with ``keys``: ``extra``, columns to keep, named ``x_...``; ``subset``, train,
    test or null where it does not say; ``fold``, int8, -1 where it does not say. ``lines`` are then the table's own, for
    ``choose_key``.
    """

    key: Key
    keys: pa.Array
    values: NDArray[np.int8]
    listed: pa.Array
    contradicted: pa.Array
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = RSNA_CLASSES
    extra: pa.Table | None = None
    subset: pa.Array | None = None
    fold: NDArray[np.int8] | None = None
    lines: LabelLines | None = None

    @property
    def level(self) -> str:
        """What one label describes: slice, series, study or patient."""
        return LEVELS[self.key]

    def examples(self, keys: pa.Array) -> str:
        """Return up to five of ``keys`` for a message; patient ids and accession numbers are not shown, but ""."""
        shown = self.key in UIDS or self.key == "subject"
        return ", ".join(key[:100] for key in keys[:5].to_pylist()) if shown else ""

    def digest(self) -> str:
        """Return a digest of the labels and all that the table brings with them."""
        digest = hashlib.sha256(self.key.encode() + self.values.tobytes())
        for keys in (self.keys, self.listed):
            digest.update(b"%d " % len(keys) + "\n".join(keys.to_pylist()).encode())
        if self.extra is not None:
            digest.update(json.dumps(self.extra.to_pydict()).encode())
        if self.subset is not None:
            digest.update(json.dumps(self.subset.to_pylist()).encode())
        if self.fold is not None:
            digest.update(b"fold" + self.fold.tobytes())
        if self.lines is not None and len(self.lines.keys) > 1:
            for name, values in self.lines.keys.items():
                digest.update(json.dumps([name, values.to_pylist()]).encode())
        return digest.hexdigest()


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
    clash = _set(table, codes, columns, values)
    if len(clash) and not allow_contradictions:
        named = sorted({f"{keys[int(i)].as_py()} ({classes[columns[i]]})" for i in clash[:5]})
        raise _contradiction(len(clash), ", ".join(named))
    surplus = len(codes) - int((table != UNKNOWN).sum())
    table[codes[clash], columns[clash]] = UNKNOWN
    contradicted = unique.take(pa.array(np.unique(codes[clash])))
    notes = (f"{surplus} duplicate label lines (ignored)",) if surplus else ()
    return LabelTable("sop_instance_uid", unique, table, pa.array([], pa.string()), contradicted, notes, classes)


def labels_from_lines(lines: LabelLines, key: Key, *, classes: tuple[str, ...], strict: bool = True) -> LabelTable:
    """Return the labels of a user's table by ``key``; keys keep the order of their first line.

    Lines without a key and without a label are dropped. Raises ``SourceError`` for labels without a key, and for lines of
    one key that contradict each other, unless that is allowed; nothing is raised if not ``strict``.
    """
    has_key = lines.keys[key].is_valid().to_numpy(zero_copy_only=False)
    homeless = np.flatnonzero(~has_key & (lines.values != UNKNOWN).any(axis=1))
    if len(homeless) and strict:
        raise SourceError(
            f"{count(len(homeless), 'line')} of {lines.path} with labels and without {key}, among them "
            f"{lines.line_of(int(homeless[0]))}. Fill in the column, remove these lines, or choose another key with "
            "--label-key."
        )
    kept = np.flatnonzero(has_key)
    encoded = lines.keys[key].take(pa.array(kept)).dictionary_encode()
    unique, codes = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    allowed = lines.allow_contradictions or not strict
    clashing = [np.empty(0, np.int64)]

    def check(clash: NDArray[np.int64], what: str) -> None:
        if len(clash) and not allowed:
            shown = f"{unique[int(codes[clash[0]])].as_py()[:100]} ({what})" if key in UIDS else what
            raise _contradiction(len(clash), f"{shown} in {lines.line_of(int(kept[clash[0]]))} of {lines.path}")
        clashing.append(codes[clash])

    table = np.full((len(unique), len(classes)), UNKNOWN, np.int8)
    for column, name in enumerate(classes):
        values = lines.values[kept, column]
        stated = np.flatnonzero(values != UNKNOWN)
        clash = stated[_set(table, codes[stated], column, values[stated])]
        check(clash, name)
        table[codes[clash], column] = UNKNOWN
    extra = subset = fold = None
    if lines.extra is not None:
        columns = {}
        for name in lines.extra.column_names:
            columns[name], clash = _one_per_key(lines.extra[name].take(pa.array(kept)), codes, len(unique))
            check(clash, name)
        extra = pa.table(columns)
    if lines.subset is not None:
        subset, clash = _one_per_key(lines.subset.take(pa.array(kept)), codes, len(unique))
        check(clash, "subset")
    if lines.fold is not None:
        stated_fold = pa.array(lines.fold[kept], mask=lines.fold[kept] < 0)
        folds, clash = _one_per_key(stated_fold, codes, len(unique))
        check(clash, "fold")
        fold = folds.fill_null(-1).to_numpy(zero_copy_only=False)
    surplus = len(codes) - len(unique)
    notes = (f"{surplus} duplicate label lines (ignored)",) if surplus else ()
    contradicted = unique.take(pa.array(np.unique(np.concatenate(clashing))))
    empty = pa.array([], pa.string())
    return LabelTable(key, unique, table, empty, contradicted, notes, classes, extra, subset, fold, lines)


def _set(
    table: NDArray[np.int8], codes: NDArray[np.int64], columns: NDArray[np.intp] | int, values: NDArray[np.int8]
) -> NDArray[np.int64]:
    """Set the lines ``codes`` of ``table`` at ``columns`` to ``values``; return which of them another value replaced."""
    table[codes, columns] = values
    return np.flatnonzero(table[codes, columns] != values)


def _one_per_key(
    column: pa.Array | pa.ChunkedArray, codes: NDArray[np.int64], keys: int
) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the value that the lines of each key have in ``column``, null where they disagree; and the lines that do."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.dictionary_encode()
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    stated = np.flatnonzero(indices >= 0)
    chosen = np.full(keys, -1, np.int64)
    chosen[codes[stated]] = indices[stated]
    clash = stated[chosen[codes[stated]] != indices[stated]]
    chosen[codes[clash]] = -1
    return encoded.dictionary.take(pa.array(chosen, mask=chosen < 0)), clash


def _contradiction(number: int, named: str) -> SourceError:
    return SourceError(
        f"{number} label lines contradict another line of the same key and class, among them {named}. Expected equal "
        "values for duplicates: correct the label file, or treat such labels as unknown with --allow-contradictions."
    )


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
        named = labels.examples(labels.keys.filter(pa.array(wrong)))
        among = f", among them {named}" if named else ""
        raise SourceError(
            f"{int(wrong.sum())} labels have an 'any' that is not the OR of the five subtypes{among}. "
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
    ``extra``, ``subset`` and ``fold`` (n,) are those of the label table, null (-1 in ``fold``) for a slice whose key it
    lacks.
    """

    values: NDArray[np.int8]
    label_line: NDArray[np.int64]
    unlabelled: NDArray[np.bool_]
    without_image: pa.Array
    extra: pa.Table | None = None
    subset: pa.Array | None = None
    fold: NDArray[np.int8] | None = None


def join_labels(labels: LabelTable, keys: pa.ChunkedArray | pa.Array) -> Joined:
    """Return the labels of each of ``keys`` (string, (n,)), a slice's own key of the kind ``labels.key``."""
    index = pc.index_in(keys, value_set=labels.keys).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    listed = pc.index_in(keys, value_set=labels.listed).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    padded = np.concatenate([labels.values, np.full((1, len(labels.classes)), UNKNOWN, np.int8)])
    values = padded[index]  # -1 selects the line of unknowns at the end
    used = np.zeros(len(labels.keys), bool)
    used[index[index >= 0]] = True
    lines = pa.array(index, mask=index < 0)
    return Joined(
        values=values,
        label_line=np.where(index >= 0, index, listed),
        unlabelled=(values == UNKNOWN).all(axis=1),
        without_image=labels.keys.filter(pa.array(~used)),
        extra=None if labels.extra is None else labels.extra.take(lines),
        subset=None if labels.subset is None else labels.subset.take(lines),
        fold=None if labels.fold is None else np.append(labels.fold, np.int8(-1))[index],
    )
