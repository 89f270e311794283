"""Tables as text: printed within the width of a terminal, or written to a new CSV file."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ich_prep.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


WIDTH = 100  # of a terminal


def print_text(text: str, *, indent: int = 0) -> None:
    """Print ``text``, broken between words into lines of ``WIDTH``; paths and other long words stay whole."""
    margin = " " * indent
    lines = textwrap.fill(
        text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )
    typer.echo(lines)


def print_table(title: str, columns: Sequence[tuple[str, int]], rows: Iterable[Sequence[str | None]]) -> None:
    """Print ``rows`` under ``columns``: for each a heading, and the most terminal columns that it may take.

    A heading that begins with ">" is of numbers, aligned to the right; of one with "<", long texts lose their beginning.
    """
    from rich.cells import cell_len, set_cell_size

    lines = [[_fitted(cell, head, most) for cell, (head, most) in zip(row, columns, strict=True)] for row in rows]
    heads = [head.lstrip("<>") for head, _ in columns]
    widths = [max(cell_len(text) for text in column) for column in zip(heads, *lines, strict=True)]
    typer.echo(f"\n{title}")
    for line in (heads, *lines):
        cells = [
            " " * (width - cell_len(text)) + text if head.startswith(">") else set_cell_size(text, width)
            for text, width, (head, _) in zip(line, widths, columns, strict=True)
        ]
        typer.echo(" ".join(cells).rstrip())


def _fitted(cell: str | None, head: str, most: int) -> str:
    """Return the text of a cell within ``most`` columns of the terminal, with an ellipsis for what is left out."""
    from rich.cells import cell_len, set_cell_size

    text = "-" if cell is None else printable(cell)
    if cell_len(text) <= most:
        return text
    if not head.startswith("<"):
        return set_cell_size(text, most - 1) + "…"
    text = text[-most:]
    while cell_len(text) >= most:
        text = text[1:]
    return "…" + text


def printable(value: object) -> str:
    """Return a value of a header or a path without characters that a terminal would obey."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(value))


def check_new_file(path: Path | None, option: str, src: Sequence[Path]) -> None:
    """Raise ``UsageError`` unless ``path`` is a file to be, outside of the sources ``src``; None is fine."""
    if path is None:
        return
    above = path.absolute().resolve().parents
    if any(source.resolve() in above for source in src):
        raise UsageError(f"{option} {path} lies inside the source. Name a file elsewhere.")
    if path.exists() or path.is_symlink():
        raise UsageError(f"{option} {path} exists, and is not overwritten. Name a new file, or remove it.")
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: there is no folder {path.absolute().parent}. Make it, or name another file."
        )


def write_csvs(tables: Mapping[Path, pa.Table]) -> None:
    """Write tables as CSV in UTF-8, lists as their values with a blank between them; raises ``OSError``.

    If one of the new files cannot be written, none is there: the same command can then be run again.
    """
    from ich_prep.dataset.storage import write_whole

    written: list[Path] = []
    try:
        for path, table in tables.items():
            write_whole(path, _csv_text(table).encode())
            written.append(path)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _csv_text(table: pa.Table) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        writer.writerow(" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row)
    return text.getvalue()
