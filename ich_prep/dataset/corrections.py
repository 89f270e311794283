"""Corrections of labels by a reader: a CSV file beside the dataset, to which marks are appended and never changed.

A line says that a class of a row is present (1), absent (0) or unknown (empty). The last line of a row and class counts.
A dataset is never changed by it: the file is the input of a command that writes a new generation of labels.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ich_prep.dataset.storage import sync_folder
from ich_prep.errors import DatasetError, UsageError, describe_os_error

MAX_NOTE = 1000  # characters
MAX_READER = 100
# Control characters, separators of lines and paragraphs, surrogates, and format characters such as those that reverse text.
_FORBIDDEN = ("Cc", "Cs", "Cf", "Zl", "Zp")
# How a cell starts that a spreadsheet takes for a formula; the apostrophe itself, so that the guard can be removed.
_FORMULA = tuple("=+-@\t\r'")


@dataclass(frozen=True)
class Correction:
    """One mark. ``value`` is 1, 0, or None for unknown; ``dataset_digest`` is that of the dataset that was read."""

    row: int
    sop_instance_uid: str
    class_name: str
    value: int | None
    note: str
    reader: str
    dataset_digest: str


HEADER = ("row", "sop_instance_uid", "class", "value", "note", "reader", "dataset_digest")


def default_file(dataset: Path) -> Path:
    """Return where the corrections of the dataset at ``dataset`` are kept: ``data.zarr.corrections.csv`` beside it."""
    path = dataset.absolute()
    return path.with_name(f"{path.name}.corrections.csv")


def text_problem(text: str, *, limit: int) -> str | None:
    """Return why ``text`` cannot be a note or a reader's name, None if it can: too long, or with invisible characters."""
    if len(text) > limit:
        return f"it has {len(text):,} characters; {limit:,} are allowed"
    if any(unicodedata.category(character) in _FORBIDDEN for character in text):
        return "it has a line break, a control character or another invisible character"
    return None


def guarded(text: str) -> str:
    """Return ``text`` as a cell that no spreadsheet takes for a formula: an apostrophe is put before such a beginning."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def unguarded(cell: str) -> str:
    """Return the text that ``guarded`` made a cell of."""
    return cell.removeprefix("'")


def append_correction(file: Path, correction: Correction) -> None:
    """Append a line to ``file``, which is made if there is none; it is on disk when this returns.

    A line is written in one piece under a lock, so that several programs may append to one file. After a crash in the
    middle of a line, the next line starts on its own.
    """
    with open(file, "ab+", buffering=0) as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # released when the file is closed
        size = out.seek(0, os.SEEK_END)
        lines = [HEADER] if size == 0 else []
        start = b""
        if size:
            out.seek(size - 1)
            start = b"" if out.read(1) == b"\n" else b"\n"
        data = start + _csv_bytes([*lines, _cells(correction)])
        if out.write(data) != len(data):
            raise DatasetError(f"{file} could not be written in full: the disk may be full. Free space and mark again.")
        os.fsync(out.fileno())
        if size == 0:
            sync_folder(file.absolute().parent)


def read_corrections(file: Path) -> list[Correction]:
    """Return the corrections in ``file``, in its order; none if there is no file.

    Raises ``UsageError`` for a file that has another header, or a line that is not a correction, with its number.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"The corrections cannot be read: {describe_os_error(error)}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"The corrections in {file} are not text in UTF-8.") from None
    return list(_parsed(file, text)) if text else []


def _parsed(file: Path, text: str) -> Iterator[Correction]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if tuple(header) != HEADER:
        raise UsageError(
            f"Expected corrections with the columns {', '.join(HEADER)} in {file}; found "
            f"{', '.join(header)[:200] or 'none'}. Name another file with --corrections."
        )
    for cells in reader:
        if not cells:
            continue
        try:
            row, uid, name, value, note, who, digest = cells
            if value not in ("0", "1", ""):
                raise ValueError(value)
            yield Correction(
                row=int(row),
                sop_instance_uid=unguarded(uid),
                class_name=unguarded(name),
                value=int(value) if value else None,
                note=unguarded(note),
                reader=unguarded(who),
                dataset_digest=digest,
            )
        except ValueError:
            raise UsageError(
                f"Line {reader.line_num} of {file} is not a correction: expected {', '.join(HEADER)} with a value "
                "of 0, 1 or nothing. Correct or remove that line."
            ) from None


def _cells(correction: Correction) -> list[str]:
    values = [getattr(correction, field.name) for field in fields(Correction)]
    return ["" if value is None else guarded(value) if isinstance(value, str) else str(value) for value in values]


def _csv_bytes(lines: list[tuple[str, ...] | list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
