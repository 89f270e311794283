"""Headers + labels + spec -> the plan: which row each slice gets, before any pixel is decoded.

Tables in, tables out. Equal inputs give equal plans, in whatever order the files were listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN
from ich_prep.dataset.schema import QUARANTINE_SCHEMA, series_schema, slice_schema
from ich_prep.dicom.decode import PIXEL_FIELDS
from ich_prep.errors import Reason
from ich_prep.layouts.labels import Joined, LabelTable, join_labels
from ich_prep.stages.folds import assign_folds
from ich_prep.stages.geometry import (
    Spacing,
    group_starts,
    measure_spacing,
    number_ranks,
    order_slices,
    tilt_degrees,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec
    from ich_prep.layouts.assignment import Assignment

# Columns of the slice table that the scan or the layout provides under the same name.
SCANNED_COLUMNS = (
    "sop_instance_uid", "series_instance_uid", "study_instance_uid", "patient_id", "subset",
    "rescale_slope", "rescale_intercept", "repairs",
)  # fmt: skip

# Columns of the plan that the slice table does not have: where a slice's pixels are and how they are stored.
PIXEL_COLUMNS = ("path", *PIXEL_FIELDS, "padding_low", "padding_high")


@dataclass(frozen=True)
class Plan:
    """``slices``: the slice table before any pixel is decoded, and ``PIXEL_COLUMNS``; ``series``; ``quarantine`` so far.

    ``without_image`` are the keys of labels without a file, ``unlabelled`` the SOP Instance UIDs of training slices without
    a label.
    """

    slices: pa.Table
    series: pa.Table
    quarantine: pa.Table
    without_image: pa.Array
    unlabelled: pa.Array


def make_plan(scanned: pa.Table, *, assignment: Assignment, labels: LabelTable, spec: Spec) -> Plan:
    """Return the plan of the files in ``scanned`` (``scan.SCHEMA``, sorted by path).

    ``assignment`` is the layout's, with one value per line of ``scanned``.
    """
    placed = _with_assignment(scanned, assignment)
    is_slice = pc.is_null(scanned["reason"])
    refused, slices = placed.filter(pc.invert(is_slice)), placed.filter(is_slice)

    excluded_because = pc.is_valid(slices["excluded_because"])
    excluded, slices = slices.filter(excluded_because), slices.filter(pc.invert(excluded_because))
    repeated, kept_path = _repeats(slices)
    duplicates, slices = slices.filter(pa.array(repeated)), slices.filter(pa.array(~repeated))

    slices = _sort_slices(slices)
    joined = join_labels(labels, slices[labels.key])
    slices, series = _build_tables(slices, _label_level(labels), joined, spec)
    quarantine = pa.concat_tables(
        [
            _quarantine(refused, "scan", refused["reason"], refused["detail"]),
            _quarantine(excluded, "plan", _constant(excluded, Reason.SCAN_TYPE), excluded["excluded_because"]),
            _quarantine(duplicates, "plan", _constant(duplicates, Reason.DUPLICATE), kept_path),
        ]
    ).sort_by("path")
    excluded_keys = _label_keys_of_excluded(labels, refused, excluded)
    train = pc.equal(slices["subset"], "train")
    unlabelled = slices["sop_instance_uid"].filter(pc.and_(train, pa.array(joined.unlabelled)))
    return Plan(
        slices=slices,
        series=series,
        quarantine=quarantine,
        without_image=joined.without_image.filter(pc.invert(pc.is_in(joined.without_image, value_set=excluded_keys))),
        unlabelled=unlabelled.combine_chunks(),
    )


def _with_assignment(slices: pa.Table, assignment: Assignment) -> pa.Table:
    """Return ``slices`` with the layout's columns; without a patient, the study or else the series is used as one."""
    patient = pc.coalesce(assignment.patient_id, slices["study_instance_uid"], slices["series_instance_uid"])
    slices = slices.set_column(slices.column_names.index("patient_id"), "patient_id", patient)
    unnamed = pc.is_null(assignment.patient_id)
    return (
        slices.append_column("subset", assignment.subset)
        .append_column("subject", assignment.subject)
        .append_column("repairs", assignment.repairs)
        .append_column("excluded_because", assignment.excluded_because)
        .append_column("unnamed_patient", unnamed)
    )


