"""Which tasks are done: one small file a task, written whole, after everything that it speaks of is on disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or nothing, also after a power cut."""
    with renamed_when_whole(path) as new, new.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` that nobody else has; the file of that name becomes ``path`` at the end, or goes."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield new
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


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


def record(folder: Path, key: int, entry: str) -> None:
    """Say that task ``key`` is done: write ``entry``, its report as JSON, as ``<key>.json`` in ``folder``."""
    write_whole(folder / f"{key:05d}.json", entry.encode())


def read(folder: Path, key: int) -> str:
    """Return the entry of task ``key``."""
    return (folder / f"{key:05d}.json").read_text(encoding="utf-8")


def done(folder: Path, *, suffix: str = ".json") -> set[int]:
    """Return the keys of the tasks that have an entry in ``folder``."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if path.stem.isdigit()}
