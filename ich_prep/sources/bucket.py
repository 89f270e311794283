"""Buckets: the objects below a name, in the order of the files of a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ich_prep.dataset.bucket_path import BucketPath
from ich_prep.dataset.store_answers import ConditionError
from ich_prep.errors import Reason, SliceError, SourceError
from ich_prep.sources.source import Entries, Listing, TableFile, fill

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ich_prep.dataset.stores import Meta

_TABLES: Final = (".csv", ".tsv")
_ARCHIVES: Final = (".zip", ".dcm.gz")
_AFTER_ETAG: Final = b"\0"


@dataclass(frozen=True)
class BucketSource:
    """The objects below ``place``. A key is an object's size, its entity tag, and its path below the place.

    An object is read only as it was listed: a store refuses to give out another one. What is prefetched is kept in memory
    until it is read, so a reader prefetches a few files ahead, and no more.
    """

    place: BucketPath
    _ahead: dict[bytes, Future[memoryview]] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.place.name

    def list(self) -> Listing:
        """Return every object; raises ``SourceError`` if there is none, or an archive, which only folders can have."""
        entries = Entries()
        start = len(self.place.key) + bool(self.place.key)
        for object_, meta in self.place.below():
            path = object_.key[start:]
            if path.lower().endswith(_TABLES):
                entries.tables.append(TableFile(self, _key(path, meta), str(object_)))
            elif path.lower().endswith(_ARCHIVES):
                raise SourceError(
                    f"{object_} is an archive, and archives in buckets are not read. Unpack it into the bucket, or copy it "
                    "to a disk and give that as --src."
                )
            else:
                entries.add(os.fsencode(path), meta.size, _key(path, meta))
        listing = entries.listing(self.name)
        if not len(listing.files):
            raise SourceError(
                f"Expected DICOM files below {self.place}; found none. Check the name of the bucket and folder."
            )
        return listing

    def size(self, key: bytes) -> int:
        """Return the length that the object had when it was listed."""
        return int(key.partition(b" ")[0])

    def read_into(self, key: bytes, buffers: Sequence[Buffer], offset: int = 0, *, verify: bool = False) -> int:
        """Fill ``buffers``; see ``Source.read_into``. Raises ``SliceError`` (CHANGED) if the object is not as listed."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        fetched = self._ahead.pop(key, None)
        try:
            data = None if fetched is None else fetched.result()
            if data is None or (len(data) < offset + length and len(data) < self.size(key)):
                data, offset = self._fetch(key, offset, offset + length).result(), 0
        except ConditionError:
            raise SliceError(Reason.CHANGED, "the object is not the one that was listed: it changed since") from None
        return fill(data[offset : offset + length], buffers)

    def prefetch(self, key: bytes, length: int) -> None:
        """Start to fetch an object."""
        self._ahead[key] = self._fetch(key, 0, length or self.size(key))

    def _fetch(self, key: bytes, start: int, end: int) -> Future[memoryview]:
        size, _, rest = key.partition(b" ")
        etag, _, path = rest.partition(_AFTER_ETAG)
        place = self.place / os.fsdecode(path)
        return place.store.fetch(place.key, start, min(end, int(size)), etag=etag.decode() or None)


def table_in_bucket(place: BucketPath) -> TableFile:
    """Return the table at ``place``, which need not belong to a source; raises ``FileNotFoundError``."""
    source = BucketSource(place.parent)
    return TableFile(source, _key(place.name, place.store.head(place.key)), str(place))


def _key(path: str, meta: Meta) -> bytes:
    return b"%d %s%s%s" % (meta.size, (meta.etag or "").encode(), _AFTER_ETAG, os.fsencode(path))