def _repeats(slices: pa.Table) -> tuple[NDArray[np.bool_], pa.Array]:
    """Return which slices repeat the SOP Instance UID of another, and for each of these a sentence with the other's path.

    The first path is kept, but a training slice rather than a test slice: RSNA's test slices of stage 1 are also among the
    training slices of stage 2, where they have labels.
    """
    codes = slices["sop_instance_uid"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(pc.equal(slices["subset"], "test").to_numpy(), kind="stable")
    _, first = np.unique(codes[order], return_index=True)
    first = order[first]
    repeated = np.ones(len(codes), bool)
    repeated[first] = False
    kept = slices["path"].take(pa.array(first[codes[repeated]], pa.int64()))
    return repeated, pc.binary_join_element_wise("the same SOP Instance UID as", kept, " ")


def _quarantine(files: pa.Table, stage: str, reason: object, detail: object) -> pa.Table:
    columns = [files["path"], _constant(files, stage), pa.nulls(len(files), pa.int64()), reason, detail]
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _label_level(labels: LabelTable) -> str:
    """Return what one label describes: a slice, or a whole series."""
    return "slice" if labels.key == "sop_instance_uid" else "series"


def _label_keys_of_excluded(labels: LabelTable, *excluded: pa.Table) -> pa.Array:
    """Return the label keys of files without a row: from their header, or from a file name that is a UID."""
    keys: list[str] = []
    for table in excluded:
        if labels.key in table.column_names:
            keys += table[labels.key].drop_null().to_pylist()
        keys += [path.rsplit("/", 1)[-1].removesuffix(".dcm").strip() for path in table["path"].to_pylist()]
    return pa.array(keys, pa.string())


def _sort_slices(slices: pa.Table) -> pa.Table:
    """Return the slices in the order of their rows: by subset, series and position, as ``order_slices`` says.

    Adds ``position_mm``, ``other_orientation`` and ``no_position``, and the orientation of the series' reference slice.
    """
    result = order_slices(
        _matrix(slices["position"], 3),
        _matrix(slices["orientation"], 6),
        number_ranks(
            slices["instance_number"].fill_null(0).to_numpy(), pc.is_valid(slices["instance_number"]).to_numpy()
        ),
        series=_rank(slices["series_instance_uid"]) + _rank(slices["subset"]) * len(slices),
        uid=_rank(slices["sop_instance_uid"]),
        slice_location=slices["slice_location"].fill_null(np.nan).to_numpy(),
    )
    return (
        slices.append_column("position_mm", _nullable(result.position_mm))
        .append_column(
            "series_orientation", slices["orientation"].take(pa.array(result.reference, mask=result.reference < 0))
        )
        .append_column("other_orientation", pa.array(result.other_orientation))
        .append_column("no_position", pa.array(result.no_position))
        .append_column("direction_unknown", pa.array(result.direction_unknown))
        .take(pa.array(result.order))
    )


def _build_tables(slices: pa.Table, level: str, joined: Joined, spec: Spec) -> tuple[pa.Table, pa.Table]:
    """Return the slice table, to which ``PIXEL_COLUMNS`` are appended, and the series table, of the sorted ``slices``."""
    count = len(slices)
    test = pc.equal(slices["subset"], "test").to_numpy()
    starts = group_starts(_rank(slices["series_instance_uid"]) * 2 + test)
    lengths = np.diff(np.r_[starts, count])
    series_row = np.repeat(np.arange(len(starts)), lengths)
    spacing = measure_spacing(slices["position_mm"].to_numpy(), starts)
    columns = {
        **{name: slices[name] for name in SCANNED_COLUMNS},
        "row": np.arange(count),
        "fold": _folds(slices["patient_id"], test, spec.folds),
        **_label_columns(joined, level, spec.classes),
        "series_row": series_row,
        "slice_index": np.arange(count) - starts[series_row],
        **_position_columns(slices),
        "slice_spacing_mm": _nullable(spacing.slice_spacing_mm),
        "source_rows": slices["rows"],
        "source_columns": slices["columns"],
        "flags": _flag_column(slices, spacing),
    }
    table = _table_of(columns, slice_schema(spec.classes))
    planned = table
    for name in PIXEL_COLUMNS:
        planned = planned.append_column(name, slices[name])
    unlabelled = np.logical_and.reduceat(joined.unlabelled, starts) if count else joined.unlabelled
    series = {
        "label_level": _label_levels(unlabelled, level),
        "first_row": starts,
        "n_slices": lengths,
        "orientation": slices["series_orientation"].take(pa.array(starts, pa.int64())),
        "slice_spacing_mm": _nullable(spacing.series_spacing_mm),
    }
    return planned, _series_table(table, series, starts, spec.classes)


def _folds(patient_id: pa.ChunkedArray, test: NDArray[np.bool_], folds: int) -> pa.Array:
    """Return the fold of each slice, null in the test set."""
    values = assign_folds(patient_id, folds=folds) if len(patient_id) else np.empty(0, np.int8)
    return pa.array(values, mask=test)


def _label_columns(joined: Joined, level: str, classes: tuple[str, ...]) -> dict[str, pa.Array]:
    values = joined.values
    return {
        "label_level": _label_levels(joined.unlabelled, level),
        **{name: pa.array(values[:, i], mask=values[:, i] == UNKNOWN) for i, name in enumerate(classes)},
        "label_line": pa.array(joined.label_line, mask=joined.label_line < 0),
    }


def _label_levels(unlabelled: NDArray[np.bool_], level: str) -> pa.Array:
    return pa.array(np.where(unlabelled, "none", level), pa.string())


def _position_columns(slices: pa.Table) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return the position of the first pixel of each file (ImagePositionPatient), and its pixel spacing, in mm."""
    position, pixel_spacing = _matrix(slices["position"], 3), _matrix(slices["pixel_spacing"], 2)
    return {
        "position_mm": slices["position_mm"],
        **{f"position_{axis}_mm": _nullable(position[:, i]) for i, axis in enumerate("xyz")},
        **{f"pixel_spacing_{axis}_mm": _nullable(pixel_spacing[:, i]) for i, axis in enumerate("yx")},
    }


def _flag_column(slices: pa.Table, spacing: Spacing) -> pa.Array:
    """Return for each slice the sorted names of the flags that it carries."""
    flags = {
        "duplicate_position": spacing.duplicate_position,
        "gap_before": spacing.gap_before,
        "other_orientation": slices["other_orientation"].to_numpy(),
        "no_position": slices["no_position"].to_numpy(),
        "direction_unknown": slices["direction_unknown"].to_numpy(),
        "patient_is_study": slices["unnamed_patient"].to_numpy(),
        "monochrome1": slices["monochrome1"].to_numpy(),
    }
    lists: list[list[str]] = [list(scanned or ()) for scanned in slices["flags"].to_pylist()]
    for name, carries in flags.items():
        for index in np.flatnonzero(carries).tolist():
            lists[index].append(name)
    for names in lists:
        names.sort()
    return pa.array(lists, pa.list_(pa.string()))


def _series_table(
    table: pa.Table, series: dict[str, Any], starts: NDArray[np.int64], classes: tuple[str, ...]
) -> pa.Table:
    """Return one line per series: the given columns, what its slices share, and for each label whether a slice has it.

    ``table`` are the slices, ``starts`` the rows at which the series begin.
    """
    first_slices = table.take(pa.array(starts, pa.int64()))
    labels: dict[str, pa.Array] = {}
    for name in classes:
        values = table[name].fill_null(UNKNOWN).to_numpy()
        highest = np.maximum.reduceat(values, starts) if len(starts) else np.empty(0, np.int8)
        labels[name] = pa.array(highest, mask=highest == UNKNOWN)
    columns = {
        **{name: first_slices[name] for name in first_slices.column_names if name != "flags"},
        **labels,
        **series,
        "n_ok": np.zeros(len(starts), np.int32),
        "tilt_degrees": _nullable(tilt_degrees(_matrix(series["orientation"], 6))),
    }
    return _table_of(columns, series_schema(classes))


# --- columns ---------------------------------------------------------------------------------------------------------


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float64]:
    """Return a column of lists of ``width`` numbers as float64 (n, width), NaN for null."""
    array = column.combine_chunks()
    matrix = np.full((len(array), width), np.nan)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    matrix[valid] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix


def _rank(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return each value's rank among the sorted distinct values of its column."""
    encoded = column.combine_chunks().dictionary_encode()
    rank_of = np.empty(len(encoded.dictionary), np.int64)
    rank_of[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(encoded.dictionary))
    ranks: NDArray[np.int64] = rank_of[encoded.indices.to_numpy(zero_copy_only=False)]
    return ranks


def _constant(table: pa.Table, value: str) -> pa.Array:
    return pa.array([value] * len(table), pa.string())


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    """Return ``values`` as a column, with null for NaN."""
    return pa.array(values, pa.float64(), from_pandas=True)


def _table_of(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Return a table of ``schema`` from these columns, each cast to its type; missing columns are null."""
    length = len(next(iter(columns.values())))
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            values = pa.nulls(length, field.type)
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        arrays.append(column.cast(field.type))
    return pa.table(arrays, schema=schema)
