"""Corrections of single labels: a table with a line for each slice and class, as a reader makes them while looking.

Columns, in any order and spelling: ``row`` or ``sop_instance_uid``, or both; ``class``; ``value``, 0, 1, or nothing for
unknown; and, if known, ``dataset_digest``, that of the dataset the reader saw, and ``reader``. Others, such as a note, are
not read. Tables in, tables out: no file is opened but the one that is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import SourceError, count, did_you_mean
from ich_prep.layouts.user_columns import parsed_labels, plain
from ich_prep.layouts.user_tables import header_of, open_user_table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from ich_prep.layouts.user_tables import UserTable
    from ich_prep.sources import TableFile

COLUMNS: Final = ("row", "sop_instance_uid", "class", "value", "reader", "dataset_digest")
_BY_PLAIN: Final = {plain(name): name for name in COLUMNS} | {"digest": "dataset_digest"}
_DIGEST_SHOWN: Final = 12  # characters


@dataclass(frozen=True)
class Corrections:
    """Labels to change, one each in ``row``, ``column`` (of the classes) and ``value`` (-1 for unknown), (m,) each.

    No row and column are there twice.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    value: NDArray[np.int8]


def are_corrections(file: TableFile) -> bool:
    """Return whether the table's header is that of corrections."""
    found = {_BY_PLAIN.get(plain(name)) for name in header_of(file, _is_known)}
    return {"class", "value"} <= found and bool(found & {"row", "sop_instance_uid"})


def read_corrections(
    file: TableFile, slices: pa.Table, *, classes: Sequence[str], digests: Collection[str], allow_contradictions: bool
) -> Corrections:
    """Return the corrections in ``file`` of a dataset with these ``slices`` (columns ``row``, ``sop_instance_uid``).

    ``digests`` are those of its generations. Of several corrections of one label by one reader the last one holds; of
    several readers who disagree the label is unknown, if that is allowed. Raises ``SourceError`` for a line about another
    dataset, slice or class, and for readers who disagree.
    """
    table = open_user_table(file, _is_known)
    numbers: dict[str, int] = {}
    for number, name in enumerate(table.columns):
        known = _BY_PLAIN.get(plain(name))
        if known is not None and numbers.setdefault(known, number) != number:
            raise SourceError(f"The column {known} is twice in {table.path}. Keep one.")
    texts = dict(zip(numbers, _read(table, numbers), strict=True))
    if not len(texts["class"]):
        raise SourceError(f"Expected lines of corrections below the header of {table.path}; found none.")
    _check_digests(table, texts.get("dataset_digest"), digests)
    row = _rows(table, texts, slices)
    column = _columns(table, texts["class"], classes)
    unknown = pc.equal(pc.utf8_lower(texts["value"]), "unknown")
    value = parsed_labels(table, numbers["value"], pc.if_else(unknown, "", texts["value"]))
    return _settled(table, row, column, value, texts.get("reader"), allow_contradictions=allow_contradictions)


def _is_known(name: str) -> bool:
    return plain(name) in _BY_PLAIN


def _read(table: UserTable, numbers: dict[str, int]) -> list[pa.Array]:
    texts = table.read(list(numbers.values()))
    return [texts[number] for number in numbers.values()]


def _wrong(table: UserTable, wrong: NDArray[np.bool_], expected: str) -> SourceError:
    return SourceError(
        f"Expected {expected} in each line of {table.path}; found another in {count(int(wrong.sum()), 'line')}, the first "
        f"is {table.line_of(int(np.argmax(wrong)))}. Correct or remove these lines."
    )


def _check_digests(table: UserTable, found: pa.Array | None, digests: Collection[str]) -> None:
    """Raise ``SourceError`` for a line about a dataset of none of the ``digests``; "" says nothing."""
    if found is None:
        return
    known = pc.is_in(found, value_set=pa.array(["", *digests], pa.string())).to_numpy(zero_copy_only=False)
    if not known.all():
        expected = ", ".join(digest[:_DIGEST_SHOWN] for digest in digests)
        raise _wrong(table, ~known, f"the digest of a generation of this dataset ({expected})")


