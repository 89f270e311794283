"""Tables as people write them, read as text: CSV and TSV in the usual separators and encodings, Parquet, XLSX.

No message quotes a cell or a line: a label table holds patient data. Messages name the file, the column and the line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import importlib.util
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from ich_prep.dataset.tables import in_arrow_memory
from ich_prep.errors import SourceError, count

if TYPE_CHECKING:
    from ich_prep.sources import TableFile

SEPARATORS: Final = (",", ";", "\t")
LARGEST_HEADER: Final = 1 << 20  # characters of the header line
LARGEST_XLSX: Final = 1 << 30  # bytes, unpacked
LARGEST_BLOCK: Final = 1 << 26  # bytes of a CSV that are parsed at once: the longest line
MOST_COLUMNS: Final = 20_000
_ENCODINGS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_PARQUET, _ZIP, _OLE, _GZIP = b"PAR1", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b"
_PANDAS_INDEX: Final = re.compile(r"__index_level_\d+__")


@dataclass(frozen=True)
class UserTable:
    """A table of text. ``path`` is what messages call it, ``columns`` its header without blanks around the names.

    ``read`` takes the numbers of columns and returns them, as text, under those numbers: string (n,), blanks around the
    values removed, "" where the table has nothing. ``line_of`` takes the number of a line of that result and returns
    where it is in the file, for messages: "line 17".
    """

    path: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[int]], dict[int, pa.Array]] = field(repr=False)
    line_of: Callable[[int], str] = field(repr=False)
    notes: tuple[str, ...] = ()


def open_user_table(file: TableFile, known: Callable[[str], bool]) -> UserTable:
    """Return the table in ``file``, whose first bytes say what it is: Parquet, XLSX, else text with separators.

    ``known`` says whether a column name means something: of several possible separators, the one that gives the most
    known names is taken. Raises ``SourceError``.
    """
    data = file.read()
    if data[:4] == _PARQUET:
        return _open_parquet(file.path, data)
    if data[:4] == _ZIP:
        return _open_xlsx(file.path, data)
    if data[:4] == _OLE:
        raise SourceError(
            f"{file.path} is an old or encrypted Excel workbook. Save it as XLSX or CSV, without a password."
        )
    if data[:2] == _GZIP:
        raise SourceError(f"{file.path} is compressed. Unpack it and give the unpacked table.")
    return _open_text(file.path, data, known)


def header_of(file: TableFile, known: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the column names of a table of text, from its first bytes; empty if it cannot be read as one."""
    try:
        head = file.read(LARGEST_HEADER)
        return _parse_header(file.path, _decoded(file.path, head, whole=False)[0], known).names
    except SourceError:
        return ()


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """The first line of a table of text; the lines of the table begin at character ``end``, after ``lines`` lines."""

    names: tuple[str, ...]
    separator: str
    end: int
    lines: int


