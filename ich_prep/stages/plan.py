"""Headers + labels + spec -> the plan: every slice its row, before any pixel is decoded.

Everything here is tables in, tables out. The plan does not depend on the order in which files were listed, on who made
it or when, and equal inputs give equal plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import schema
from ich_prep.dataset.classes import UNKNOWN
from ich_prep.errors import Reason
from ich_prep.layouts.labels import Joined, LabelTable, join_labels
from ich_prep.stages.folds import assign_folds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.schema import Spec
    from ich_prep.layouts.assignment import Assignment

SAME_POSITION_MM = 0.01
GAP_SPACINGS = 1.5
SAME_DIRECTION_COSINE = 0.9998  # about one degree

# What a shard's task needs to know of a slice: columns of the plan besides those of the slice table.
PIXEL_COLUMNS = (
    "path", "transfer_syntax", "file_size", "header_bytes", "crc32c", "pixel_offset", "rows", "columns",
    "bits_allocated", "bits_stored", "signed", "padding_low", "padding_high",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``slices``: what is known of each row beforehand, and where its pixels lie; ``series``; ``quarantine`` so far.

    ``without_image`` are labels that no file answers to, ``unlabelled`` the SOP Instance UIDs of slices that no label
    answers to.
    """

    slices: pa.Table
    series: pa.Table
    quarantine: pa.Table
    without_image: pa.Array
    unlabelled: pa.Array


def make_plan(scanned: pa.Table, *, assignment: Assignment, labels: LabelTable, spec: Spec) -> Plan:
    """Return the plan of the files in ``scanned`` (``scan.SCHEMA``, sorted by path).

    ``assignment`` says what the layout knows of each line of ``scanned``.
    """
    placed = _with_assignment(scanned, assignment)
    is_slice = pc.is_null(scanned["reason"])
    set_aside, slices = placed.filter(pc.invert(is_slice)), placed.filter(is_slice)

    excluded_because = pc.is_valid(slices["excluded_because"])
    excluded, slices = slices.filter(excluded_because), slices.filter(pc.invert(excluded_because))
    repeated, kept_path = _repeats(slices)
    duplicates, slices = slices.filter(pa.array(repeated)), slices.filter(pa.array(~repeated))

    slices = _ordered(slices)
    joined = join_labels(labels, slices[labels.key])
    slices, series = _measure(slices, _level(labels), joined, spec)
    quarantine = pa.concat_tables(
        [
            _quarantine(set_aside["path"], "scan", set_aside["reason"], set_aside["detail"]),
            _quarantine(excluded["path"], "plan", _all(excluded, Reason.SCAN_TYPE), excluded["excluded_because"]),
            _quarantine(duplicates["path"], "plan", _all(duplicates, Reason.DUPLICATE), kept_path),
        ]
    ).sort_by("path")
    accounted = _accounted(labels, set_aside, excluded)
    train = pc.equal(slices["subset"], "train")
    unlabelled = slices["sop_instance_uid"].filter(pc.and_(train, pa.array(joined.unlabelled)))
    return Plan(
        slices=slices,
        series=series,
        quarantine=quarantine,
        without_image=joined.without_image.filter(pc.invert(pc.is_in(joined.without_image, value_set=accounted))),
        unlabelled=unlabelled.combine_chunks(),
    )


