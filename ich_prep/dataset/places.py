"""Where a dataset is: a folder of a file system, or a place in an object store; and its files, read whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ich_prep.dataset.storage import local_path
from ich_prep.dataset.store_url import is_url
from ich_prep.dataset.stores import Store, StorePath
from ich_prep.errors import UsageError
from ich_prep.files import opened, read_regular

Place = Path | StorePath


def place_of(given: str | Path | StorePath, what: str) -> Place:
    """Return the place that a path or URL names; ``what`` names it in the error. Raises ``UsageError`` as ``local_path``."""
    if isinstance(given, StorePath):
        return given
    return StorePath(Store(str(given))) if is_url(given) else local_path(given, what)


def read_whole(place: Place, *, limit: int | None = None) -> bytes:
    """Return the bytes of the file at ``place``.

    Raises ``OSError``, also for one of more than ``limit`` bytes, and ``StoreError`` where a store refuses.
    """
    if isinstance(place, Path):
        return read_regular(place, limit=limit)
    if limit is not None and (size := place.store.head(place.key).size) > limit:
        raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {limit:,}", str(place))
    return place.store.get(place.key)


def size_at(place: Place) -> int:
    """Return the size of the file at ``place`` in bytes; raises as ``read_whole``."""
    if isinstance(place, StorePath):
        return place.store.head(place.key).size
    with opened(place) as descriptor:
        return os.fstat(descriptor).st_size


def read_range(place: Place, start: int, length: int) -> bytes:
    """Return up to ``length`` bytes of the file at ``place`` from ``start`` on; raises as ``read_whole``."""
    if isinstance(place, StorePath):
        return bytes(place.store.get_ranges(place.key, [start], [start + length])[0])
    with opened(place) as descriptor:
        return os.pread(descriptor, length, start)


def names_below(place: Place) -> list[str] | None:
    """Return the names of all files below ``place``, relative to it, in an order; None if the server cannot list them."""
    if isinstance(place, StorePath):
        return [name for name, _ in place.store.listed(place.key)] if place.store.is_writeable else None
    return [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if not path.is_dir()]


def local_folder(place: Place) -> Path:
    """Return ``place``, which a command needs to be a folder; raises ``UsageError`` for one in an object store."""
    if isinstance(place, Path):
        return place
    raise UsageError(
        f"{place} is in an object store; this command works on datasets in a file system. Copy the dataset to a disk, then "
        "name its path."
    )
