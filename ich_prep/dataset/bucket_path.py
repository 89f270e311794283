"""Places in a bucket with the names that ``pathlib.Path`` has for what a build does with its files.

A bucket has no folders: below a name there are objects, or there is nothing. Objects appear whole or not at all.
"""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from ich_prep.dataset.store_answers import ConditionError
from ich_prep.dataset.stores import Store, StorePath
from ich_prep.errors import UsageError
from ich_prep.files import whole_url

if TYPE_CHECKING:
    from ich_prep.dataset.stores import Meta

TABLE_READ = 256 * 1024  # bytes of a table that one request fetches: a row group of the plan is smaller
_WRITEABLE = re.compile(r"(s3|gs)://([^/]+)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class BucketPath(StorePath):
    """A place in a bucket: that of an object, or of all objects below its name; the store is that of the whole bucket.

    ``atomic``: whether the store honours conditions on writes, without which two builds may overwrite each other.
    """

    atomic: bool = True

    def __truediv__(self, name: object) -> Self:
        return replace(self, key=f"{self.key}/{name}" if self.key else str(name))

    def __lt__(self, other: BucketPath) -> bool:
        return str(self) < str(other)

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The last ending of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        """The place that contains this one; the bucket contains itself."""
        return replace(self, key=self.key.rpartition("/")[0])

    @property
    def parents(self) -> tuple[Self, ...]:
        """All places that contain this one, the nearest first."""
        above, each = [], self
        while each.key:
            each = each.parent
            above.append(each)
        return tuple(above)

    def with_name(self, name: str) -> Self:
        """Return the place beside this one with that name."""
        return self.parent / name

    def relative_to(self, other: object) -> PurePosixPath:
        """Return the path below ``other``; raises ``ValueError`` if this place is not there."""
        if not isinstance(other, BucketPath) or other.store != self.store:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(PurePosixPath(other.key))

    def absolute(self) -> Self:
        """Return this place: URLs are absolute."""
        return self

    def resolve(self) -> Self:
        """Return this place: buckets have no links."""
        return self

    def meta(self) -> Meta | None:
        """Return what the store says of the object, None if there is none."""
        try:
            return self.store.head(self.key) if self.key else None
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        """Return whether there is an object here, or any below."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is an object here."""
        return self.meta() is not None

    def is_dir(self) -> bool:
        """Return whether there are objects below."""
        return self.store.has_any(self.key)

    def read_bytes(self, *, limit: int | None = None) -> bytes:
        """Return the bytes of the object; raises ``FileNotFoundError``, and ``OSError`` for more than ``limit`` bytes."""
        if limit is not None and (size := self.store.head(self.key).size) > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {limit:,}", str(self))
        return self.store.get(self.key)

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Write the object in one request."""
        self.store.put(self.key, data)

    def create(self, data: bytes) -> None:
        """Write the object where there is none; raises ``FileExistsError`` where there is one, of other bytes."""
        try:
            self.store.put(self.key, data, if_absent=self.atomic)
        except ConditionError:
            raise FileExistsError(f"{self} exists") from None

    def touch(self) -> None:
        """Make an empty object, unless there is one."""
        if not self.is_file():
            self.write_bytes(b"")

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete the object; with ``missing_ok`` if there is one."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(str(self))
        self.store.delete(self.key)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders."""

    def rmdir(self) -> None:
        """Do nothing: a bucket has no folders."""

    def below(self) -> Iterator[tuple[Self, Meta]]:
        """Yield the objects below, sorted by the characters of their keys, and what the store says of each."""
        for key, meta in self.store.listed(self.key):
            if not key.endswith("/"):  # what some programs write to show a folder
                yield replace(self, key=key), meta

    def rglob(self, pattern: str) -> Iterator[Self]:
        """Yield the objects below whose name matches ``pattern``."""
        return (place for place, _ in self.below() if fnmatchcase(place.name, pattern))

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yield the objects directly below whose name matches ``pattern``."""
        return (place for place in self.rglob(pattern) if place.parent == self)

    def reader(self) -> io.BufferedReader:
        """Return the object opened for reading, which ranged requests fetch; raises ``FileNotFoundError``."""
        return io.BufferedReader(_Ranges(self.store, self.key), TABLE_READ)


Place = Path | BucketPath  # where a build reads and writes: on a file system, or in a bucket


class _Ranges(io.RawIOBase):
    """The bytes of an object, fetched as they are asked for."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key, self._at = store, key, 0
        self._size = store.head(key).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        (data,) = self._store.get_ranges(self._key, [self._at], [end])
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def bucket_path(given: object, what: str, *, endpoint: str | None = None, atomic: bool = True) -> BucketPath:
    """Return the place that a URL names; ``what`` names it in the error, such as ``--out``.

    Raises ``UsageError`` for a URL whose store cannot be written or listed, and for one with an empty part.
    """
    url = whole_url(given)
    match = _WRITEABLE.fullmatch(url)
    if match is None:
        raise UsageError(
            f"{what} {url} is not a place in a bucket. Expected a path, or a URL such as s3://bucket/folder or "
            "gs://bucket/folder; web servers cannot be listed or written to."
        )
    parts = [part for part in (match[3] or "").rstrip("/").split("/") if match[3]]
    if any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{what} {url} has an empty part, or one of dots. Expected a URL such as s3://bucket/folder.")
    return BucketPath(Store(f"{match[1]}://{match[2]}", endpoint=endpoint), "/".join(parts), atomic)


def delete_all(places: Iterable[BucketPath]) -> None:
    """Delete the objects at ``places``, those that are there, a thousand with one request."""
    keys: dict[Store, list[str]] = {}
    for place in places:
        keys.setdefault(place.store, []).append(place.key)
    for store, some in keys.items():
        store.delete_many(some)
