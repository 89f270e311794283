"""Shared by the layouts: the assignment of each slice, and reading label tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv as pcsv

from ich_prep.dataset.tables import in_arrow_memory
from ich_prep.errors import SourceError, UsageError
from ich_prep.layouts.labels import LabelOptions, LabelRules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ich_prep.sources import Listing, TableFile

HEADER_BYTES = 64 * 1024


@dataclass(frozen=True)
class Assignment:
    """One value per slice in each array.

    ``subset`` is train or test; ``patient_id`` may be null; ``subject`` is the key of labels by subject, else null;
    ``repairs`` names known defects to repair while decoding; ``excluded_because`` is why the slice is excluded from the
    dataset, null if it is not.
    """

    subset: pa.Array
    patient_id: pa.Array
    subject: pa.Array
    repairs: pa.Array
    excluded_because: pa.Array


def nulls(count: int, kind: pa.DataType | None = None) -> pa.Array:
    """Return ``count`` nulls, of strings by default."""
    return pa.nulls(count, kind or pa.string())


def no_repairs(count: int) -> pa.Array:
    """Return an empty list of repairs for each of ``count`` slices."""
    return pa.array([[]] * count, pa.list_(pa.string()))


def read_csv(table: TableFile, types: dict[str, pa.DataType] | None = None) -> pa.Table:
    """Return a CSV file as a table; raises ``SourceError`` if it cannot be read."""
    data = table.read()
    options = pcsv.ConvertOptions(column_types=types)
    try:
        return pcsv.read_csv(in_arrow_memory(data), convert_options=options)
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        problem = _csv_problem(data, options, header_of(table))
        raise SourceError(f"Expected a CSV of labels at {table.path}; it cannot be read: {problem}.") from None


def _csv_problem(data: bytes, options: pcsv.ConvertOptions, header: Sequence[str]) -> str:
    """Return why a CSV cannot be read, with a line if possible, but without the cells that Arrow's message quotes."""
    try:  # with one thread: only then does Arrow say which line
        pcsv.read_csv(in_arrow_memory(data), read_options=pcsv.ReadOptions(use_threads=False), convert_options=options)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        message = str(error)
        row = re.search(r"Row #(\d+)", message)
        line = f" in line {row[1]}" if row else ""
        if cells := re.search(r"Expected (\d+) columns, got (\d+)", message):
            return f"expected {cells[1]} cells{line} as in the header, found {cells[2]}"
        if column := re.search(r"column #(\d+): .*conversion error to (\w+)", message):
            name = header[int(column[1])][:60] if int(column[1]) < len(header) else column[1]
            return f"expected values of type {column[2]} in column {name}, found another{line}"
    return "it is empty, is not in UTF-8, or has a quote that is not closed or a line that is too long"


def refuse_options(rules: LabelRules, layout: str) -> None:
    """Raise ``UsageError`` if the rules say how to read a user's table, which ``layout`` does not have."""
    if rules.options != LabelOptions():
        raise UsageError(
            f"The layout {layout} has label files of its own form: --label-key, --label-column, --ignore-columns and "
            "--keep-columns are for --layout folder."
        )


def header_of(table: TableFile) -> tuple[str, ...]:
    """Return the column names in the first line of a CSV file, as written, without quotes.

    Empty if it cannot be read as text.
    """
    try:
        line = next(iter(table.read(HEADER_BYTES).splitlines()), b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        return ()
    return tuple(name.strip('"') for name in line.split(","))


def tables_with(listing: Listing, columns: Sequence[str]) -> list[TableFile]:
    """Return the CSV files of the source whose header begins with ``columns``."""
    return [table for table in listing.tables if header_of(table)[: len(columns)] == tuple(columns)]


def require_single(tables: Sequence[TableFile], what: str) -> TableFile:
    """Return the only one of ``tables``; raises ``SourceError`` for none and for several."""
    if len(tables) != 1:
        names = ", ".join(table.path for table in tables) or "none"
        raise SourceError(f"Expected one {what} in the source; found {names}. Name the one to use with --labels.")
    return tables[0]
