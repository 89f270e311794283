"""Rows in any order -> ranges of shards -> one read a range -> decoded straight into the caller's buffer.

This is the hot path of training: nothing is allocated per slice, and the file system and the decoder run outside of
Python's lock.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numcodecs import blosc

from ich_prep.errors import CorruptionError
from ich_prep.sharding import MISSING, decode_chunk, index_bytes, parse_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPEN_SHARDS = 400
LONGEST_READ = 4 << 20


class _Shard:
    """An open shard and its index; closed when the last reader lets go of it."""

    __slots__ = ("descriptor", "lengths", "offsets")

    def __init__(self, path: Path, chunks: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        size, tail = os.fstat(self.descriptor).st_size, index_bytes(chunks)
        if size < tail:
            raise CorruptionError(f"expected at least {tail} bytes, found {size}")
        index = parse_index(os.pread(self.descriptor, tail, size - tail), chunks=chunks, body=size - tail)
        there = index[:, 0] != MISSING
        self.offsets: list[int] = np.where(there, index[:, 0], 0).tolist()
        self.lengths: list[int] = np.where(there, index[:, 1], 0).tolist()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads slices of ``slice_bytes`` bytes each from the shards that ``path_of`` names. Safe to share between threads.

    ``slices`` are the rows there are, ``slices_per_shard`` the rows of a shard, ``codec`` a word of ``sharding.CODECS``.
    """

    def __init__(
        self, path_of: Callable[[int], Path], *, slices: int, slice_bytes: int, slices_per_shard: int, codec: str
    ) -> None:
        blosc.use_threads = False  # many threads decode at once, each a slice of its own
        self._path_of, self._codec = path_of, codec
        self._slices, self._slice_bytes, self._per_shard = slices, slice_bytes, slices_per_shard
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("An open dataset cannot be pickled; pass its path and open it in the other process.")

    def read(self, rows: NDArray[np.int64], out: NDArray[np.uint8], *, threads: int = 1) -> list[int]:
        """Decode ``rows``, int64 (n,), into ``out``, uint8 (n, slice_bytes); return the rows that are holes.

        Raises ``IndexError`` for a row that is not there, ``CorruptionError`` naming shard and row.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self._slices):
            raise IndexError(f"Expected rows within 0..{self._slices - 1}; got {int(rows.min())}..{int(rows.max())}.")
        places = np.argsort(rows, kind="stable")
        if threads <= 1 or len(rows) < 2 * threads:
            return self._read_sorted(rows, places, out)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")
        parts = np.array_split(places, threads)
        tasks = [self._threads.submit(self._read_sorted, rows, part, out) for part in parts[1:]]
        holes = self._read_sorted(rows, parts[0], out)
        for task in tasks:
            holes += task.result()
        return holes

    def _read_sorted(self, rows: NDArray[np.int64], places: NDArray[np.intp], out: NDArray[np.uint8]) -> list[int]:
        """Read ``rows[places]``, which ascend, each into the line of ``out`` at its place."""
        holes: list[int] = []
        ascending = rows[places]
        numbers = (ascending // self._per_shard).tolist()
        insides = (ascending % self._per_shard).tolist()
        targets = places.tolist()
        at, count = 0, len(targets)
        while at < count:
            number = numbers[at]
            shard = self._open(number)
            offsets, lengths = shard.offsets, shard.lengths
            start = offsets[insides[at]]
            end = start + lengths[insides[at]]
            if end == start:
                holes.append(int(ascending[at]))
                at += 1
                continue
            # Neighbours in the shard are read together.
            stop = at + 1
            while stop < count and numbers[stop] == number and end - start < LONGEST_READ:
                inside = insides[stop]
                if offsets[inside] == end and lengths[inside]:
                    end += lengths[inside]
                elif inside != insides[stop - 1]:
                    break
                stop += 1
            data = self._scratch(end - start)
            if os.preadv(shard.descriptor, [data.data], start) != end - start:
                raise self._corrupt(number, None, "it ends early")
            for index in range(at, stop):
                inside = insides[index]
                begin = offsets[inside] - start
                try:
                    chunk = data[begin : begin + lengths[inside]]
                    decode_chunk(chunk, codec=self._codec, out=out[targets[index]])
                except CorruptionError as error:
                    raise self._corrupt(number, number * self._per_shard + inside, str(error)) from None
            at = stop
        return holes

    def _open(self, number: int) -> _Shard:
        with self._lock:
            shard = self._shards.get(number)
            if shard is not None:
                self._shards.move_to_end(number)
                return shard
        try:
            shard = _Shard(self._path_of(number), self._per_shard)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._corrupt(number, None, "there is no such file") from None
        except CorruptionError as error:
            raise self._corrupt(number, None, str(error)) from None
        with self._lock:
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """Return this thread's read buffer, ``size`` bytes of it."""
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = np.empty(max(size, 1 << 20), np.uint8)
        return buffer[:size]

    def _corrupt(self, shard: int, row: int | None, what: str) -> CorruptionError:
        where = f"Shard {shard} ({self._path_of(shard)})" + (f", row {row}" if row is not None else "")
        return CorruptionError(
            f"{where}: {what}. The dataset's bytes are not the ones that were written: run `ich-prep verify` to see all "
            "that is damaged, then restore it or build again."
        )
