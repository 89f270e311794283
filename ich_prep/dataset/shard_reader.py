"""Rows in any order -> chunks of shards -> decoded straight into the caller's buffer.

This is the hot path of training: a batch is one call of the compiled library, which reads, checks and decodes its chunks
without Python's lock. A thread that waits for that lock loses more than a slice takes to decode. Chunks of zstd, which
take much longer than that, are decoded by blosc, one by one.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dataset.native import Codec, read_chunks, scratch_bytes
from ich_prep.dataset.shard_format import CRC_BYTES, MISSING, decode_payload, index_bytes, parse_index
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_SCRATCH = 4 << 20  # from here on NumPy asks the kernel for huge pages
MOST_OPEN = 16384


class _File:
    """An open shard; closed when the last reader lets go of it."""

    __slots__ = ("descriptor",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads slices of ``slice_bytes`` bytes each from the shards that ``path_of`` names. Safe to share between threads.

    ``slices`` are the rows there are, ``slices_per_shard`` the rows of a shard, ``codec`` a word of ``sharding.CODECS``.
    The index of a shard is read once, when a row of it is first asked for. Files stay open, as many as half of the
    process's limit (``ulimit -n``); beyond that the one opened first is closed, once the threads that read it have done
    so: each holds a 32nd of the limit at most.
    """

    def __init__(
        self, path_of: Callable[[int], Path], *, slices: int, slice_bytes: int, slices_per_shard: int, codec: str
    ) -> None:
        self._path_of, self._codec = path_of, codec
        self._kind = {"none": Codec.NONE, "lz4": Codec.LZ4}.get(codec, Codec.OTHER)
        self._slices, self._slice_bytes, self._per_shard = slices, slice_bytes, slices_per_shard
        shards = -(-slices // slices_per_shard)
        # Where the chunk of each row begins and ends in its shard: equal for a hole.
        self._begins = np.zeros(shards * slices_per_shard, np.int64)
        self._ends = np.zeros(shards * slices_per_shard, np.int64)
        self._indexed = np.zeros(shards, bool)
        self._files: dict[int, _File] = {}
        self._most_open = most_open()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("An open dataset cannot be pickled; pass its path and open it in the other process.")

    def read(self, rows: NDArray[np.int64], out: NDArray[np.uint8], *, threads: int = 1) -> list[int]:
        """Decode ``rows``, int64 (n,), into ``out``, uint8 (n, slice_bytes), C-contiguous.

        Returns which of the rows are holes; where there are any, nothing is decoded. Raises ``IndexError`` for a row
        that is not there, ``CorruptionError`` naming shard and row, ``ValueError`` for another ``out``.
        """
        if not len(rows):
            return []
        require_out(out, (len(rows), self._slice_bytes), np.dtype(np.uint8))
        if int(rows.min()) < 0 or int(rows.max()) >= self._slices:
            raise IndexError(f"Expected rows within 0..{self._slices - 1}; got {int(rows.min())}..{int(rows.max())}.")
        numbers = rows // self._per_shard
        if not self._indexed[numbers].all():
            for number in np.unique(numbers[~self._indexed[numbers]]).tolist():
                self._read_index(number)
        missing = self._begins[rows] == self._ends[rows]
        if missing.any():
            return np.unique(rows[missing]).tolist()  # type: ignore[no-any-return]
        if threads <= 1 or len(rows) < 2 * threads:
            self._read_rows(rows, out)
            return []
        if self._threads is None:
            self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read")
        parts = zip(np.array_split(rows, threads), np.array_split(out, threads), strict=True)
        tasks = [self._threads.submit(self._read_rows, *part) for part in parts]
        wait(tasks)  # also where one of them fails: nobody writes into ``out`` any more
        for task in tasks:
            task.result()
        return []

    def _read_rows(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Read as many rows at a time as files may be held open by one thread."""
        step = max(1, self._most_open // 16)
        for at in range(0, len(rows), step):
            self._read_some(rows[at : at + step], out[at : at + step])

    def _read_some(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        begins = self._begins[rows]
        lengths = self._ends[rows] - begins
        # Held until they are read: another thread may let go of them meanwhile.
        files = [self._open(number) for number in (rows // self._per_shard).tolist()]
        requests = np.empty((len(rows), 4), np.int64)
        requests[:, 0] = [file.descriptor for file in files]
        requests[:, 1], requests[:, 2] = begins, lengths
        if self._kind != Codec.OTHER:
            requests[:, 3] = self._slice_bytes * np.arange(len(rows))
            self._take(rows, requests, out.reshape(-1))
            return
        ends = np.cumsum(lengths)
        requests[:, 3] = ends - lengths
        chunks = self._scratch(int(ends[-1]))
        self._take(rows, requests, chunks)
        for row, line, end, length in zip(rows.tolist(), out, ends.tolist(), lengths.tolist(), strict=True):
            try:
                decode_payload(chunks[end - length : end - CRC_BYTES], codec=self._codec, out=line)
            except CorruptionError as error:
                raise self._corrupt_row(row, str(error)) from None

    def _take(self, rows: NDArray[np.int64], requests: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        needed = scratch_bytes(self._kind, longest_chunk=int(requests[:, 2].max()), slice_bytes=self._slice_bytes)
        scratch = self._scratch(needed) if needed else np.empty(0, np.uint8)
        fault = read_chunks(requests, self._kind, out=out, slice_bytes=self._slice_bytes, scratch=scratch)
        if fault:
            raise self._corrupt_row(int(rows[fault.request]), fault.what)

    def _open(self, number: int) -> _File:
        file = self._files.get(number)
        if file is not None:
            return file
        try:
            file = _File(self._path_of(number))
        except (FileNotFoundError, NotADirectoryError):
            raise self._corrupt(number, "there is no such file") from None
        with self._lock:
            if len(self._files) >= self._most_open:
                del self._files[next(iter(self._files))]
            return self._files.setdefault(number, file)

    def _read_index(self, number: int) -> None:
        tail = index_bytes(self._per_shard)
        file = self._open(number)
        size = os.fstat(file.descriptor).st_size
        if size < tail:
            raise self._corrupt(number, f"expected at least {tail} bytes, found {size}")
        try:
            data = os.pread(file.descriptor, tail, size - tail)
        except OSError as error:
            raise self._corrupt(number, f"it cannot be read: {error.strerror}") from error
        try:
            index = parse_index(data, chunks=self._per_shard, body=size - tail)
        except CorruptionError as error:
            raise self._corrupt(number, str(error)) from None
        there = index[:, 0] != MISSING
        lines = slice(number * self._per_shard, (number + 1) * self._per_shard)
        self._begins[lines] = np.where(there, index[:, 0], 0)
        self._ends[lines] = np.where(there, index[:, 0] + index[:, 1], 0)
        self._indexed[number] = True

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """Return this thread's read buffer, ``size`` bytes of it."""
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = np.empty(max(size, LEAST_SCRATCH), np.uint8)
        return buffer[:size]

    def _corrupt_row(self, row: int, what: str) -> CorruptionError:
        return self._corrupt(row // self._per_shard, what, row)

    def _corrupt(self, shard: int, what: str, row: int | None = None) -> CorruptionError:
        where = f"Shard {shard} ({self._path_of(shard)})" + (f", row {row}" if row is not None else "")
        return CorruptionError(
            f"{where}: {what}. The dataset's bytes are not the ones that were written: run `ich-prep verify` to see "
            "all "
            "that is damaged, then restore it or build again with --overwrite."
        )


def require_out(out: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise ``ValueError`` where ``out`` is not memory that an array of ``shape`` and ``dtype`` may be written to."""
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"Expected out to be writeable, C-contiguous, of shape {shape} and {dtype}; got {out.dtype} of shape "
            f"{out.shape} with strides {out.strides}."
        )


def most_open() -> int:
    """Return how many shards a reader may keep open: half of the files that the process may."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, limit // 2))
