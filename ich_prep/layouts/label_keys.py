"""Which of several key columns joins a user's labels to the files: the finest that matches, checked against the coarser.

Tables in, tables out: no file is opened.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import SourceError, count
from ich_prep.layouts.labels import UIDS, Key, LabelLines, LabelTable, fill_any, labels_from_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

# A whole number as pandas writes it in a column with gaps, or a spreadsheet where the decimal point is a comma.
_FLOAT = r"^(-?[0-9]+)[.,]0+$"
_SEPARATOR = "\0"  # in no key


def choose_key(labels: LabelTable, scanned: pa.Table, *, own_patients: bool = False) -> LabelTable:
    """Return ``labels`` by the finest of their keys that matches a file; its notes are those of the choice.

    ``own_patients``: the table's patient ids are not those of the files, and nothing to join by. ``scanned`` are the
    headers of the files, one line each, with a column for each key that the scan reads. Labels that are not from a
    user's table are returned as they are, without notes.

    Raises ``SourceError`` if a line has the key of a file and a coarser key that is not that file's, if one joins by a
    patient id that several issuers gave, and as ``labels_from_lines``.
    """
    lines = labels.lines
    if lines is None:
        return replace(labels, notes=())
    candidates = tuple(key for key in lines.candidates if not (own_patients and key == "patient_id"))
    if own_patients and ("patient_id" not in lines.keys or not candidates):
        raise SourceError(
            f"--patients column takes the patients from the label table: expected a column patient_id beside another key "
            f"in {lines.path}; found {', '.join(lines.keys)}."
        )
    lines, notes = _without_decimals(replace(lines, candidates=candidates), scanned)
    matching = [key for key in candidates if _matches(lines.keys[key], scanned, key)]
    key = matching[0] if matching else candidates[0]
    if not matching and len(scanned):
        notes = [*notes, _no_match(lines, scanned)]
    elif len(candidates) > 1:
        notes = [*notes, f"joined by {key}, the finest key that matches files"]
    checked = {name: values for name, values in lines.keys.items() if not (own_patients and name == "patient_id")}
    _check_coarser(replace(lines, keys=checked), key, scanned)
    if key == "patient_id":
        _check_issuers(lines, scanned)
    chosen = fill_any(labels_from_lines(lines, key, classes=labels.classes))
    return replace(chosen, lines=lines, notes=(*notes, *(note for note in chosen.notes if note not in labels.notes)))


def patients_of_table(labels: LabelTable, keys: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return for each of ``keys`` (string, (n,)) the patient id that the user's table gives it, null where it gives none."""
    if labels.lines is None:
        raise SourceError("--patients column takes the patients from a label table. Give one with --labels.")
    own = pa.table({"key": labels.lines.keys[labels.key], "patient": labels.lines.keys["patient_id"]}).drop_null()
    return own["patient"].take(pc.index_in(keys, value_set=own["key"]))


def _values(scanned: pa.Table, key: Key) -> pa.ChunkedArray:
    if key not in scanned.column_names:
        return pa.chunked_array([pa.nulls(len(scanned), pa.string())])
    return scanned[key]


def _matches(keys: pa.Array, scanned: pa.Table, key: Key) -> bool:
    values = _values(scanned, key).drop_null()
    return bool(pc.any(pc.is_in(keys.drop_null(), value_set=values)).as_py())


def _without_decimals(lines: LabelLines, scanned: pa.Table) -> tuple[LabelLines, list[str]]:
    """Return the lines with ids such as 12345.0 as 12345 where only that matches a file, and a note for each such column."""
    keys, notes = dict(lines.keys), list[str]()
    for key, values in lines.keys.items():
        if key in UIDS or _matches(values, scanned, key):
            continue
        whole = pc.replace_substring_regex(values, _FLOAT, r"\1")
        if _matches(whole, scanned, key):
            changed = int(pc.sum(pc.not_equal(whole, values)).as_py())
            keys[key] = whole
            notes.append(
                f"{count(changed, 'value')} of {key} in {lines.path} written with a decimal point, which no file has: read "
                "as whole numbers"
            )
    return replace(lines, keys=keys), notes


