"""CQ500 of Qure.ai: subjects, scan types as folder names, three readers' votes about each subject."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.errors import SourceError
from ich_prep.layouts.assignment import (
    Assignment,
    no_repairs,
    read_csv,
    refuse_options,
    require_single,
    tables_with,
)
from ich_prep.layouts.labels import DEFAULT_RULES, LabelRules, LabelTable, labels_from_long_table, no_labels
from ich_prep.layouts.scan_types import scan_type_of

if TYPE_CHECKING:
    from ich_prep.sources import Listing, TableFile

HEADER = ("name", "Category")
READERS = ("R1", "R2", "R3")
COLUMNS = {
    "epidural": "EDH",
    "intraparenchymal": "IPH",
    "intraventricular": "IVH",
    "subarachnoid": "SAH",
    "subdural": "SDH",
    "any": "ICH",
}
_SUBJECT = re.compile(r"CQ500-?CT-?([0-9]+)")
_RENDERED = re.compile(r"3d", re.IGNORECASE)  # in the name of a folder of volume renderings


def recognise(listing: Listing) -> str | None:
    """Return why the tree is CQ500's: a folder ``CQ500CT<n>``."""
    for folder in sorted(listing.folders()):
        match = _SUBJECT.search(folder)
        if match:
            return f"there is a folder {match[0]}"
    return None


def read_labels(listing: Listing, given: TableFile | None, rules: LabelRules = DEFAULT_RULES) -> LabelTable:
    """Return the majority vote of the three readers for each subject: labels of a scan, not of a slice.

    Readers may agree on a bleed but not on its type: then ``any`` is 1 and no subtype is. If a majority for a subtype
    exists without one for ICH, ``any`` is set to 1, and a note counts these subjects.
    """
    refuse_options(rules, "cq500")
    tables = tables_with(listing, HEADER)
    if given is None and rules.allow_unlabelled and not tables:
        return replace(no_labels(rules.classes), key="subject")
    label_file = given or require_single(tables, "reads.csv with the header name,Category,R1:ICH,...")
    columns = [f"{reader}:{short}" for reader in READERS for short in COLUMNS.values()]
    table = read_csv(label_file, {"name": pa.string(), **dict.fromkeys(columns, pa.int8())})
    missing = [name for name in ("name", *columns) if name not in table.column_names]
    if missing:
        raise SourceError(
            f"Expected the votes of three readers in {label_file.path}; the columns {', '.join(missing)} are missing."
        )
    for name in columns:
        if not pc.all(pc.is_in(table[name], value_set=pa.array([0, 1], pa.int8()))).as_py():
            raise SourceError(
                f"Expected votes of 0 or 1 in column {name} of {label_file.path}; found others. Correct the file."
            )
    votes = [sum(table[f"{reader}:{COLUMNS[name]}"].to_numpy() for reader in READERS) for name in RSNA_CLASSES]
    values = (np.stack(votes, axis=1) >= 2).astype(np.int8)
    implied = values[:, :-1].max(axis=1)
    raised = int((implied > values[:, -1]).sum())
    values[:, -1] = np.maximum(values[:, -1], implied)
    subjects = pa.array([_subject(name) or name for name in table["name"].to_pylist()], pa.string())
    labels = labels_from_long_table(
        subjects.take(pa.array(np.repeat(np.arange(len(subjects)), len(RSNA_CLASSES)))),
        np.tile(np.arange(len(RSNA_CLASSES)), len(subjects)),
        values.reshape(-1),
        allow_contradictions=rules.allow_contradictions,
    )
    notes = (
        (f"{raised} subjects have a subtype by majority and no ICH by majority: any was set to 1",) if raised else ()
    )
    return replace(labels, key="subject", notes=(*labels.notes, *notes))


def _subject(name: str) -> str | None:
    """Return a subject's name in the spelling of reads.csv, from that of a folder or a PatientID."""
    match = _SUBJECT.search(name)
    return None if match is None else f"CQ500-CT-{int(match[1])}"


def _is_excluded(folder: str) -> bool:
    """Return whether a folder holds series after contrast, of bone and lung kernels, or renderings."""
    return _RENDERED.search(folder) is not None or scan_type_of(None, folder, None, None)[0] in ("contrast", "bone")


def assign(slices: pa.Table, root: str) -> Assignment:
    """Assign each slice to its subject; exclude series that are not plain CT."""
    paths, ids = slices["path"].to_pylist(), slices["patient_id"].to_pylist()
    subjects = [_subject(path) or _subject(patient or "") for path, patient in zip(paths, ids, strict=True)]
    types = [path.rsplit("/", 2)[-2] if "/" in path else "" for path in paths]
    excluded_because = [f"the scan type {name!r} is no plain CT" if _is_excluded(name) else None for name in types]
    patients = pa.array(subjects, pa.string())
    return Assignment(
        subset=pa.array(["train"] * len(paths), pa.string()),
        patient_id=patients,
        subject=patients,
        repairs=no_repairs(len(paths)),
        excluded_because=pa.array(excluded_because, pa.string()),
    )
