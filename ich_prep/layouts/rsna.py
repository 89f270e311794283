"""The RSNA 2019 Intracranial Hemorrhage Detection set: flat folders of slices, a long CSV, a sample submission."""

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
    nulls,
    read_csv,
    refuse_options,
    require_single,
    tables_with,
)
from ich_prep.layouts.labels import DEFAULT_RULES, LabelRules, LabelTable, labels_from_long_table, no_labels
from ich_prep.pixels import repairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.sources import Listing, TableFile

HEADER = ("ID", "Label")
REPAIRS = (repairs.SIGN_12BIT,)

_FOLDER = re.compile(r"(?:^|/)(stage_[12]_(?:train|test)(?:_images)?)/")
_TEST = r"(^|/)stage_[12]_test(_images)?/"
_SAMPLE = "sample_submission"


def recognise(listing: Listing) -> str | None:
    """Return why the tree is RSNA's: it has or is a folder ``stage_*_train`` or ``_test``, with or without ``_images``."""
    for folder in sorted(listing.folders()):
        match = _FOLDER.search(f"{listing.name}/{folder}")
        if match:
            return f"there is a folder {match[1]}"
    return None


def read_labels(listing: Listing, given: TableFile | None, rules: LabelRules = DEFAULT_RULES) -> LabelTable:
    """Return the labels of the training slices, and the slices that the sample submission lists.

    The label file is ``given``, or the one CSV with the header ``ID,Label`` that is not a sample submission. A line is
    ``<SOP Instance UID>_<class>,<0 or 1>``.
    """
    refuse_options(rules, "rsna")
    tables = tables_with(listing, HEADER)
    if given is None and rules.allow_unlabelled and not tables:
        return no_labels(rules.classes)
    samples = [table for table in tables if _SAMPLE in table.name]
    others = [table for table in tables if table not in samples]
    label_file = given or require_single(others, "label file with the header ID,Label")
    keys, columns, values = _read_long(label_file)
    valid = np.isin(values, (0, 1))
    if not valid.all():
        raise SourceError(
            f"Expected labels of 0 or 1 in {label_file.path}; found another value in line "
            f"{int(np.argmin(valid)) + 2}. Give the training labels with --labels (a sample submission has none)."
        )
    labels = labels_from_long_table(
        keys, columns, values.astype(np.int8), allow_contradictions=rules.allow_contradictions
    )
    if len(samples) > 1:
        raise SourceError(
            f"Expected one sample submission in the source; found {', '.join(table.path for table in samples)}. "
            "Keep only the one of the stage whose files are in the source."
        )
    listed = pc.unique(_read_long(samples[0])[0]) if samples else pa.array([], pa.string())
    return replace(labels, listed=listed)


def _read_long(table_file: TableFile) -> tuple[pa.Array, NDArray[np.intp], NDArray[np.float64]]:
    """Return the SOP Instance UID, class and label of each line of a long CSV."""
    table = read_csv(table_file, {"ID": pa.string(), "Label": pa.float64()})
    if not {*HEADER} <= {*table.column_names}:
        raise SourceError(
            f"Expected the columns {','.join(HEADER)} in {table_file.path}, one line per slice and class; found "
            f"{','.join(table.column_names)}. Give the label file of the competition with --labels."
        )
    names = table["ID"].combine_chunks()
    # The class follows the last '_'. No class name contains one, so each suffix has a fixed length.
    classes = np.full(len(names), -1, np.intp)
    keys: pa.Array = names
    for number, name in enumerate(RSNA_CLASSES):
        ends = pc.ends_with(names, pattern=f"_{name}")
        classes[ends.to_numpy(zero_copy_only=False)] = number
        keys = pc.if_else(ends, pc.utf8_slice_codeunits(names, 0, -len(name) - 1), keys)
    if (classes < 0).any():
        line = int(np.argmax(classes < 0))
        raise SourceError(
            f"Expected each ID of {table_file.path} to end in _<class>, one of {', '.join(RSNA_CLASSES)}; "
            f"that of line {line + 2} does not."
        )
    return keys, classes, table["Label"].to_numpy()


def assign(slices: pa.Table, root: str) -> Assignment:
    """Return subset by folder, patient by PatientID, and which slices need a repair."""
    count = len(slices)
    paths = pc.binary_join_element_wise(root, slices["path"], "/")
    test = pc.match_substring_regex(paths, _TEST).to_numpy(zero_copy_only=False)
    headers = repairs.HeaderColumns(
        bits_stored=slices["bits_stored"].fill_null(0).to_numpy(),
        signed=slices["signed"].fill_null(True).to_numpy(),
        rescale_intercept=slices["rescale_intercept"].fill_null(np.nan).to_numpy(),
    )
    return Assignment(
        subset=pa.array(np.where(test, "test", "train"), pa.string()),
        patient_id=slices["patient_id"].combine_chunks(),
        subject=nulls(count),
        repairs=pa.array(repairs.detect(REPAIRS, headers), pa.list_(pa.string())),
        excluded_because=nulls(count),
    )
