"""Which tasks are done: one small file a task, written whole, after everything that it describes is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ich_prep.dataset.storage import write_whole


def record(folder: Path, key: int, entry: dict[str, Any]) -> None:
    """Record that task ``key`` is done: write ``entry`` as ``<key>.json`` in ``folder``."""
    write_whole(folder / f"{key:05d}.json", json.dumps(entry, separators=(",", ":")).encode())


def read(folder: Path, key: int) -> dict[str, Any]:
    """Return the entry of task ``key``."""
    entry: dict[str, Any] = json.loads((folder / f"{key:05d}.json").read_bytes())
    return entry


def done(folder: Path, *, suffix: str = ".json") -> set[int]:
    """Return the keys of the tasks that have an entry in ``folder``."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
