"""The ledger: entries are written completely or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ich_prep.stages import ledger

KILLED_IN_WRITE = """
import os, signal, sys
from pathlib import Path
from ich_prep.stages import ledger
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
ledger.record(Path(sys.argv[1]), 3, '{"bytes":2}')
"""


def test_a_recorded_entry_is_read_back(tmp_path: Path) -> None:
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


def test_a_process_killed_while_writing_leaves_the_entry_unchanged(tmp_path: Path) -> None:
    ledger.record(tmp_path, 3, '{"bytes":1}')
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_WRITE, tmp_path], check=False)
    assert killed.returncode == -9
    assert ledger.read(tmp_path, 3) == '{"bytes":1}'
    assert ledger.done(tmp_path) == {3}