@dataclass(frozen=True)
class _Text:
    """A table of text: its ``header``, and its ``body`` in UTF-8, the lines below it."""

    path: str
    header: _Header
    body: bytes

    def read(self, numbers: Sequence[int]) -> dict[int, pa.Array]:
        """Return columns; see ``UserTable``. One thread reads, so that lines keep their order when some are skipped."""
        if not self.body.strip():
            return {number: pa.array([], pa.string()) for number in numbers}
        wanted = [str(number) for number in numbers]
        try:
            table = pcsv.read_csv(
                in_arrow_memory(self.body),
                read_options=pcsv.ReadOptions(
                    use_threads=False,
                    column_names=[str(number) for number in range(len(self.header.names))],
                    block_size=min(len(self.body) + 1, LARGEST_BLOCK),
                ),
                parse_options=pcsv.ParseOptions(
                    delimiter=self.header.separator,
                    newlines_in_values=b'"' in self.body,
                    invalid_row_handler=self._skip_blank,
                ),
                convert_options=pcsv.ConvertOptions(
                    include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string())
                ),
            )
        except pa.ArrowInvalid:  # whose message quotes a line
            raise SourceError(self._problem()) from None
        return {number: _trimmed(table[str(number)]) for number in numbers}

    def line_of(self, index: int) -> str:
        """Return the line of the file that is line ``index`` of what ``read`` returns."""
        kept = -1
        for number, cells in self._records():
            kept += len(cells) == len(self.header.names)
            if kept == index:
                return f"line {number}"
        return f"line {self.header.lines + index + 1}"

    def _skip_blank(self, row: Any) -> str:
        """Return what Arrow is to do with a line of too few or too many cells: to skip it if it is blank."""
        return "error" if row.text.strip(f"{self.header.separator} \t\r\n") else "skip"

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of each line that is not empty, and the number of the line in which they begin."""
        reader = csv.reader(io.StringIO(self.body.decode(), newline=""), delimiter=self.header.separator)
        number = self.header.lines + 1
        with contextlib.suppress(csv.Error):
            for cells in reader:
                if cells:
                    yield number, cells
                number = self.header.lines + reader.line_num + 1

    def _problem(self) -> str:
        """Return why the lines cannot be read."""
        expected = len(self.header.names)
        for number, cells in self._records():
            if len(cells) != expected and any(map(str.strip, cells)):
                return (
                    f"Expected {count(expected, 'cell')} in each line of {self.path}, as in its header; line {number} has "
                    f"{len(cells):,}. Put quotes around cells that contain the separator, and write empty cells too."
                )
        return (
            f"Expected a table of text at {self.path}; its lines cannot be read: a quote is not closed, or a line is longer "
            f"than {LARGEST_BLOCK >> 20} MB. Save it again as CSV."
        )


def _open_text(path: str, data: bytes, known: Callable[[str], bool]) -> UserTable:
    text, encoding = _decoded(path, data)
    header = _parse_header(path, text[:LARGEST_HEADER], known)
    table = _Text(path, header, text[header.end :].encode())
    notes = (f"{path} is not in UTF-8, and was read as Windows-1252",) if encoding == "cp1252" else ()
    return UserTable(path, header.names, table.read, table.line_of, notes)


def _decoded(path: str, data: bytes, *, whole: bool = True) -> tuple[str, str]:
    """Return ``data`` as text, and its encoding. Unless it is ``whole``, a character may be cut off at the end."""
    marked = [name for mark, name in _ENCODINGS if data.startswith(mark)]
    for encoding in marked or ("utf-8", "cp1252"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(data, final=whole)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        return text, encoding
    raise SourceError(
        f"Expected a table of text at {path}, in UTF-8, in UTF-16 with a byte order mark, or in Windows-1252, or else a "
        "Parquet or XLSX file; it holds bytes that are none of these. Save it again as CSV in UTF-8."
    )


def _parse_header(path: str, head: str, known: Callable[[str], bool]) -> _Header:
    """Return the header in the text ``head``: the first line that is not blank; raises ``SourceError``."""
    stated = re.match(r"sep=([,;\t])\r?\n", head)  # a first line that Excel understands
    start = stated.end() if stated else 0
    start += len(head[start:]) - len(head[start:].lstrip(" \r\n"))
    candidates = [_header_with(head, start, separator) for separator in ((stated[1],) if stated else SEPARATORS)]
    found = [header for header in candidates if header is not None]
    if not found:
        problem = (
            f"its header is longer than {LARGEST_HEADER:,} characters, or has a quote that is not closed"
            if head.strip()
            else "it is empty"
        )
        raise SourceError(f"Expected a table with a header line at {path}; {problem}.")
    header = max(found, key=lambda one: (sum(map(known, one.names)), len(one.names)))
    _check_width(path, len(header.names))
    return header


def _header_with(head: str, start: int, separator: str) -> _Header | None:
    """Return the header at character ``start``, None if it does not end within ``head``."""
    stream = io.StringIO(head[start:], newline="")
    reader = csv.reader(stream, delimiter=separator, strict=True)
    try:
        names = next(reader, None)
    except csv.Error:
        return None
    end = start + stream.tell()
    if not names or end == LARGEST_HEADER:
        return None
    lines = len(head[:start].splitlines()) + reader.line_num
    return _Header(tuple(" ".join(name.split()) for name in names), separator, end, lines)


def _check_width(path: str, columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise SourceError(
            f"Expected at most {MOST_COLUMNS:,} columns in {path}; found {columns:,}. Keep those of labels."
        )


# --- Parquet and XLSX ------------------------------------------------------------------------------------------------


def _open_parquet(path: str, data: bytes) -> UserTable:
    try:
        file = pq.ParquetFile(in_arrow_memory(data))
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError):
        raise SourceError(f"Expected a Parquet file at {path}; it is damaged. Write it again.") from None
    _check_width(path, len(names))

    def read(numbers: Sequence[int]) -> dict[int, pa.Array]:
        try:
            table = pa.table(file.read(columns=[names[number] for number in numbers]))
            return {number: _trimmed(table[names[number]].cast(pa.string())) for number in numbers}
        except (pa.ArrowException, OSError):
            wanted = ", ".join(names[number] for number in numbers[:20])
            raise SourceError(
                f"Expected text, numbers or booleans in the columns {wanted} of {path}; they cannot be read as text. Write "
                "the file again."
            ) from None

    # pandas keeps its index as a column that nobody named.
    shown = tuple("" if _PANDAS_INDEX.fullmatch(name) else " ".join(name.split()) for name in names)
    return UserTable(path, shown, read, lambda index: f"row {index + 1}")


def _open_xlsx(path: str, data: bytes) -> UserTable:
    """Return the first sheet that is not empty; its header is its first row that is not."""
    sheets = _sheets(path, data)
    rows = next(filter(None, sheets.values()), [])
    if not rows:
        raise SourceError(f"Expected a table with a header row at {path}; its sheets are empty.")
    (_, header), *lines = rows
    _check_width(path, len(header))
    notes = (f"of the {len(sheets)} sheets of {path} only the first with a table is read",) if len(sheets) > 1 else ()

    def read(numbers: Sequence[int]) -> dict[int, pa.Array]:
        return {
            number: _trimmed(pa.chunked_array([[cells[number] for _, cells in lines]], pa.string()))
            for number in numbers
        }

    names = tuple(" ".join(name.split()) for name in header)
    return UserTable(path, names, read, lambda index: f"row {lines[index][0]}", notes)


def _sheets(path: str, data: bytes) -> dict[str, list[tuple[int, list[str]]]]:
    """Return for each sheet its rows that are not empty, as text, and their numbers, from 1."""
    import pandas

    if importlib.util.find_spec("openpyxl") is None:
        raise SourceError(
            f"{path} is an XLSX file, and the package that reads these is missing: pip install 'ich[excel]'. Or save it as "
            "CSV."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > LARGEST_XLSX:
            raise SourceError(f"{path} is too large: {unpacked:,} bytes unpacked, expected at most {LARGEST_XLSX:,}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # styles and extensions that do not matter here
            frames = pandas.read_excel(
                io.BytesIO(data), sheet_name=None, header=None, dtype=object, na_filter=False, engine="openpyxl"
            )
    except SourceError:
        raise
    except Exception:  # a damaged workbook makes openpyxl fail with whatever it trips over
        raise SourceError(
            f"Expected an XLSX workbook at {path}; it cannot be read. Save it again, or as CSV."
        ) from None
    return {
        str(name): [
            (number, cells)
            for number, cells in enumerate(([_cell_text(value) for value in row] for row in frame.values.tolist()), 1)
            if any(map(str.strip, cells))
        ]
        for name, frame in frames.items()
    }


def _cell_text(value: object) -> str:
    return "" if value is None or value != value else str(value)  # noqa: PLR0124 - NaN is an empty cell


def _trimmed(column: pa.ChunkedArray) -> pa.Array:
    """Return text without blanks around it, "" for null."""
    values = column.combine_chunks().fill_null("")
    return pc.utf8_trim_whitespace(values)
