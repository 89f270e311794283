"""Rows in any order -> ranges of the shards in an object store, fetched at the same time -> decoded as from a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dataset.native import IN_MEMORY
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.shard_cache import Kept
from ich_prep.dataset.shard_format import index_bytes
from ich_prep.dataset.shard_reader import OpenShard, ShardReader
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import BucketPath
    from ich_prep.dataset.shard_cache import ShardCache

ROWS_AT_ONCE = 256  # their chunks are in memory until they are decoded
_TOUCHED_SECONDS = 60.0  # between two notes that open shards are in use


class StoreShardReader(ShardReader):
    """Reads slices from the shards of the dataset at ``place`` in an object store, as ``ShardReader`` does from files.

    ``shards`` has the columns ``bytes`` and ``fingerprint`` of the table of shards. The chunks of a batch are fetched by as
    few requests as ``Store.get_many`` needs, at the same time, and decoded by one call of the compiled library. With a
    ``cache``, whole shards are fetched into it and read from there, except for those that it does not keep.
    """

    def __init__(self, place: BucketPath, shards: pa.Table, cache: ShardCache | None, **named: Any) -> None:
        super().__init__(lambda shard: shard_path(place, shard), **named)
        self._place, self._cache = place, cache
        self._sizes = shards["bytes"].to_numpy()
        self._prints = shards["fingerprint"].to_pylist()
        self._touched = time.monotonic()

    def _rows_at_once(self) -> int:
        return ROWS_AT_ONCE if self._cache is None else super()._rows_at_once()

    def _read_indexes(self, numbers: Sequence[int]) -> None:
        tail, far = index_bytes(self._per_shard), []
        for number in numbers:
            file = self._cached(number)
            size = int(self._sizes[number])
            if file is None:
                far.append(number)
            else:
                self._set_index(number, os.pread(file.descriptor, tail, size - tail), size - tail)
        sizes = self._sizes[np.asarray(far, np.int64)].tolist()
        fetched = self._fetch(far, [size - tail for size in sizes], sizes)
        for number, size, data in zip(far, sizes, fetched, strict=True):
            self._set_index(number, bytes(data), size - tail)

    def _read_batch(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        try:
            super()._read_batch(rows, out)
        except CorruptionError:
            if not self._discard(np.unique(rows // self._per_shard).tolist()):
                raise
            super()._read_batch(rows, out)  # from the store: the disk of the cache may be at fault

    def _locate(self, numbers: NDArray[np.int64], requests: NDArray[np.void]) -> list[Any]:
        if self._cache is None:
            return self._locate_far(numbers, requests)
        self._note_use()
        files = [self._files.get(number) or self._cached(number) for number in numbers.tolist()]
        requests["fd"] = [IN_MEMORY if file is None else file.descriptor for file in files]
        far = requests["fd"] == IN_MEMORY
        if not far.any():
            return files
        some = requests[far]
        buffers = self._locate_far(numbers[far], some)
        requests[far] = some
        return [files, buffers]

    def _locate_far(self, numbers: NDArray[np.int64], requests: NDArray[np.void]) -> list[Any]:
        """Fetch the chunks of ``requests`` into memory; return the buffers."""
        begins = requests["offset"].tolist()
        ends = (requests["offset"] + requests["length"]).tolist()
        buffers = [np.frombuffer(data, np.uint8) for data in self._fetch(numbers.tolist(), begins, ends)]
        requests["fd"] = IN_MEMORY
        requests["offset"] = [buffer.__array_interface__["data"][0] for buffer in buffers]
        return buffers

    def _fetch(self, numbers: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """Return bytes ``begins[i]`` to ``ends[i]`` of shard ``numbers[i]`` for each i: all of them."""
        store, keys = self._place.store, [shard_path(self._place, number).key for number in numbers]
        try:
            fetched = store.get_many(list(zip(keys, begins, ends, strict=True)))
        except FileNotFoundError as error:
            lost = next((n for n, key in zip(numbers, keys, strict=True) if store.url_of(key) == error.filename), -1)
            raise self._corrupt(lost, "file not found") from None
        for number, begin, end, data in zip(numbers, begins, ends, fetched, strict=True):
            if len(data) != end - begin:
                raise self._corrupt(number, f"truncated: expected bytes {begin} to {end}, found {len(data)} of them")
        return fetched

    # --- the cache ---

    def _cached(self, number: int) -> OpenShard | None:
        """Return the open file of shard ``number`` in the cache, None if it is not kept there."""
        if self._cache is None:
            return None
        file = self._files.get(number)
        if file is not None:
            return file

        def fetch(ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
            starts, ends = zip(*ranges, strict=True)
            return self._fetch([number] * len(ranges), starts, ends)

        descriptor = self._cache.open_shard(self._kept(number), fetch)
        return None if descriptor is None else self._keep_open(number, OpenShard(descriptor))

    def _kept(self, number: int) -> Kept:
        return Kept(str(self._prints[number]), int(self._sizes[number]), self._per_shard)

    def _note_use(self) -> None:
        """Tell the cache now and then which shards are in use."""
        now = time.monotonic()
        if self._cache is not None and now - self._touched > _TOUCHED_SECONDS:
            self._touched = now
            for number in list(self._files):
                self._cache.used(self._kept(number))

    def _discard(self, numbers: Sequence[int]) -> bool:
        """Remove shards from the cache; return whether any was there."""
        there = [number for number in numbers if self._files.pop(number, None) is not None]
        for number in there:
            if self._cache is not None:
                self._cache.discard(self._kept(number))
        return bool(there)