def _rows(table: UserTable, texts: dict[str, pa.Array], slices: pa.Table) -> NDArray[np.int64]:
    """Return the row of each line: as stated, and that of its UID, which must be the same."""
    uids = slices["sop_instance_uid"]
    uid_rows = slices.filter(pc.is_valid(uids))
    by_uid = stated = None
    if "sop_instance_uid" in texts:
        wanted = texts["sop_instance_uid"]
        place = pc.index_in(wanted, value_set=uid_rows["sop_instance_uid"]).fill_null(-1).to_numpy(zero_copy_only=False)
        named = pc.not_equal(wanted, "").to_numpy(zero_copy_only=False)
        if (named & (place < 0)).any():
            raise _wrong(table, named & (place < 0), "the SOP Instance UID of a slice of this dataset")
        by_uid = np.where(named, np.r_[uid_rows["row"].to_numpy(), -1][place], -1)
    if "row" in texts:
        whole = pc.match_substring_regex(texts["row"], r"^([0-9]{1,18}(\.0+)?)?$").to_numpy(zero_copy_only=False)
        if not whole.all():
            raise _wrong(table, ~whole, "the number of a row, or nothing")
        digits = pc.replace_substring_regex(texts["row"], r"\.0+$", "")
        stated = pc.if_else(pc.equal(digits, ""), "-1", digits).cast(pa.int64()).to_numpy()
        if (stated >= len(slices)).any():
            raise _wrong(table, stated >= len(slices), f"a row of 0 to {len(slices) - 1}")
    if by_uid is None or stated is None:
        row = stated if by_uid is None else by_uid
    else:
        # Several rows may have one UID: the row says which.
        of_row = uids.take(pa.array(np.maximum(stated, 0)))
        same = pc.equal(of_row, texts["sop_instance_uid"]).fill_null(False).to_numpy()
        differ = (stated >= 0) & (by_uid >= 0) & ~same
        if differ.any():
            raise _wrong(table, differ, "the row and the SOP Instance UID of one slice")
        row = np.where(stated >= 0, stated, by_uid)
    assert row is not None
    if (row < 0).any():
        raise _wrong(table, row < 0, "a row or a SOP Instance UID")
    return row.astype(np.int64)


def _columns(table: UserTable, names: pa.Array, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the class of each line."""
    by_plain = {plain(name): number for number, name in enumerate(classes)}
    encoded = names.dictionary_encode()
    found = np.array([by_plain.get(plain(name), -1) for name in encoded.dictionary.to_pylist()], np.int64)
    column: NDArray[np.int64] = found[encoded.indices.to_numpy(zero_copy_only=False)]
    if (column < 0).any():
        name = names[int(np.argmax(column < 0))].as_py()[:60]
        raise _wrong(table, column < 0, f"one of the classes {', '.join(classes)}{did_you_mean(name, classes)}")
    return column


def _settled(
    table: UserTable,
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    value: NDArray[np.int8],
    reader: pa.Array | None,
    *,
    allow_contradictions: bool,
) -> Corrections:
    """Return one correction for each row and column."""
    who = np.zeros(len(row), np.int64)
    if reader is not None:
        who = reader.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    label = row * (int(column.max()) + 1) + column
    # The last of each reader: of the reversed lines, np.unique gives the first.
    of_reader = np.stack([label, who], axis=1)[::-1]
    last = len(row) - 1 - np.unique(of_reader, axis=0, return_index=True)[1]
    last.sort()
    labels, first, inverse = np.unique(label[last], return_index=True, return_inverse=True)
    chosen = value[last][first].copy()
    disagree = np.zeros(len(labels), bool)
    np.logical_or.at(disagree, inverse.reshape(-1), value[last] != chosen[inverse.reshape(-1)])
    if disagree.any() and not allow_contradictions:
        line = int(last[np.flatnonzero(disagree[inverse.reshape(-1)])[0]])
        raise SourceError(
            f"Readers disagree about {count(int(disagree.sum()), 'label')} in {table.path}, among them that of "
            f"{table.line_of(line)}. Settle them, or take them as unknown with --allow-contradictions."
        )
    chosen[disagree] = -1
    return Corrections(row[last][first], column[last][first], chosen)
