"""Rows in any order -> chunks of shards -> decoded straight into the caller's buffer.

This is the hot path of training: a batch is one call of the compiled library, which reads, verifies and decodes its chunks
without the GIL. A thread that waits for the GIL loses more time than a slice takes to decode. Chunks of zstd take much
longer than that, so they are decoded by blosc, one by one.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.codecs import FRAME_HEADER_BYTES
from ich_prep.dataset.native import REQUEST, ChunkCodec, read_chunks, scratch_bytes
from ich_prep.dataset.places import local_folder, read_range, size_at
from ich_prep.dataset.shard_format import CRC_BYTES, MISSING, index_bytes, parse_index
from ich_prep.errors import CorruptionError
from ich_prep.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.codecs import Codec

MIN_SCRATCH = 4 << 20  # from this size on NumPy asks the kernel for huge pages
MAX_OPEN = 16384
MAX_GROWTH = 2  # no codec makes a slice longer than that
_NO_FILE = frozenset(
    (errno.EINVAL, errno.EISDIR, errno.ELOOP)
)  # a FIFO, a device, a socket, a folder, a link to itself


class OpenShard:
    """An open shard; closed when its last user drops it."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardReader:
    """Reads slices of ``slice_bytes`` bytes each from the shards at ``path_of(number)``. Safe to share between threads.

    ``slices`` is the number of rows, ``slices_per_shard`` the number of chunks in the index of each shard; shards may
    contain further chunks, which are not read. ``expected_crc``, uint32 (slices or more,), is the checksum that each row
    must have after its payload: it detects a valid chunk from elsewhere. ``has_pixels``, bool (slices or more,), says
    which rows may be read; a chunk of another is treated as missing.

    The index of a shard is read once, when one of its rows is first read. Files stay open, up to half of the process's
    limit (``ulimit -n``). Beyond that the file opened first is closed, once no thread reads it; each thread uses up to a
    32nd of the limit. ``close``, or the end of a ``with`` block, closes the files and ends the threads.
    """

    def __init__(
        self,
        path_of: Callable[[int], Place],
        *,
        slices: int,
        slice_bytes: int,
        slices_per_shard: int,
        codec: Codec,
        expected_crc: NDArray[np.uint32] | None = None,
        has_pixels: NDArray[np.bool_] | None = None,
    ) -> None:
        if expected_crc is not None and (expected_crc.dtype != np.uint32 or expected_crc.ndim != 1):
            raise ValueError(f"Expected checksums as uint32 (n,); got {expected_crc.dtype} {expected_crc.shape}.")
        if expected_crc is not None and len(expected_crc) < slices:
            raise ValueError(f"Expected a checksum for each of {slices} rows; got {len(expected_crc)}.")
        self._path_of, self._codec, self._expected_crc, self._has_pixels = path_of, codec, expected_crc, has_pixels
        self._slices, self._slice_bytes, self._per_shard = slices, slice_bytes, slices_per_shard
        shards = -(-slices // slices_per_shard)
        # Where the chunk of each row begins and ends in its shard; equal if it is missing.
        self._begins = np.zeros(shards * slices_per_shard, np.int64)
        self._ends = np.zeros(shards * slices_per_shard, np.int64)
        self._indexed = np.zeros(shards, bool)
        self._files: dict[int, OpenShard] = {}
        self._max_open = max_open_files()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("An open dataset cannot be pickled; pass its path and open it in the other process.")

    def close(self) -> None:
        """End the threads and close the files, once reads in progress are done; further reads raise ``ValueError``."""
        with self._lock:
            self._closed = True
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown()
        with self._lock:
            self._files.clear()

    def read(self, rows: NDArray[np.int64], out: NDArray[np.uint8], *, threads: int = 1) -> list[int]:
        """Decode ``rows``, int64 (n,), into ``out``, uint8 (n, slice_bytes), C-contiguous.

        Return the rows whose chunks are missing; if there are any, nothing is decoded. Raises ``IndexError`` for a row
        out of range, ``CorruptionError`` with the shard and row, ``ValueError`` for another ``out`` or a closed reader.
        """
        if self._closed:
            raise ValueError("This dataset was closed: open it again.")
        if not len(rows):
            return []
        require_out(out, (len(rows), self._slice_bytes), np.dtype(np.uint8))
        if int(rows.min()) < 0 or int(rows.max()) >= self._slices:
            raise IndexError(f"Expected rows within 0..{self._slices - 1}; got {int(rows.min())}..{int(rows.max())}.")
        numbers = rows // self._per_shard
        if not self._indexed[numbers].all():
            self._read_indexes(np.unique(numbers[~self._indexed[numbers]]).tolist())
        missing = self._begins[rows] == self._ends[rows]
        if self._has_pixels is not None:
            missing |= ~self._has_pixels[rows]
        if missing.any():
            return np.unique(rows[missing]).tolist()  # type: ignore[no-any-return]
        if threads <= 1 or len(rows) < 2 * threads:
            self._read_rows(rows, out)
            return []
        parts = zip(np.array_split(rows, threads), np.array_split(out, threads), strict=True)
        tasks = self._submit(threads, parts)
        wait(tasks)  # even if one of them fails: no thread may write to ``out`` after this call
        for task in tasks:
            task.result()
        return []

    def _submit(self, threads: int, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.uint8]]]) -> list[Future[None]]:
        """Start reading ``parts`` in the pool of ``threads`` threads."""
        with self._lock:  # not after ``close`` has taken the pools
            if self._closed:
                raise ValueError("This dataset was closed: open it again.")
            if threads not in self._pools:
                self._pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="read")
            return [self._pools[threads].submit(self._read_rows, *part) for part in parts]

    def _read_rows(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Read ``rows`` in batches."""
        step = self._rows_at_once()
        for i in range(0, len(rows), step):
            self._read_batch(rows[i : i + step], out[i : i + step])

    def _rows_at_once(self) -> int:
        """Return how many rows a batch may have: at most as many as one thread may keep files open."""
        return max(1, self._max_open // 16)

    def _read_batch(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        begins = self._begins[rows]
        lengths = self._ends[rows] - begins
        requests = np.empty(len(rows), REQUEST)
        requests["offset"], requests["length"] = begins, lengths
        kept = self._locate(rows // self._per_shard, requests)
        requests["check_crc"] = self._expected_crc is not None
        if self._expected_crc is not None:
            requests["crc32c"] = self._expected_crc[rows]
        if self._codec.native != ChunkCodec.UNDECODED:
            requests["out_offset"] = self._slice_bytes * np.arange(len(rows))
            self._run_requests(rows, requests, out.reshape(-1))
            del kept
            return
        ends = np.cumsum(lengths)
        requests["out_offset"] = ends - lengths
        chunks = self._scratch(int(ends[-1]))
        self._run_requests(rows, requests, chunks)
        del kept
        for row, pixels, end, length in zip(rows.tolist(), out, ends.tolist(), lengths.tolist(), strict=True):
            try:
                self._codec.decode(chunks[end - length : end - CRC_BYTES], out=pixels)
            except CorruptionError as error:
                raise self._corrupt_row(row, str(error)) from None

    def _locate(self, numbers: NDArray[np.int64], requests: NDArray[np.void]) -> list[Any]:
        """Say in ``requests`` where their chunks are, of shards ``numbers``: (n,).

        Return what must be referenced until they are read: another thread may evict files from ``_files`` meanwhile.
        """
        files = [self._open(number) for number in numbers.tolist()]
        requests["fd"] = [file.descriptor for file in files]
        return files

    def _run_requests(self, rows: NDArray[np.int64], requests: NDArray[np.void], out: NDArray[np.uint8]) -> None:
        codec, longest = self._codec.native, int(requests["length"].max())
        needed = scratch_bytes(codec, max_chunk=longest, slice_bytes=self._slice_bytes)
        scratch = self._scratch(needed) if needed else np.empty(0, np.uint8)
        fault = read_chunks(requests, codec, out=out, slice_bytes=self._slice_bytes, scratch=scratch)
        if fault:
            raise self._corrupt_row(int(rows[fault.request]), fault.what)

    def _open(self, number: int) -> OpenShard:
        file = self._files.get(number)
        if file is not None:
            return file
        try:
            descriptor = open_regular(local_folder(self._path_of(number)))
        except (FileNotFoundError, NotADirectoryError):
            raise self._corrupt(number, "file not found") from None
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise self._corrupt(number, f"cannot be opened: {error.strerror}") from None
        return self._keep_open(number, OpenShard(descriptor))

    def _keep_open(self, number: int, file: OpenShard) -> OpenShard:
        """Return the open file of shard ``number``: ``file``, or one that another thread opened meanwhile."""
        with self._lock:
            if self._closed:
                return file
            if len(self._files) >= self._max_open:
                del self._files[next(iter(self._files))]
            return self._files.setdefault(number, file)

    def _read_indexes(self, numbers: Sequence[int]) -> None:
        """Read the indexes of the shards ``numbers``."""
        tail = index_bytes(self._per_shard)
        for number in numbers:
            file = self._open(number)
            size = os.fstat(file.descriptor).st_size
            if size < tail:
                raise self._corrupt(number, f"expected at least {tail} bytes, found {size}")
            try:
                data = os.pread(file.descriptor, tail, size - tail)
            except OSError as error:
                raise self._corrupt(number, f"cannot be read: {error.strerror}") from error
            self._set_index(number, data, size - tail)

    def _set_index(self, number: int, data: bytes, body: int) -> None:
        """Take the index of shard ``number``, whose chunks have ``body`` bytes."""
        try:
            index = parse_index(data, chunks=self._per_shard, body=body)
        except CorruptionError as error:
            raise self._corrupt(number, str(error)) from None
        present = index[:, 0] != MISSING
        longest = int(index[present, 1].max(initial=0))
        if longest > MAX_GROWTH * self._slice_bytes + MIN_SCRATCH:
            raise self._corrupt(number, f"a chunk of {longest} bytes cannot be a slice of {self._slice_bytes}")
        rows = slice(number * self._per_shard, (number + 1) * self._per_shard)
        self._begins[rows] = np.where(present, index[:, 0], 0)
        self._ends[rows] = np.where(present, index[:, 0] + index[:, 1], 0)
        self._indexed[number] = True

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """Return ``size`` bytes of this thread's buffer."""
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = np.empty(max(size, MIN_SCRATCH), np.uint8)
        return buffer[:size]

    def _corrupt_row(self, row: int, what: str) -> CorruptionError:
        return self._corrupt(row // self._per_shard, what, row)

    def _corrupt(self, shard: int, what: str, row: int | None = None) -> CorruptionError:
        place = f"Shard {shard} ({self._path_of(shard)})" + (f", row {row}" if row is not None else "")
        return CorruptionError(
            f"{place}: {what}. The dataset is damaged: run `ich-prep verify` to list every problem, then restore it, or "
            "build again with --overwrite."
        )


def stored_form(path: Place, chunk: int, *, chunks: int, codec: Codec) -> tuple[int, int | None] | None:
    """Return the bytes of the decoded slice in one chunk of a shard, and of one of its items if the chunk says so.

    None if the shard or the chunk is not there, or damaged: reading it will say so.
    """
    try:
        body = size_at(path) - index_bytes(chunks)
        if body < 0:
            return None
        index = parse_index(read_range(path, body, index_bytes(chunks)), chunks=chunks, body=body)
        offset, length = index[chunk].tolist()
        if offset == MISSING:
            return None
        head = np.frombuffer(read_range(path, offset, min(length - CRC_BYTES, FRAME_HEADER_BYTES)), np.uint8)
    except (OSError, CorruptionError):
        return None
    return codec.decoded_form(head, payload_bytes=length - CRC_BYTES)


def require_out(out: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise ``ValueError`` if ``out`` is not a writeable, C-contiguous array of ``shape`` and ``dtype``."""
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"Expected out to be writeable, C-contiguous, of shape {shape} and {dtype}; got {out.dtype} of shape "
            f"{out.shape} with strides {out.strides}."
        )


def output_array(out: NDArray[Any] | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return ``out``, or a new array if it is None; raises as ``require_out``."""
    if out is None:
        return np.empty(shape, dtype)
    require_out(out, shape, dtype)
    return out


def max_open_files() -> int:
    """Return how many shards a reader may keep open: half of the process's limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, limit // 2))
