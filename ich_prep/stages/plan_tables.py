"""The sorted slices of a plan -> the slice and series tables, before any pixel is decoded. Tables in, tables out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN
from ich_prep.dataset.schema import series_schema, slice_schema
from ich_prep.dicom.decode import PIXEL_FIELDS
from ich_prep.stages.flags import with_flags
from ich_prep.stages.geometry import Spacing, group_starts, measure_spacing, tilt_degrees
from ich_prep.stages.identity import folds_of_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec
    from ich_prep.layouts.labels import Joined, LabelTable

# Columns of the slice table that the scan or the layout provides under the same name.
SCANNED_COLUMNS = (
    "sop_instance_uid", "series_instance_uid", "study_instance_uid", "subset", "fold_group",
    "rescale_slope", "rescale_intercept", "repairs",
)  # fmt: skip

# Columns of the plan that the slice table does not have: where a slice's pixels are and how they are stored.
PIXEL_COLUMNS = ("path", *PIXEL_FIELDS, "padding_low", "padding_high")
# Also the key of the label of each labelled slice: when pixels do not decode, it shows which labels are lost. And the fold
# that the label table gives, -1 where it gives none: equal images, found later, may join fold groups.
PLAN_COLUMNS = (*PIXEL_COLUMNS, "label_key", "given_fold")

# Flags that a column of the slices states, by the column's name.
_COLUMN_FLAGS = {
    "other_orientation": "other_orientation",
    "no_position": "no_position",
    "direction_unknown": "direction_unknown",
    "unnamed_patient": "patient_is_study",
    "header_not_head": "not_head",
    "contrast_stated": "contrast_stated",
    "monochrome1": "monochrome1",
    "patient_conflict": "patient_conflict",
    "series_uid_shared": "series_uid_shared",
    "sop_uid_shared": "sop_uid_shared",
}
# Columns of the series table that the header of a slice states, by the scan's name for them.
_HEADER_COLUMNS = {
    "patient_sex": "patient_sex",
    "manufacturer": "manufacturer",
    "convolution_kernel": "convolution_kernel",
    "kvp": "kvp",
    "slice_thickness": "slice_thickness_mm",
    "series_description": "series_description",
    "protocol_name": "protocol_name",
    "body_part": "body_part",
    "contrast_agent": "contrast_agent",
    "accession_number": "accession_number",
}
# Columns of the scan, and of its words, that the tables need and no decision: taken once the order of the rows is known.
CARRIED = frozenset(
    (*_HEADER_COLUMNS, *PIXEL_COLUMNS, "rescale_slope", "rescale_intercept", "repairs", "position", "pixel_spacing")
    + ("rows", "columns", "flags", "study_date", "patient_age", "scan_type", "header_not_head", "contrast_stated")
    + ("monochrome1",)
)


@dataclass(frozen=True)
class PlanTables:
    """The slice table, to which ``PLAN_COLUMNS`` are appended, and the series table."""

    slices: pa.Table
    series: pa.Table


def build_tables(
    slices: pa.Table, orientation: pa.ChunkedArray, labels: LabelTable, joined: Joined, spec: Spec
) -> PlanTables:
    """Return the tables of the sorted ``slices``, of which ``joined`` are the ``labels``; ``orientation`` is by volume."""
    count = len(slices)
    level = labels.level
    starts = group_starts(slices["volume"].to_numpy())
    lengths = np.diff(np.r_[starts, count])
    series_row = np.repeat(np.arange(len(starts)), lengths)
    spacing = measure_spacing(slices["order_mm"].to_numpy(), starts)
    columns = {
        **{name: slices[name] for name in SCANNED_COLUMNS},
        "patient_id": slices["patient"],
        "row": np.arange(count),
        "fold": planned_folds(slices, slices["fold_group"], slices["patient"], folds=spec.folds),
        **_label_columns(joined, level, spec.classes),
        "series_row": series_row,
        "slice_index": np.arange(count) - starts[series_row],
        **_position_columns(slices),
        "slice_spacing_mm": nullable(spacing.slice_spacing_mm),
        "turn": slices["turn"],
        "source_rows": slices["rows"],
        "source_columns": slices["columns"],
        "flags": _flag_column(slices, spacing),
    }
    extra = pa.table({}) if joined.extra is None else joined.extra
    columns |= {name: extra[name] for name in extra.column_names}
    table = _table_of(columns, slice_schema(spec.classes, extra.schema))
    planned = table
    for name in PIXEL_COLUMNS:
        planned = planned.append_column(name, slices[name])
    label_key = pc.if_else(pa.array(joined.unlabelled), pa.scalar(None, pa.string()), slices["label_key"])
    unlabelled = np.logical_and.reduceat(joined.unlabelled, starts) if count else joined.unlabelled
    series = {
        "label_level": _label_levels(unlabelled, level),
        "first_row": starts,
        "n_slices": lengths,
        "orientation": orientation,
        "slice_spacing_mm": nullable(spacing.series_spacing_mm),
        "volume_in_series": _number_in_series(slices["series_instance_uid"].take(pa.array(starts, pa.int64()))),
        "scan_type": slices["scan_type"].take(pa.array(starts, pa.int64())),
        "acquisition": slices["acquisition"].take(pa.array(starts, pa.int64())),
        **_header_columns(slices, starts),
    }
    planned = planned.append_column("label_key", label_key).append_column("given_fold", slices["given_fold"])
    return PlanTables(planned, _series_table(table, series, starts, spec.classes))


def planned_folds(
    slices: pa.Table, fold_group: pa.Array | pa.ChunkedArray, patient_id: pa.ChunkedArray, *, folds: int
) -> pa.Array:
    """Return the fold of each slice, int8 (n,): the one given, else that of its group; null in the test set."""
    given = slices["given_fold"].to_numpy()
    fold = np.where(given >= 0, given, folds_of_groups(fold_group, patient_id, folds=folds))
    return pa.array(fold.astype(np.int8), mask=pc.equal(slices["subset"], "test").to_numpy())


def _number_in_series(series: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return for each volume how many before it have its Series Instance UID, (s,); volumes of one are adjacent."""
    codes = series.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    seen: dict[int, int] = {}
    numbers = np.empty(len(codes), np.int64)
    for index, code in enumerate(codes.tolist()):
        numbers[index] = seen[code] = seen.get(code, -1) + 1
    return numbers


