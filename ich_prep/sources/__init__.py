"""Sources of files: a folder, a zip archive, a bucket, or several of them. ``open_source`` opens one by its path.

source     the interface: Source, Listing
folder     the files below a folder, including those in zip archives and gzip files
zip_archive, zip_directory    a zip archive, read without unpacking it
bucket     the objects below a name in a bucket
several    several sources as one
member, inflate    bytes of a file inside an archive
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.errors import SourceError, UsageError
from ich_prep.sources.bucket import BucketSource, table_in_bucket
from ich_prep.sources.folder import FolderSource
from ich_prep.sources.member import LARGEST_MEMBER
from ich_prep.sources.several import SeveralSources
from ich_prep.sources.source import LISTING_SCHEMA, Listing, Source, TableFile, is_utf8, read_first, read_whole, shown
from ich_prep.sources.zip_archive import ZipSource

__all__ = [
    "LARGEST_MEMBER",
    "LISTING_SCHEMA",
    "BucketSource",
    "FolderSource",
    "Listing",
    "SeveralSources",
    "Source",
    "TableFile",
    "ZipSource",
    "check_table_path",
    "is_utf8",
    "open_source",
    "read_ahead",
    "read_first",
    "read_whole",
    "shown",
    "table_at",
]

T = TypeVar("T")


def open_source(paths: Sequence[str | Place]) -> Source:
    """Return the source at ``paths``: a folder, a zip archive or a place in a bucket, or several of these as one.

    Opens nothing yet. Raises ``SourceError`` if there is neither, and ``UsageError`` for a path that is given twice.
    """
    places = [Path(path) if isinstance(path, str) else path for path in paths]
    resolved = [place.resolve() for place in places]
    if not resolved:
        raise UsageError("Expected at least one folder or zip archive with --src.")
    if len({*resolved}) < len(resolved):
        raise UsageError(f"--src names the same place twice: {', '.join(map(str, paths))}.")
    parts = tuple(map(_open_one, places))
    return parts[0] if len(parts) == 1 else SeveralSources(parts)


def _open_one(path: Place) -> Source:
    if isinstance(path, BucketPath):
        return BucketSource(path)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(path)
    found = "a file" if path.exists() else "nothing"
    raise SourceError(
        f"Expected a folder of DICOM files or a zip archive at {path}; found {found}. Give the folder with --src."
    )


def check_table_path(path: Place) -> None:
    """Raise ``SourceError`` unless ``path`` is a regular file, or a link to one, that can be opened; nothing is read.

    A path inside an archive is left to the archive's listing.
    """
    problem = ""
    if isinstance(path, BucketPath):
        if not path.is_file():
            raise SourceError(f"Expected a label table at {path}; there is no such object. Give its URL with --labels.")
        return
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            problem = "found a folder" if path.is_dir() else "found a pipe, socket or device"
        else:
            with path.open("rb"):
                pass
    except FileNotFoundError:
        problem = "there is no such file"
    except NotADirectoryError:
        inside = any(above.suffix.lower() == ".zip" and above.is_file() for above in path.parents)
        problem = "" if inside else "part of its path is no folder"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or 'not a path'})"
    if problem:
        raise SourceError(
            f"Expected a label table at {str(path)[:500]}; {problem}. Give the path of a file with --labels."
        )


def table_at(path: Place) -> TableFile:
    """Return the table at ``path``, which need not belong to a source."""
    if isinstance(path, BucketPath):
        return table_in_bucket(path)
    folder = FolderSource(path.absolute().parent)
    return TableFile(folder, path.name.encode(), str(path))


def read_ahead(
    source: Source, items: Sequence[T], key_of: Callable[[T], bytes], *, files: int, length: int = 0
) -> Iterator[T]:
    """Yield ``items``, while the files of the next ``files`` of them are prefetched; ``key_of`` returns an item's key.

    ``length``: how many bytes of each file to prefetch; 0 for all.
    """
    upcoming = iter(items)
    for item in islice(upcoming, files):
        source.prefetch(key_of(item), length)
    for item in items:
        for next_item in islice(upcoming, 1):
            source.prefetch(key_of(next_item), length)
        yield item
