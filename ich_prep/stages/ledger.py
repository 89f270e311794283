"""The ledger of finished tasks: one small file per task, written whole, after everything that it describes is on disk."""

from __future__ import annotations

from pathlib import Path

from ich_prep.dataset.storage import write_whole


def entry_path(folder: Path, key: int) -> Path:
    """Return the path of the entry of task ``key``, whether it has one or not."""
    return folder / f"{key:05d}.json"


def record(folder: Path, key: int, entry: str) -> None:
    """Record that task ``key`` is done: write ``entry``, its report as JSON, as ``<key>.json`` in ``folder``."""
    write_whole(entry_path(folder, key), entry.encode())


def read(folder: Path, key: int) -> str:
    """Return the entry of task ``key``."""
    return entry_path(folder, key).read_text(encoding="utf-8")


def done(folder: Path, *, suffix: str = ".json") -> set[int]:
    """Return the keys of the tasks that have an entry in ``folder``."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
