"""The ledger: entries are there whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ich_prep import ledger

KILLED_IN_WRITE = """
import os, signal, sys
from pathlib import Path
from ich_prep import ledger
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
ledger.record(Path(sys.argv[1]), 3, '{"bytes":2}')
"""


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    entry = '{"bytes":5,"rows":[{"status":"ok"}],"text":"über"}'
    ledger.record(tmp_path, 12, entry)
    assert ledger.read(tmp_path, 12) == entry
    assert [path.name for path in tmp_path.iterdir()] == ["00012.json"]


def test_done_names_the_tasks_with_an_entry(tmp_path: Path) -> None:
    for key in (0, 7, 123456):
        ledger.record(tmp_path, key, "{}")
    for other in ("00009.parquet", ".00001.json.abcd", "notes.json", "00002.json.bak"):
        (tmp_path / other).touch()
    assert ledger.done(tmp_path) == {0, 7, 123456}
    assert ledger.done(tmp_path, suffix=".parquet") == {9}
    assert ledger.done(tmp_path / "nowhere") == set()


def test_a_task_may_be_recorded_twice(tmp_path: Path) -> None:
    ledger.record(tmp_path, 1, '{"bytes":1}')
    ledger.record(tmp_path, 1, '{"bytes":2}')
    assert ledger.read(tmp_path, 1) == '{"bytes":2}'


def test_a_process_killed_while_it_writes_leaves_the_entry_as_it_was(tmp_path: Path) -> None:
    ledger.record(tmp_path, 3, '{"bytes":1}')
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_WRITE, tmp_path], check=False)
    assert killed.returncode == -9
    assert ledger.read(tmp_path, 3) == '{"bytes":1}'
    assert ledger.done(tmp_path) == {3}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        ledger.write_whole(tmp_path / "taken", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_files_get_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        ledger.write_whole(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
