"""Whether the published tables say what a dataset can say: the columns' types, the ranges of numbers, the counts.

The digest in the root shows that a table is the one that was published. These checks hold for any table, also for one whose
digest was computed again after a change: what a reader computes with is within its range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import OK, QUARANTINE_SCHEMA, SHARD_SCHEMA, Root, clipped, series_schema, slice_schema
from ich_prep.dataset.shard_format import index_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_FOLD = 126  # a spec has at most 127 folds
SUBSETS = ("train", "test")

# The columns that every line has, but for those of slices that are not ok.
_NEVER_NULL = MappingProxyType(
    {
        "slices": ("row", "patient_id", "subset", "status", "label_level", "series_row", "slice_index"),
        "series": ("series_row", "first_row", "n_slices", "n_ok"),
        "shards": ("shard", "first_row", "n_rows", "n_ok", "bytes", "fingerprint"),
        "quarantine": ("stage", "reason"),
    }
)
# Those that may be null, and that this project's readers need.
_REQUIRED = MappingProxyType(
    {
        "slices": ("sop_instance_uid", "series_instance_uid", "fold", "repairs", "flags"),
        "series": ("series_instance_uid", "orientation"),
        "shards": (),
        "quarantine": ("path", "row"),
    }
)


def lines_expected(table: str, root: Root) -> int:
    """Return how many lines the root says that a table has."""
    counts = root.counts
    return {
        "slices": counts.rows,
        "series": counts.series,
        "shards": counts.shards,
        "quarantine": counts.quarantined,
    }[table]


def table_problem(name: str, table: pa.Table, root: Root, columns: Sequence[str] | None = None) -> str | None:
    """Return what is wrong with a published table, or with those of its ``columns`` that were read; None if nothing is."""
    required = {*_REQUIRED[name], *_NEVER_NULL[name], *(root.classes if name in ("slices", "series") else ())}
    asked = required if columns is None else required.intersection(columns)
    lacking = sorted(asked.difference(table.column_names))
    return f"has no column {lacking[0]}" if lacking else next(_problems(name, table, root), None)


def _problems(name: str, table: pa.Table, root: Root) -> Iterator[str]:
    yield from _type_problems(name, table, root)
    try:
        table.validate(full=True)  # offsets within their buffers, texts in UTF-8
    except pa.ArrowException as error:
        yield str(error)
    ok = pc.equal(table["status"], OK) if "status" in table.column_names else None
    for column in _NEVER_NULL[name]:
        if column in table.column_names:
            missing = pc.is_null(table[column])
            if pc.any(missing if ok is None or column == "status" else pc.and_(missing, ok)).as_py():
                yield f"{column} is null in a line that has one"
    for column in root.classes:
        yield from _outside(table, column, 0, 1)
    yield from _outside(table, "fold", 0, MAX_FOLD)
    yield from _CHECKS[name](table, root)


def _type_problems(name: str, table: pa.Table, root: Root) -> Iterator[str]:
    expected = {
        "slices": slice_schema(root.classes),
        "series": series_schema(root.classes),
        "shards": SHARD_SCHEMA,
        "quarantine": QUARANTINE_SCHEMA,
    }[name]
    names = table.column_names
    if len(set(names)) != len(names):
        yield "a column is there twice"
    for field in table.schema:
        place = expected.get_field_index(field.name)
        if place >= 0 and field.type != expected.field(place).type:
            yield f"{field.name} is {clipped(str(field.type))}, not {expected.field(place).type}"


def _outside(table: pa.Table, column: str, low: int, high: int) -> Iterator[str]:
    """Yield a problem if a number of a column lies outside ``low`` to ``high``; null is none."""
    if column in table.column_names:
        found = pc.min_max(table[column]).as_py()
        if found["min"] is not None and not low <= found["min"] <= found["max"] <= high:
            yield f"{column} is within {found['min']}..{found['max']}, not {low}..{high}"


def _counted(table: pa.Table, column: str, start: int = 0, step: int = 1) -> Iterator[str]:
    """Yield a problem if a column is not ``start``, ``start + step``, ..."""
    if column in table.column_names:
        expected = start + step * np.arange(len(table), dtype=np.int64)
        if not np.array_equal(_integers(table, column), expected):
            yield f"{column} is not {start}, {start + step}, ... line by line"


def _integers(table: pa.Table, column: str) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = table[column].cast(pa.int64()).fill_null(-1).to_numpy()
    return numbers


def _slice_problems(table: pa.Table, root: Root) -> Iterator[str]:
    yield from _counted(table, "row")
    yield from _outside(table, "series_row", 0, root.counts.series - 1)
    yield from _outside(table, "slice_index", 0, root.counts.rows - 1)
    for name in ("source_rows", "source_columns"):
        yield from _outside(table, name, 0, np.iinfo(np.int32).max)
    names = table.column_names
    if "subset" in names and not pc.all(pc.is_in(table["subset"].drop_null(), value_set=pa.array(SUBSETS))).as_py():
        yield "subset is neither train nor test"
    if "status" not in names:
        return
    ok = pc.equal(table["status"], OK).fill_null(False)
    found = pc.sum(ok).as_py() or 0
    if found != root.counts.ok:
        yield f"{found} lines have the status ok, not {root.counts.ok}"
    if "chunk_crc32c" in names:
        # None of a dataset from before this column have one.
        with_checksum = pc.is_valid(table["chunk_crc32c"].filter(ok))
        if pc.any(with_checksum).as_py() and not pc.all(with_checksum).as_py():
            yield "chunk_crc32c is null in a line whose status is ok"


def _series_problems(table: pa.Table, root: Root) -> Iterator[str]:
    yield from _counted(table, "series_row")
    yield from _outside(table, "n_slices", 1, root.counts.rows)
    yield from _outside(table, "first_row", 0, root.counts.rows - 1)
    names = set(table.column_names)
    if {"first_row", "n_slices"} <= names:
        first, length = _integers(table, "first_row"), _integers(table, "n_slices")
        if len(first) and (first + length).max() > root.counts.rows:
            yield f"rows beyond the last one, {root.counts.rows - 1}"
        if (first[1:] < first[:-1] + length[:-1]).any():
            yield "two series share a row"
        if "n_ok" in names and ((_integers(table, "n_ok") < 0) | (_integers(table, "n_ok") > length)).any():
            yield "n_ok is not within 0..n_slices"
    if "orientation" in names:
        lengths = pc.list_value_length(table["orientation"]).drop_null()
        if not pc.all(pc.equal(lengths, 6)).as_py():
            yield "orientation is not six numbers"


def _shard_problems(table: pa.Table, root: Root) -> Iterator[str]:
    per_shard = root.spec.slices_per_shard
    yield from _counted(table, "shard")
    yield from _counted(table, "first_row", step=per_shard)
    yield from _outside(table, "bytes", index_bytes(per_shard), np.iinfo(np.int64).max)
    if "n_rows" in table.column_names:
        expected = np.full(len(table), per_shard)
        expected[-1:] = root.counts.rows - per_shard * (len(table) - 1)
        if not np.array_equal(_integers(table, "n_rows"), expected):
            yield f"n_rows are not those of {root.counts.rows} rows, {per_shard} in a shard"
    yield from _outside(table, "n_ok", 0, per_shard)
    if "n_ok" in table.column_names and (pc.sum(table["n_ok"]).as_py() or 0) != root.counts.ok:
        yield f"n_ok does not add up to {root.counts.ok}"


def _quarantine_problems(table: pa.Table, root: Root) -> Iterator[str]:
    yield from _outside(table, "row", 0, root.counts.rows - 1)


_CHECKS: Mapping[str, Callable[[pa.Table, Root], Iterator[str]]] = MappingProxyType(
    {
        "slices": _slice_problems,
        "series": _series_problems,
        "shards": _shard_problems,
        "quarantine": _quarantine_problems,
    }
)
