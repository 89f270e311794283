"""Rows in any order -> ranges of the shards in an object store, fetched at the same time -> decoded as from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dataset.native import IN_MEMORY
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.shard_format import index_bytes
from ich_prep.dataset.shard_reader import ShardReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import BucketPath

ROWS_AT_ONCE = 256  # their chunks are in memory until they are decoded


class StoreShardReader(ShardReader):
    """Reads slices from the shards of the dataset at ``place`` in an object store, as ``ShardReader`` does from files.

    ``sizes``, int64 (shards,), is the length of each shard in bytes. The chunks of a batch are fetched by as few requests
    as ``Store.get_many`` needs, at the same time, and decoded by one call of the compiled library.
    """

    def __init__(self, place: BucketPath, sizes: NDArray[np.int64], **named: Any) -> None:
        super().__init__(lambda shard: shard_path(place, shard), **named)
        self._place, self._sizes = place, sizes

    def _rows_at_once(self) -> int:
        return ROWS_AT_ONCE

    def _read_indexes(self, numbers: Sequence[int]) -> None:
        tail = index_bytes(self._per_shard)
        sizes = self._sizes[np.asarray(numbers)].tolist()
        fetched = self._fetch(numbers, [size - tail for size in sizes], sizes)
        for number, size, data in zip(numbers, sizes, fetched, strict=True):
            self._set_index(number, bytes(data), size - tail)

    def _locate(self, numbers: NDArray[np.int64], requests: NDArray[np.void]) -> list[Any]:
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
