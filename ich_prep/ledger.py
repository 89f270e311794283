"""Which tasks are done: one small file a task, written whole, after everything that it speaks of is on disk."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or nothing, also after a power cut."""
    new = beside(path)
    try:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def beside(path: Path) -> Path:
    """Return a name beside ``path`` that nobody else has: for what is to be renamed to ``path`` when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def clear_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` have left beside it."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()


def sync_file(path: Path, *, folders: int) -> None:
    """Wait until the file at ``path``, and its name in that many folders above it, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for folder in path.parents[:folders]:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record(folder: Path, key: int, entry: dict[str, Any]) -> None:
    """Say that task ``key`` is done: write ``entry`` as ``<key>.json`` in ``folder``."""
    write_whole(folder / f"{key:05d}.json", json.dumps(entry, separators=(",", ":")).encode())


def read(folder: Path, key: int) -> dict[str, Any]:
    """Return the entry of task ``key``."""
    entry: dict[str, Any] = json.loads((folder / f"{key:05d}.json").read_bytes())
    return entry


def forget(folder: Path, key: int) -> None:
    """Remove the entry of task ``key``: it is to be done again."""
    (folder / f"{key:05d}.json").unlink(missing_ok=True)


def done(folder: Path, *, suffix: str = ".json") -> set[int]:
    """Return the keys of the tasks that have an entry in ``folder``."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
