"""The ledger of finished tasks: one small file per task, written whole, after everything that it describes is on disk.

An entry is JSON with two keys: the SHA-256 of the report's text, and the report. A damaged entry is never used.
"""

from __future__ import annotations

import hashlib

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.storage import read_whole, write_whole
from ich_prep.errors import CorruptionError

_BEFORE, _BETWEEN, _AFTER = b'{"sha256":"', b'","report":', b"}"
REMEDY = "Run the same build command again, without --overwrite: it does again what the file recorded."
_REPORT_AT = len(_BEFORE) + 64 + len(_BETWEEN)


def entry_path(folder: Place, key: int) -> Place:
    """Return the path of the entry of task ``key``, whether it has one or not."""
    return folder / f"{key:05d}.json"


def record(folder: Place, key: int, entry: str) -> None:
    """Record that task ``key`` is done: write ``entry``, its report as JSON, as ``<key>.json`` in ``folder``."""
    write_whole(entry_path(folder, key), _sealed(entry.encode()))


def read(folder: Place, key: int) -> str:
    """Return the entry of task ``key``; raises ``CorruptionError`` if it is missing or damaged, ``OSError``."""
    path = entry_path(folder, key)
    try:
        data = read_whole(path)
    except FileNotFoundError:
        raise CorruptionError(f"{path} is missing. {REMEDY}") from None
    report = data[_REPORT_AT : -len(_AFTER)]
    if data != _sealed(report):
        raise CorruptionError(f"{path} is damaged: it is not the file that was written. {REMEDY}")
    return report.decode()


def _sealed(report: bytes) -> bytes:
    return _BEFORE + hashlib.sha256(report).hexdigest().encode() + _BETWEEN + report + _AFTER


def done(folder: Place, *, suffix: str = ".json") -> set[int]:
    """Return the keys of the tasks that have an entry in ``folder``."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