def _header_columns(slices: pa.Table, starts: NDArray[np.int64]) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return the columns of the series table that come from headers: of each, the first value in a volume."""
    columns = {name: _first_valid(slices[column], starts) for column, name in _HEADER_COLUMNS.items()}
    year = pc.utf8_slice_codeunits(_first_valid(slices["study_date"], starts), 0, 4)
    columns["study_year"] = pc.if_else(pc.match_substring_regex(year, "^[0-9]{4}$"), year, None).cast(pa.int32())
    ages = [_years(text) for text in _first_valid(slices["patient_age"], starts).to_pylist()]
    columns["patient_age"] = pa.array(ages, pa.float32())
    return columns


def _first_valid(column: pa.ChunkedArray, starts: NDArray[np.int64]) -> pa.ChunkedArray:
    """Return the first value in each group, null where all are; ``starts``, (s,), is where each group begins."""
    valid = np.flatnonzero(column.is_valid().to_numpy())
    at = np.searchsorted(valid, starts)
    ends = np.r_[starts[1:], len(column)]
    found = np.r_[valid, len(column)][at]
    return column.take(pa.array(found, pa.int64(), mask=found >= ends))


def _years(age: str | None) -> float | None:
    """Return an age string (PS3.5 6.2, AS: three digits and D, W, M or Y) in years."""
    if age is None or len(age) != 4 or not age[:3].isdigit() or age[3] not in _PER_YEAR:
        return None
    return int(age[:3]) / _PER_YEAR[age[3]]


_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}


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
    position, pixel_spacing = matrix(slices["position"], 3), matrix(slices["pixel_spacing"], 2)
    return {
        "position_mm": slices["position_mm"],
        **{f"position_{axis}_mm": nullable(position[:, i]) for i, axis in enumerate("xyz")},
        **{f"pixel_spacing_{axis}_mm": nullable(pixel_spacing[:, i]) for i, axis in enumerate("yx")},
    }


def _flag_column(slices: pa.Table, spacing: Spacing) -> pa.Array:
    """Return for each slice the sorted names of the flags that it carries."""
    flags = {
        "duplicate_position": spacing.duplicate_position,
        "gap_before": spacing.gap_before,
        **{flag: slices[name].to_numpy() for name, flag in _COLUMN_FLAGS.items()},
    }
    return with_flags(pc.fill_null(slices["flags"], []), flags)


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
        "tilt_degrees": nullable(tilt_degrees(matrix(series["orientation"], 6))),
    }
    return _table_of(columns, series_schema(classes))


# --- columns ---------------------------------------------------------------------------------------------------------


def matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float64]:
    """Return a column of lists of ``width`` numbers as float64 (n, width), NaN for null."""
    array = column.combine_chunks()
    matrix = np.full((len(array), width), np.nan)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    matrix[valid] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix


def constant(count: int, value: str) -> pa.Array:
    """Return a column of ``count`` times ``value``."""
    return pa.array([value] * count, pa.string())


def nullable(values: NDArray[np.float64]) -> pa.Array:
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
