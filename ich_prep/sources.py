"""Where the bytes lie: the files below a folder, listed in one order on every machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ich_prep.errors import SourceError


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

    Raises ``SourceError`` where ``root`` is no folder, cannot be read, or holds no file.
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
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back to a folder that was listed
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    path = folder + entry.name
                    if entry.is_dir():
                        pending.append(path + b"/")
                    elif path.lower().endswith(b".csv"):
                        tables.append(Path(os.fsdecode(path)))
                    elif entry.is_file() or entry.is_symlink():
                        paths.append(path)
                        sizes.append(entry.stat().st_size if entry.is_file() else 0)
        except PermissionError:
            raise SourceError(
                f"Expected to be allowed to list {os.fsdecode(place)}; it is not readable. Change its permissions, or "
                "point --src at a tree you may read."
            ) from None
    if not paths:
        raise SourceError(f"Expected DICOM files below {root}; found none.")
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
    files = pa.table({"path": pa.array(paths, pa.binary()), "size": pa.array(sizes, pa.int64())}).take(pa.array(order))
    return Listing(root, files, tuple(sorted(tables)))


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