def _no_match(lines: LabelLines, scanned: pa.Table) -> str:
    """Return the note that no key matches a file, with a cause if one is known."""
    note = f"no {' or '.join(lines.candidates)} of {lines.path} is that of a file"
    for key in lines.candidates:
        if key not in UIDS and _matches(_bare(lines.keys[key]), _bare_table(scanned, key), key):
            note += (
                f"; some {key} would be without their leading zeros, or in other case or spacing, but they are not changed: "
                "write them as the files have them, in a column of text"
            )
    return note


def _bare(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return ids without what programs change: leading zeros, case, blanks and a decimal point."""
    return pc.replace_substring_regex(pc.utf8_lower(values), r"^0+|\s|[.,]0+$", "")


def _bare_table(scanned: pa.Table, key: Key) -> pa.Table:
    return pa.table({key: _bare(_values(scanned, key))})


def _check_coarser(lines: LabelLines, key: Key, scanned: pa.Table) -> None:
    """Raise ``SourceError`` if a line with the ``key`` of a file has another coarser key than all files of that key."""
    kinds: Sequence[Key] = list(lines.keys)
    for coarser in kinds[kinds.index(key) + 1 :]:
        files = pa.table({"key": _values(scanned, key), "coarser": _values(scanned, coarser), "path": scanned["path"]})
        files = files.drop_null()
        own = pa.table({"key": lines.keys[key], "coarser": lines.keys[coarser]})
        concerned = pc.and_(pc.is_in(own["key"], value_set=files["key"]), pc.is_valid(own["coarser"]))
        wrong = pc.and_(concerned, pc.invert(pc.is_in(_pairs(own), value_set=_pairs(files))))
        numbers = np.flatnonzero(wrong.fill_null(False).to_numpy())
        if not len(numbers):
            continue
        first = int(numbers[0])
        path = files["path"][pc.index(files["key"], own["key"][first]).as_py()].as_py()
        raise SourceError(
            f"{count(len(numbers), 'line')} of {lines.path} with the {key} of a file and a {coarser} that is not that "
            f"file's, among them {lines.line_of(first)}: it has the {key} of {path}, and another {coarser}. Correct the "
            "table, or leave the column out with --ignore-columns."
        )


def _check_issuers(lines: LabelLines, scanned: pa.Table) -> None:
    """Raise ``SourceError`` if a line has a patient id that two issuers gave (PS3.3 C.7.1.1): those are two patients."""
    files = pa.table({"patient": _values(scanned, "patient_id"), "issuer": scanned["issuer_of_patient_id"]}).drop_null()
    given = files.group_by("patient", use_threads=False).aggregate(
        [("issuer", "count_distinct"), ("issuer", "min"), ("issuer", "max")]
    )
    shared = given.filter(pc.greater(given["issuer_count_distinct"], 1))
    found = np.flatnonzero(
        pc.is_in(lines.keys["patient_id"], value_set=shared["patient"]).to_numpy(zero_copy_only=False)
    )
    if not len(found):
        return
    own = lines.keys["patient_id"][int(found[0])]
    concerned = pc.equal(_values(scanned, "patient_id"), own)
    paths = [
        scanned["path"].filter(pc.and_(concerned, pc.equal(scanned["issuer_of_patient_id"], issuer)))[0].as_py()
        for name in ("issuer_min", "issuer_max")
        for issuer in shared.filter(pc.equal(shared["patient"], own))[name]
    ]
    raise SourceError(
        f"{count(len(found), 'line')} of {lines.path} with a patient_id that two issuers gave, so that of two patients, "
        f"among them {lines.line_of(int(found[0]))}: {' and '.join(paths)} have that PatientID and different "
        "IssuerOfPatientID. Give the labels by study_instance_uid or a finer key."
    )


def _pairs(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["key"], table["coarser"], _SEPARATOR)