def _with_assignment(slices: pa.Table, assignment: Assignment) -> pa.Table:
    """Return ``slices`` with what the layout knows; a slice without a patient is a patient by its study, or series."""
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
    """Return which slices repeat the SOP Instance UID of another, and for each of these what it repeats.

    The first path is kept, and a training slice before a test slice: RSNA's test slices of stage 1 come again among the
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


def _quarantine(path: pa.ChunkedArray, stage: str, reason: object, detail: object) -> pa.Table:
    columns = [path, pa.array([stage] * len(path), pa.string()), pa.nulls(len(path), pa.int64()), reason, detail]
    return pa.table(columns, schema=schema.QUARANTINE_SCHEMA)


def _all(table: pa.Table, reason: Reason) -> pa.Array:
    return pa.array([str(reason)] * len(table), pa.string())


def _level(labels: LabelTable) -> str:
    """Return what one label speaks of: a slice, or a whole series."""
    return "slice" if labels.key == "sop_instance_uid" else "series"


def _accounted(labels: LabelTable, *tables: pa.Table) -> pa.Array:
    """Return the label keys of files that were set aside: by their header, or by a file name that is their UID."""
    known: list[str] = []
    for table in tables:
        if labels.key in table.column_names:
            known += table[labels.key].drop_null().to_pylist()
        known += [path.rsplit("/", 1)[-1].removesuffix(".dcm").strip() for path in table["path"].to_pylist()]
    return pa.array(known, pa.string())


def _ordered(slices: pa.Table) -> pa.Table:
    """Return the slices in the order of their rows: by subset, series, position along the normal.

    Adds ``position_mm``, the distance along the normal that most slices of the series share, the orientation with that
    normal, and the flags that the geometry gives. Slices without a position or orientation come after those with one, by
    instance number; where all slices of their series have a number, the whole series is ordered by it instead.
    """
    position = _matrix(slices["position"], 3)
    orientation = _matrix(slices["orientation"], 6)
    normal = np.cross(orientation[:, :3], orientation[:, 3:])
    with np.errstate(invalid="ignore", divide="ignore"):
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    series = _rank(slices["series_instance_uid"]) + _rank(slices["subset"]) * len(slices)
    uid = _rank(slices["sop_instance_uid"])

    run = _run_number(series)
    head = _head_of_most(normal, run, uid)[run]
    headless = head < 0
    shared = np.where(headless[:, np.newaxis], np.nan, normal[head])
    with np.errstate(invalid="ignore"):
        along = np.einsum("ij,ij->i", position, shared)
        turned = ~(np.abs(np.einsum("ij,ij->i", normal, shared)) >= SAME_DIRECTION_COSINE)
    nowhere = np.isnan(along) | np.isnan(normal[:, 0])
    unnumbered = slices["instance_number"].is_null().to_numpy()
    unplaced = nowhere | (_any_of_run(nowhere, run) & ~_any_of_run(unnumbered, run))
    number = slices["instance_number"].fill_null(np.iinfo(np.int64).max).to_numpy()
    along = np.where(unplaced, np.nan, along)
    key = np.where(unplaced, number, along)
    order = np.lexsort((uid, number, key, unplaced, series))
    return (
        slices.append_column("position_mm", pa.array(along, pa.float64(), from_pandas=True))
        .append_column("series_orientation", slices["orientation"].take(pa.array(head, mask=headless)))
        .append_column("turned", pa.array(turned & ~unplaced))
        .append_column("unplaced", pa.array(unplaced))
        .take(pa.array(order))
    )


def _head_of_most(normal: NDArray[np.float64], run: NDArray[np.int64], uid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each run the slice whose normal, (n, 3), most slices of the run share, -1 where none has one.

    Of these, and of normals that equally many share, it is the one with the least ``uid``: a scout or a reformatted slice
    among the others must not decide. Normals are alike that agree in three decimals, a twentieth of a degree.
    """
    heads = np.full(run.max(initial=-1) + 1, -1, np.int64)
    there = np.flatnonzero(~np.isnan(normal[:, 0]))
    steps = np.rint(normal[there] * 1000).astype(np.int64) + 1000
    alike = _run_number(run[there] * 2001**3 + steps @ np.array([2001**2, 2001, 1]))
    votes = np.bincount(alike)[alike]
    order = there[np.lexsort((uid[there], -votes, run[there]))]
    starts = np.unique(_first_of_run(run[order]))
    heads[run[order[starts]]] = order[starts]
    return heads


