"""The bytes of one Zarr v3 shard (codec ``sharding_indexed``): writing, index, chunks.

A shard is its chunks in order, then the index: the offset and length of each chunk, uint64 little endian, 2^64-1 twice
for a missing chunk, and the CRC-32C of these. A chunk is one slice: the codec's payload, then its CRC-32C.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from ich_prep.dataset.native import crc32c, mismatch
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.codecs import Codec, Encode

CRC_BYTES = 4
MISSING = np.iinfo(np.uint64).max

_pack_crc = struct.Struct("<I").pack
_unpack_crc = struct.Struct("<I").unpack


class Sink(Protocol):
    """Where a shard's bytes go: an unbuffered file, or a buffer."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of ``data``; return how many bytes."""


@dataclass(frozen=True, eq=False)  # arrays cannot be compared with ==
class WrittenShard:
    """What ``ShardWriter.finish`` wrote.

    ``size`` is the shard's length in bytes, ``fingerprint`` as the function of that name returns it. ``chunk_crc32c``,
    uint32 (chunks,), is the checksum stored after each chunk's payload, 0 for a missing one; ``missing``, bool
    (chunks,), says which are.
    """

    size: int
    fingerprint: str
    chunk_crc32c: NDArray[np.uint32]
    missing: NDArray[np.bool_]


def index_bytes(chunks: int) -> int:
    """Return the length in bytes of the index of a shard of that many chunks."""
    return 16 * chunks + CRC_BYTES


@dataclass
class ShardWriter:
    """Writes the ``chunks`` of one shard to ``sink``, in order, then the index."""

    sink: Sink
    chunks: int
    codec: Codec
    _index: list[tuple[int, int]] = field(default_factory=list)
    _checksums: list[int] = field(default_factory=list)
    _offset: int = 0
    _hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    _encode: Encode | None = None
    _encodes: tuple[tuple[int, ...], np.dtype[Any]] | None = None

    def append(self, pixels: NDArray[np.uint8] | NDArray[np.int16]) -> None:
        """Write the next chunk: one slice, (channel, y, x), C-contiguous."""
        payload = self._payload(pixels)
        checksum = crc32c(payload)
        stored = _pack_crc(checksum)
        _write_all(self.sink, payload.data)
        _write_all(self.sink, memoryview(stored))
        self._hash.update(stored)
        self._checksums.append(checksum)
        self._index.append((self._offset, len(payload) + CRC_BYTES))
        self._offset += len(payload) + CRC_BYTES

    def skip(self) -> None:
        """Leave the next chunk missing; a Zarr reader gives the fill value for it."""
        self._checksums.append(0)
        self._index.append((MISSING, MISSING))

    def finish(self) -> WrittenShard:
        """Write the index; return the shard's length, fingerprint and checksums."""
        while len(self._index) < self.chunks:
            self.skip()
        index = np.array(self._index, "<u8")
        entries = index.tobytes()
        tail = entries + _pack_crc(crc32c(entries))
        _write_all(self.sink, memoryview(tail))
        self._hash.update(tail)
        return WrittenShard(
            size=self._offset + len(tail),
            fingerprint=self._hash.hexdigest(),
            chunk_crc32c=np.array(self._checksums, np.uint32),
            missing=index[:, 0] == MISSING,
        )

    def _payload(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the payload of a chunk, uint8 (n,), valid until the next call."""
        form = (pixels.shape, pixels.dtype)
        if self._encode is None or self._encodes != form:
            self._encode, self._encodes = self.codec.encoder(*form), form
        return self._encode(pixels)


def _write_all(sink: Sink, data: memoryview) -> None:
    while data:
        data = data[sink.write(data) or 0 :]


def fingerprint(checksums: NDArray[np.uint32], index: bytes) -> str:
    """Return the XXH3-64 of the CRC-32C of each chunk that is not missing, then the index bytes: a shard's identity."""
    return xxhash.xxh3_64(checksums.astype("<u4").tobytes() + index).hexdigest()


def parse_index(data: bytes, *, chunks: int, body: int) -> NDArray[np.uint64]:
    """Return the index as uint64 (chunks, 2) of offset and length; ``body`` is the shard's length without its index.

    Raises ``CorruptionError`` for a checksum mismatch, and for an entry that does not lie within the shard.
    """
    if len(data) != index_bytes(chunks):
        raise CorruptionError(f"expected an index of {index_bytes(chunks)} bytes, found {len(data)}")
    entries = data[:-CRC_BYTES]
    stored, computed = _unpack_crc(data[-CRC_BYTES:])[0], crc32c(entries)
    if stored != computed:
        raise CorruptionError(f"index {mismatch(stored, computed)}")
    index = np.frombuffer(entries, "<u8").reshape(chunks, 2)
    missing = index[:, 0] == MISSING
    if (index[missing, 1] != MISSING).any():
        raise CorruptionError("the index has a length for a missing chunk")
    offsets, lengths = index[~missing].T
    if (offsets > body).any() or (lengths > body - offsets).any() or (lengths <= CRC_BYTES).any():
        raise CorruptionError("the index points outside the shard")
    return index


def decode_chunk(data: NDArray[np.uint8], *, codec: Codec, out: NDArray[np.uint8]) -> int:
    """Decode one chunk, ``data`` (its bytes, checksum included), into ``out``: the bytes of one slice, uint8 (n,).

    Returns the checksum, of which the shard's fingerprint is made.
    Raises ``CorruptionError`` for a checksum mismatch, and for a payload that is invalid or of another length.
    """
    payload = data[:-CRC_BYTES]
    stored, computed = _unpack_crc(data[-CRC_BYTES:].data)[0], crc32c(payload)
    if stored != computed:
        raise CorruptionError(mismatch(stored, computed))
    codec.decode(payload, out=out)
    return computed
