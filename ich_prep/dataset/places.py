"""Reading where a dataset is: in a folder of a file system, in a bucket, or on a web server."""

from __future__ import annotations

import os
from pathlib import Path

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.storage import place_of
from ich_prep.dataset.stores import Store
from ich_prep.errors import UsageError
from ich_prep.files import opened, whole_url


def place_to_read(given: str | Place, what: str) -> Place:
    """Return the place that a path or URL names; ``what`` names it in the error. Raises ``UsageError``."""
    url = whole_url(given)
    if isinstance(given, BucketPath) or not url.startswith(("http://", "https://")):
        return place_of(given, what)
    server, _, path = url.partition("://")[2].partition("/")
    return BucketPath(Store(f"{url.partition(':')[0]}://{server}"), path.strip("/"))


def what_is_at(place: Place) -> str:
    """Return what is at ``place`` in place of a dataset, for a message."""
    if isinstance(place, BucketPath):
        return "nothing"
    return "a file" if place.is_file() else "a folder without a zarr.json" if place.is_dir() else "nothing"


def size_at(place: Place) -> int:
    """Return the size of the file at ``place`` in bytes; raises ``OSError``, and ``StoreError`` where a store refuses."""
    if isinstance(place, BucketPath):
        return place.store.head(place.key).size
    with opened(place) as descriptor:
        return os.fstat(descriptor).st_size


def read_range(place: Place, start: int, length: int) -> bytes:
    """Return up to ``length`` bytes of the file at ``place`` from ``start`` on; raises as ``size_at``."""
    if isinstance(place, BucketPath):
        return bytes(place.store.get_ranges(place.key, [start], [start + length])[0])
    with opened(place) as descriptor:
        return os.pread(descriptor, length, start)


def names_below(place: Place) -> list[str] | None:
    """Return the names of all files below ``place``, relative to it, in an order; None if the server cannot list them."""
    if isinstance(place, BucketPath):
        found = [each for each, _ in place.below()] if place.store.is_writeable else None
        return None if found is None else [str(each.relative_to(place)) for each in found]
    return [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if not path.is_dir()]


def local_folder(place: Place) -> Path:
    """Return ``place``, which a command needs to be a folder; raises ``UsageError`` for one in an object store."""
    if isinstance(place, Path):
        return place
    raise UsageError(
        f"{place} is in an object store; this command works on datasets in a file system. Copy the dataset to a disk, then "
        "name its path."
    )
