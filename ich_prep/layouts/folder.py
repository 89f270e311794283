"""Any tree of DICOM files, with a table of labels by slice, series, study or patient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from ich_prep.layouts.assignment import Assignment, no_repairs, nulls, require_single
from ich_prep.layouts.labels import DEFAULT_RULES, UIDS, LabelRules, LabelTable, labels_from_lines, no_labels
from ich_prep.layouts.user_columns import find_columns, ignored_note, is_known, key_of, named, names_labels, read_lines
from ich_prep.layouts.user_tables import header_of, open_user_table

if TYPE_CHECKING:
    from ich_prep.sources import Listing, TableFile


def recognise(listing: Listing) -> str | None:
    """Return that any tree is a folder."""
    return f"no other layout knows the names of the {len(listing.files)} files"


def read_labels(listing: Listing, given: TableFile | None, rules: LabelRules = DEFAULT_RULES) -> LabelTable:
    """Return the labels of the table ``given``, or of the one CSV or TSV in the tree that has a key and labels.

    If none has, there are no labels, and a note for each table in the tree. A table has at least one key column (see
    ``user_columns.key_of``) and any of the rules' classes. With several keys the labels are by the finest, until
    ``choose_key`` has seen the files; contradictions are an error only then.
    """
    known = partial(is_known, rules=rules)
    if given is None:
        headers = [(table, header_of(table, known)) for table in listing.tables]
        with_key = [
            (table, header) for table, header in headers if any(key_of(name) for name in header) or rules.options.key
        ]
        labelled = [table for table, header in with_key if names_labels(header, rules)]
        by_uid = [table for table, header in with_key if any(key_of(name) in UIDS for name in header)]
        if not labelled and not by_uid:
            others = tuple(
                f"{table.path} is not read: it has no column sop_instance_uid or other key with labels, but {named(header)}"
                for table, header in headers
            )
            return replace(no_labels(rules.classes), notes=others)
        given = require_single(labelled or by_uid, "table of labels")
    table = open_user_table(given, known)
    columns = find_columns(table.path, table.columns, rules)
    lines = read_lines(table, columns, rules)
    labels = labels_from_lines(lines, columns.candidates[0], classes=rules.classes, strict=len(columns.candidates) == 1)
    notes = (*table.notes, *filter(None, [ignored_note(table.path, columns)]))
    return replace(labels, notes=(*labels.notes, *notes))


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