def _any_of_run(values: NDArray[np.bool_], run: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each element whether ``values`` holds for any element of its run."""
    found = np.zeros(len(values), bool)
    found[run[values]] = True
    return found[run]


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float64]:
    """Return a column of lists of ``width`` numbers as float64 (n, width), NaN where it is null."""
    array = column.combine_chunks()
    matrix = np.full((len(array), width), np.nan)
    there = array.is_valid().to_numpy(zero_copy_only=False)
    matrix[there] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix


def _rank(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return each value's place among the sorted different values of its column."""
    encoded = column.combine_chunks().dictionary_encode()
    places = np.empty(len(encoded.dictionary), np.int64)
    places[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(encoded.dictionary))
    ranks: NDArray[np.int64] = places[encoded.indices.to_numpy(zero_copy_only=False)]
    return ranks


def _run_number(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a small number for each value: equal for equal values."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _first_of_run(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each element of a grouped array the index at which its group begins."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, np.int64)
    return np.repeat(starts, np.diff(np.r_[starts, len(values)]))


def _measure(slices: pa.Table, level: str, joined: Joined, spec: Spec) -> tuple[pa.Table, pa.Table]:
    """Return the slice table with rows, spacing, flags, folds and labels, and the series table."""
    count = len(slices)
    group = _rank(slices["series_instance_uid"]) * 2 + pc.equal(slices["subset"], "test").to_numpy()
    first = _first_of_run(group)
    begins = np.unique(first)
    lengths = np.diff(np.r_[begins, count])
    number = np.repeat(np.arange(len(begins)), lengths)
    starts_series = np.arange(count) == first

    position = slices["position_mm"].to_numpy()
    before = np.where(starts_series, np.nan, np.diff(position, prepend=np.nan))
    after = np.r_[before[1:], np.nan] if count else before
    spacing = np.where(np.isnan(after), before, after)
    typical = np.array(
        [_median_spacing(before[start + 1 : start + length]) for start, length in zip(begins, lengths, strict=True)]
    )
    with np.errstate(invalid="ignore"):
        repeated = (before < SAME_POSITION_MM) | (after < SAME_POSITION_MM)
        gap = before > GAP_SPACINGS * (typical[number] if count else before)
    flags = {
        "duplicate_position": repeated,
        "gap_before": gap,
        "other_orientation": slices["turned"].to_numpy(),
        "no_position": slices["unplaced"].to_numpy(),
        "patient_is_study": slices["unnamed_patient"].to_numpy(),
        "monochrome1": slices["monochrome1"].to_numpy(),
    }
    fold = pa.array(
        assign_folds(slices["patient_id"], folds=spec.folds) if count else np.empty(0, np.int8),
        mask=pc.equal(slices["subset"], "test").to_numpy(),
    )
    spacings = _matrix(slices["pixel_spacing"], 2)
    places = _matrix(slices["position"], 3)
    labelled = _label_columns(joined.values, spec.classes)
    columns = {
        "row": np.arange(count),
        **{name: slices[name] for name in ("sop_instance_uid", "series_instance_uid", "study_instance_uid")},
        "patient_id": slices["patient_id"],
        "subset": slices["subset"],
        "fold": fold,
        "status": pa.nulls(count, pa.string()),
        "label_level": pa.array(np.where(joined.unlabelled, "none", level), pa.string()),
        **labelled,
        "label_line": pa.array(joined.label_line, mask=joined.label_line < 0),
        "series_row": number,
        "slice_index": np.arange(count) - first,
        "position_mm": slices["position_mm"],
        **{f"position_{axis}_mm": _nullable(places[:, i]) for i, axis in enumerate("xyz")},
        "slice_spacing_mm": _nullable(spacing),
        "pixel_spacing_y_mm": _nullable(spacings[:, 0]),
        "pixel_spacing_x_mm": _nullable(spacings[:, 1]),
        "source_rows": slices["rows"],
        "source_columns": slices["columns"],
        "rescale_slope": slices["rescale_slope"],
        "rescale_intercept": slices["rescale_intercept"],
        "repairs": slices["repairs"],
        "flags": _flag_lists(flags),
    }
    table = _table_of(columns, schema.slice_schema(spec.classes))
    planned = table
    for name in PIXEL_COLUMNS:
        planned = planned.append_column(name, slices[name])
    unlabelled = np.logical_and.reduceat(joined.unlabelled, begins) if count else joined.unlabelled
    levels = pa.array(np.where(unlabelled, "none", level), pa.string())
    return planned, _series_table(table, slices, begins, lengths, typical, levels, spec.classes)


def _median_spacing(steps: NDArray[np.float64]) -> float:
    """Return the median distance between neighbouring positions that differ, in mm; NaN where there is none."""
    apart = steps[steps >= SAME_POSITION_MM]
    return float(np.median(apart)) if len(apart) else np.nan


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float64(), from_pandas=True)


def _cast(values: object, kind: pa.DataType) -> pa.Array:
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    return column.cast(kind)


def _label_columns(values: NDArray[np.int8], classes: tuple[str, ...]) -> dict[str, pa.Array]:
    return {name: pa.array(values[:, i], mask=values[:, i] == UNKNOWN) for i, name in enumerate(classes)}


def _flag_lists(flags: dict[str, NDArray[np.bool_]]) -> pa.Array:
    """Return for each slice the sorted names of the flags that it carries."""
    lists: list[list[str]] = [[] for _ in range(len(next(iter(flags.values()))))]
    for name in sorted(flags):
        for row in np.flatnonzero(flags[name]).tolist():
            lists[row].append(name)
    return pa.array(lists, pa.list_(pa.string()))


def _series_table(
    table: pa.Table,
    slices: pa.Table,
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    typical: NDArray[np.float64],
    levels: pa.Array,
    classes: tuple[str, ...],
) -> pa.Table:
    """Return one line a series: what its slices share, the level of its labels, and for each whether a slice has it."""
    heads = table.take(pa.array(begins, pa.int64()))
    labels: dict[str, pa.Array] = {}
    for name in classes:
        stated = table[name].fill_null(UNKNOWN).to_numpy()
        highest = np.maximum.reduceat(stated, begins) if len(begins) else np.empty(0, np.int8)
        labels[name] = pa.array(highest, mask=highest == UNKNOWN)
    orientation = slices["series_orientation"].take(pa.array(begins, pa.int64()))
    cosines = _matrix(orientation, 6)
    with np.errstate(invalid="ignore"):
        across = np.cross(cosines[:, :3], cosines[:, 3:])
        tilt = np.degrees(np.arccos(np.clip(np.abs(across[:, 2]) / np.linalg.norm(across, axis=1), 0, 1)))
    columns = {
        **{name: heads[name] for name in heads.column_names if name != "flags"},
        **labels,
        "label_level": levels,
        "first_row": begins,
        "n_slices": lengths,
        "n_ok": np.zeros(len(begins), np.int32),
        "orientation": orientation,
        "tilt_degrees": _nullable(tilt),
        "slice_spacing_mm": _nullable(typical),
    }
    return _table_of(columns, schema.series_schema(classes))


def _table_of(columns: dict[str, object], form: pa.Schema) -> pa.Table:
    """Return the table of ``form`` with these ``columns``; those that nothing fills are null."""
    length = max(len(values) for values in columns.values())  # type: ignore[arg-type]
    arrays = [_cast(columns.get(field.name, pa.nulls(length)), field.type) for field in form]
    return pa.table(arrays, schema=form)
