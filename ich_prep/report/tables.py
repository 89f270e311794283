"""The columns of a dataset's tables that a report reads; those that an older dataset lacks are null."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN
from ich_prep.dataset.schema import (
    OK,
    QUARANTINE_SCHEMA,
    SHARD_SCHEMA,
    UNUSED,
    WITHDRAWN,
    series_schema,
    slice_schema,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset

SLICE_COLUMNS = (
    "patient_id", "subset", "fold", "fold_group", "status", "label_level", "series_row", "turn", "repairs", "flags",
    "hu_mean", "content_hash",
)  # fmt: skip
SERIES_COLUMNS = (
    "series_row", "series_instance_uid", "patient_id", "subset", "first_row", "n_slices", "scan_type", "tilt_degrees",
    "slice_spacing_mm", "pixel_spacing_x_mm", "source_rows", "source_columns", "study_year", "patient_age",
    "patient_sex", "manufacturer", "slice_thickness_mm", "series_description",
)  # fmt: skip


@dataclass(frozen=True)
class ReportTables:
    """The tables, in the order of their rows, with the columns above and one for each of ``classes``."""

    classes: tuple[str, ...]
    slices: pa.Table
    series: pa.Table
    shards: pa.Table
    quarantine: pa.Table

    @cached_property
    def labels(self) -> NDArray[np.int8]:
        """The labels of all rows, int8 (slices, classes), -1 where unknown and in rows of no slice that is present."""
        columns = [self.slices[name].fill_null(UNKNOWN).to_numpy() for name in self.classes]
        labels = np.stack(columns, axis=1).astype(np.int8)
        return np.where(self.is_present[:, np.newaxis], labels, UNKNOWN).astype(np.int8)

    @cached_property
    def is_ok(self) -> NDArray[np.bool_]:
        """Whether each row has pixels, bool (slices,)."""
        ok: NDArray[np.bool_] = pc.equal(self.slices["status"], OK).fill_null(False).to_numpy(zero_copy_only=False)
        return ok

    @cached_property
    def is_present(self) -> NDArray[np.bool_]:
        """Whether each row is one of a slice that was not withdrawn, bool (slices,)."""
        absent = pc.is_in(self.slices["status"], value_set=pa.array([UNUSED, WITHDRAWN]))
        present: NDArray[np.bool_] = pc.invert(absent).to_numpy(zero_copy_only=False)
        return present

    def present(self, name: str) -> pa.ChunkedArray:
        """Return a column of the slices that are present."""
        return self.slices[name].filter(pa.array(self.is_present))

    @cached_property
    def series_row(self) -> NDArray[np.int64]:
        """The line of ``series`` of each row, int64 (slices,)."""
        rows: NDArray[np.int64] = self.slices["series_row"].fill_null(0).to_numpy()
        return rows

    @cached_property
    def rows_by_flag(self) -> Mapping[str, NDArray[np.int64]]:
        """The rows that carry each flag, the most frequent flag first."""
        return self._rows_by_word("flags")

    @cached_property
    def rows_by_repair(self) -> Mapping[str, NDArray[np.int64]]:
        """The rows that got each repair, the most frequent repair first."""
        return self._rows_by_word("repairs")

    def _rows_by_word(self, name: str) -> Mapping[str, NDArray[np.int64]]:
        lists = self.slices[name].combine_chunks()
        words, rows = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        coded = words.dictionary_encode()
        codes = np.where(self.is_present[rows], coded.indices.to_numpy(zero_copy_only=False), -1)
        found = {word: rows[codes == code] for code, word in enumerate(coded.dictionary.to_pylist())}
        found = {word: carriers for word, carriers in found.items() if len(carriers)}
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def numbers(self, table: str, name: str) -> NDArray[np.float64]:
        """Return a column of numbers, float64, NaN where null."""
        column = getattr(self, table)[name].cast(pa.float64()).fill_null(float("nan"))
        numbers: NDArray[np.float64] = column.to_numpy()
        return numbers


def read_tables(dataset: Dataset) -> ReportTables:
    """Return the tables of ``dataset``; raises ``CorruptionError`` for one that is not the one published."""
    classes = dataset.classes
    columns = {
        "slices": (slice_schema(classes), [*SLICE_COLUMNS, *classes]),
        "series": (series_schema(classes), [*SERIES_COLUMNS, *classes]),
        "shards": (SHARD_SCHEMA, SHARD_SCHEMA.names),
        "quarantine": (QUARANTINE_SCHEMA, QUARANTINE_SCHEMA.names),
    }
    read = {
        table: _complete(dataset.read_table(table, names), schema, names) for table, (schema, names) in columns.items()
    }
    return ReportTables(classes=classes, **read)


def value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    """Return how often each value occurs, null too, the most frequent first."""
    counted = {line["values"]: line["counts"] for line in pc.value_counts(column).to_pylist()}
    return dict(sorted(counted.items(), key=lambda item: (-item[1], str(item[0]))))


def _complete(table: pa.Table, schema: pa.Schema, names: list[str]) -> pa.Table:
    columns = [
        table[name] if name in table.column_names else pa.nulls(len(table), schema.field(name).type) for name in names
    ]
    return pa.table(columns, names=names)
