"""Corrections: appended durably, read back as they were, harmless in a spreadsheet."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ich_prep.dataset.corrections import (
    HEADER,
    Correction,
    append_correction,
    default_file,
    guarded,
    read_corrections,
    text_problem,
    unguarded,
)
from ich_prep.errors import UsageError

MARK = Correction(7, "ID_7", "subdural", 1, "a thin rim, left", "AB", "d" * 64)


def test_a_mark_is_a_line_below_the_header(tmp_path: Path) -> None:
    file = tmp_path / "marks.csv"
    append_correction(file, MARK)
    append_correction(file, replace(MARK, value=None, note=""))
    assert file.read_text().splitlines() == [
        ",".join(HEADER),
        f'7,ID_7,subdural,1,"a thin rim, left",AB,{"d" * 64}',
        f"7,ID_7,subdural,,,AB,{'d' * 64}",
    ]
    assert read_corrections(file) == [MARK, replace(MARK, value=None, note="")]


@given(note=st.text(), uid=st.text(), value=st.sampled_from([0, 1, None]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_that_is_allowed_comes_back(tmp_path: Path, note: str, uid: str, value: int | None) -> None:
    if text_problem(note, limit=1000) or text_problem(uid, limit=1000):
        return
    file = tmp_path / "marks.csv"
    file.unlink(missing_ok=True)
    mark = replace(MARK, note=note, sop_instance_uid=uid, value=value)
    append_correction(file, mark)
    assert read_corrections(file) == [mark]
    with file.open(newline="") as text:
        cells = list(csv.reader(text))[1]
    assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in cells)


@given(st.text())
def test_a_guard_can_be_removed(text: str) -> None:
    assert unguarded(guarded(text)) == text


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\x00", "\x1b[31m", "\u202e", "\ud800", "\u2028", "x" * 1001])
def test_invisible_characters_and_long_notes_are_refused(text: str) -> None:
    assert text_problem(text, limit=1000)


def test_a_line_after_a_torn_one_starts_on_its_own(tmp_path: Path) -> None:
    file = tmp_path / "marks.csv"
    append_correction(file, MARK)
    whole = file.read_bytes()
    file.write_bytes(whole + b"8,ID_8,subd")
    append_correction(file, MARK)
    assert file.read_bytes() == whole + b"8,ID_8,subd\n" + whole.splitlines(keepends=True)[1]
    with pytest.raises(UsageError, match="Line 3 of"):
        read_corrections(file)


def test_several_writers_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "marks.csv"
    marks = [replace(MARK, row=row) for row in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda mark: append_correction(file, mark), marks))
    assert sorted(read_corrections(file), key=lambda mark: mark.row) == marks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,class\n1,any\n", "Expected corrections with the columns"),
        (",".join(HEADER) + "\n1,ID,any,2,,,d\n", "Line 2 of"),
        (",".join(HEADER) + "\nx,ID,any,1,,,d\n", "Line 2 of"),
    ],
)
def test_another_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "marks.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_corrections(file)


def test_the_file_is_beside_the_dataset(tmp_path: Path) -> None:
    assert default_file(tmp_path / "data.zarr") == tmp_path / "data.zarr.corrections.csv"
    assert read_corrections(tmp_path / "none.csv") == []
