"""Where the bytes lie: the files below a folder, listed in one order on every machine, and asked for before their turn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from ich_prep.errors import SourceError

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The regular files below ``root``: ``files`` has ``path`` (binary, relative, sorted) and ``size`` (int64).

    ``tables`` are the CSV files among them, relative: labels may stand there. They are not in ``files``.
    """

    root: Path
    files: pa.Table
    tables: tuple[Path, ...]

    def folders(self) -> set[str]:
        """Return the folders, relative to the root, in which there is a file; names that are not UTF-8 are left out."""
        found = {path[: path.rfind(b"/") + 1] for path in self.files["path"].to_pylist()}
        return {folder.decode() for folder in found if _is_utf8(folder)}


def require_folder(root: Path) -> None:
    """Raise ``SourceError`` unless ``root`` is a folder."""
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise SourceError(f"Expected a folder of DICOM files at {root}; found {found}. Give the folder with --src.")


def list_files(root: Path) -> Listing:
    """Return every regular file below ``root``, links followed, in the order of the bytes of its path.

    Raises ``SourceError`` where ``root`` is no folder, a folder cannot be read, or there is no file.
    """
    require_folder(root)
    paths: list[bytes] = []
    sizes: list[int] = []
    tables: list[Path] = []
    base = os.fsencode(root)
    pending, seen = [b""], set[tuple[int, int]]()
    while pending:
        folder = pending.pop()
        place = os.path.join(base, folder)
        below = []
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link to a folder that was listed
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in entries:
                    path = folder + entry.name
                    if entry.is_dir():
                        below.append(path + b"/")
                    elif path.lower().endswith(b".csv"):
                        tables.append(Path(os.fsdecode(path)))
                    elif entry.is_file() or entry.is_symlink():
                        paths.append(path)
                        sizes.append(entry.stat().st_size if entry.is_file() else 0)
        except OSError as error:
            raise SourceError(
                f"Expected to be allowed to list {os.fsdecode(place)}; it cannot be read ({error.strerror}). Mend "
                "that, or "
                "point --src at a tree you may read."
            ) from None
        # Of a folder that is reached twice, the path that counts is the same on every machine.
        pending += sorted(below, reverse=True)
    if not paths:
        raise SourceError(f"Expected DICOM files below {root}; found none.")
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
    files = pa.table({"path": pa.array(paths, pa.binary()), "size": pa.array(sizes, pa.int64())}).take(pa.array(order))
    return Listing(root, files, tuple(sorted(tables)))


def read_ahead(items: Sequence[T], path_of: Callable[[T], str | bytes], *, files: int, length: int = 0) -> Iterator[T]:
    """Yield ``items``; the kernel fetches the files of the next ``files`` of them meanwhile, ``path_of`` says which.

    Only the first ``length`` bytes of each, or all of it where that is 0. A file that cannot be opened is left to
    whoever reads it.
    """
    coming = iter(items)
    for item in islice(coming, files):
        _ask_for(path_of(item), length)
    for item in items:
        for following in islice(coming, 1):
            _ask_for(path_of(following), length)
        yield item


def _ask_for(path: str | bytes, length: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
