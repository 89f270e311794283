"""Any tree of DICOM files, with a label CSV whose columns are a UID and class names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import SourceError
from ich_prep.layouts.assignment import Assignment, header_of, no_repairs, nulls, read_csv, require_single
from ich_prep.layouts.labels import (
    DEFAULT_RULES,
    Key,
    LabelRules,
    LabelTable,
    join_labels,
    labels_from_long_table,
    no_labels,
)
from ich_prep.recipe import refuse_unknown

if TYPE_CHECKING:
    from ich_prep.sources import Listing, TableFile

KEYS: tuple[Key, ...] = get_args(Key)[:2]


def recognise(listing: Listing) -> str | None:
    """Return that any tree is a folder."""
    return f"no other layout knows the names of the {len(listing.files)} files"


def read_labels(listing: Listing, given: TableFile | None, rules: LabelRules = DEFAULT_RULES) -> LabelTable:
    """Return the labels of the CSV ``given``, or of the one in the tree that has a UID column.

    If none has, there are no labels, and a note for each CSV in the tree.

    Columns: ``sop_instance_uid`` or ``series_instance_uid``, and any of the rules' classes; values 0, 1 or empty.
    """
    if given is None:
        with_key = [table for table in listing.tables if _key_of(header_of(table))]
        if not with_key:
            expected = " or ".join(KEYS)
            others = tuple(
                f"{table.path} is not read: it has no column {expected}, but {', '.join(header_of(table))}"
                for table in listing.tables
            )
            return replace(no_labels(rules.classes), notes=others)
        given = require_single(with_key, "CSV of labels")
    header = header_of(given)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise SourceError(f"The column {repeated[0]} is {header.count(repeated[0])} times in {given.path}. Keep one.")
    key = _key_of(header)
    if key is None:
        raise SourceError(
            f"Expected a column {' or '.join(KEYS)} in {given.path}; found {', '.join(header) or 'no header line'}."
        )
    named = [name for name in header if name != key]
    refuse_unknown(named, rules.classes, where=f"{given.path}: label column")
    if not named:
        raise SourceError(f"Expected label columns in {given.path}, some of {', '.join(rules.classes)}; found none.")
    table = read_csv(given, {key: pa.string(), **dict.fromkeys(named, pa.int8())})
    lines = []
    for name in named:
        labelled = table.filter(pc.is_valid(table[name]))
        values = labelled[name].to_numpy().astype(np.int8)
        wrong = ~np.isin(values, (0, 1))
        if wrong.any():
            raise SourceError(f"Expected 0, 1 or nothing in column {name} of {given.path}; found {values[wrong][0]}.")
        lines.append((labelled[key].combine_chunks(), np.full(len(labelled), rules.classes.index(name)), values))
    keys, columns, values = (list(parts) for parts in zip(*lines, strict=True))
    labels = labels_from_long_table(
        pa.chunked_array(keys, pa.string()).combine_chunks(),
        np.concatenate(columns),
        np.concatenate(values),
        classes=rules.classes,
        allow_contradictions=rules.allow_contradictions,
    )
    # In the order of the file: `labels` is sorted by column first.
    order = pc.unique(table[key].combine_chunks())
    return replace(labels, key=key, keys=order, values=join_labels(labels, order).values)


def _key_of(columns: tuple[str, ...]) -> Key | None:
    return next((key for key in KEYS if key in columns), None)


def assign(slices: pa.Table, root: str) -> Assignment:
    """Assign every slice to the training set and to its PatientID."""
    count = len(slices)
    return Assignment(
        subset=pa.array(["train"] * count, pa.string()),
        patient_id=slices["patient_id"].combine_chunks(),
        subject=nulls(count),
        repairs=no_repairs(count),
        excluded_because=nulls(count),
    )
