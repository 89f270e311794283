"""The bytes of one Zarr v3 shard (codec ``sharding_indexed``): encode, index, decode; nothing else.

A shard is its chunks in order, then the index: for each chunk its offset and length, uint64 little endian, 2^64-1 twice
for a chunk that is not there, and the CRC32C of these. A chunk is one slice: blosc, then its CRC32C.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash
from numcodecs import blosc

from ich_prep.compiled import FrameEncoder, crc32c, decode_frame
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODECS = ("lz4", "zstd", "none")
CRC_BYTES = 4
# What the metadata says. It means nothing to a reader, nor to our lz4; for zstd see docs/benchmarks.md: level 5 encodes six
# times as long for a twentieth less.
BLOSC_LEVELS = {"lz4": 5, "zstd": 1}
MOST_BLOCK = 1 << 18  # stays in a core's own cache
MISSING = np.iinfo(np.uint64).max

_crc_bytes = struct.Struct("<I").pack
_crc_value = struct.Struct("<I").unpack


class Sink(Protocol):
    """Where a shard's bytes go: an unbuffered file, or a buffer."""

    def write(self, data: memoryview, /) -> int | None:
        """Take some of ``data``; return how many bytes."""


def block_bytes(shape: tuple[int, ...], item_bytes: int) -> int:
    """Return the size of the blocks of a slice's frame: whole rows, in as few parts as there may be, about even ones."""
    row, rows = shape[-1] * item_bytes, int(np.prod(shape[:-1]))
    parts = -(-rows // max(1, MOST_BLOCK // row))
    return -(-rows // parts) * row


def index_bytes(chunks: int) -> int:
    """Return the length in bytes of the index of a shard of that many chunks."""
    return 16 * chunks + CRC_BYTES


@dataclass
class ShardWriter:
    """Writes the ``chunks`` of one shard to ``sink``, in order, then the index; ``codec`` is a word of ``CODECS``."""

    sink: Sink
    chunks: int
    codec: str
    _index: list[tuple[int, int]] = field(default_factory=list)
    _offset: int = 0
    _seen: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)
    _encoder: FrameEncoder | None = None

    def append(self, pixels: NDArray[np.uint8] | NDArray[np.int16]) -> int:
        """Write the next chunk: one slice, (channel, y, x), C-contiguous; return the CRC-32C that is stored behind it."""
        payload = self._encoded(pixels)
        value = crc32c(payload)
        checksum = _crc_bytes(value)
        _write_all(self.sink, payload.data)
        _write_all(self.sink, memoryview(checksum))
        self._seen.update(checksum)
        self._index.append((self._offset, len(payload) + CRC_BYTES))
        self._offset += len(payload) + CRC_BYTES
        return value

    def skip(self) -> None:
        """Leave the next chunk out: a hole, which every Zarr reader takes for the fill value."""
        self._index.append((MISSING, MISSING))

    def finish(self) -> tuple[int, str]:
        """Write the index; return the shard's length in bytes and its fingerprint (see ``fingerprint``)."""
        while len(self._index) < self.chunks:
            self.skip()
        entries = np.array(self._index, "<u8").tobytes()
        index = entries + _crc_bytes(crc32c(entries))
        _write_all(self.sink, memoryview(index))
        self._seen.update(index)
        return self._offset + len(index), self._seen.hexdigest()

    def _encoded(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the payload of a chunk, uint8 (n,), valid until the next call."""
        if self.codec == "none":
            return pixels.reshape(-1).view(np.uint8)
        blocks = block_bytes(pixels.shape, pixels.itemsize)
        if self.codec == "zstd":
            blosc.use_threads = False  # one task, one core; and equal bytes whatever the number of cores
            return np.frombuffer(blosc.compress(pixels, b"zstd", BLOSC_LEVELS["zstd"], blosc.SHUFFLE, blocks), np.uint8)
        if self._encoder is None or not self._encoder.takes(pixels):
            self._encoder = FrameEncoder(pixels.shape, pixels.dtype, blocks)
        return self._encoder.encode(pixels)


def _write_all(sink: Sink, data: memoryview) -> None:
    while data:
        data = data[sink.write(data) or 0 :]


def fingerprint(checksums: NDArray[np.uint32], index: bytes) -> str:
    """Return what tells one shard from another: XXH3-64 of the CRC32C of each chunk there is, then the index bytes."""
    return xxhash.xxh3_64(checksums.astype("<u4").tobytes() + index).hexdigest()


def parse_index(data: bytes, *, chunks: int, body: int) -> NDArray[np.uint64]:
    """Return the index as uint64 (chunks, 2) of offset and length; ``body`` is the shard's length without its index.

    Raises ``CorruptionError`` where the checksum does not fit or an entry does not point at a chunk within the shard.
    """
    if len(data) != index_bytes(chunks):
        raise CorruptionError(f"expected {index_bytes(chunks)} bytes of index, found {len(data)}")
    entries = data[:-CRC_BYTES]
    if crc32c(entries) != _crc_value(data[-CRC_BYTES:])[0]:
        raise CorruptionError("the checksum of its index does not fit")
    index = np.frombuffer(entries, "<u8").reshape(chunks, 2)
    offsets, lengths = index[index[:, 0] != MISSING].T
    if (offsets > body).any() or (lengths > body - offsets).any() or (lengths <= CRC_BYTES).any():
        raise CorruptionError("its index points outside of it")
    return index


def decode_chunk(data: NDArray[np.uint8], *, codec: str, out: NDArray[np.uint8]) -> None:
    """Decode one chunk, ``data`` (its bytes, checksum included), into ``out``: the bytes of one slice, uint8 (n,).

    Raises ``CorruptionError`` where the checksum or the length does not fit.
    """
    payload = data[:-CRC_BYTES]
    if crc32c(payload) != _crc_value(data[-CRC_BYTES:].data)[0]:
        raise CorruptionError("its checksum does not fit")
    decode_payload(payload, codec=codec, out=out)


def decode_payload(payload: NDArray[np.uint8], *, codec: str, out: NDArray[np.uint8]) -> None:
    """Decode a chunk without its checksum, as ``decode_chunk`` does; raises ``CorruptionError`` where it does not fit."""
    # Bytes 4 to 8 of a blosc frame say how long it is inflated: a shorter one would leave a part of ``out`` as it was.
    size = payload.nbytes if codec == "none" else int.from_bytes(payload[4:8].data, "little")
    if size != out.nbytes:
        raise CorruptionError(f"expected {out.nbytes} bytes, found {size}")
    if codec == "none":
        np.copyto(out, payload)
    elif codec == "lz4":
        if not decode_frame(payload, out):
            raise CorruptionError("it is no blosc frame of lz4")
    else:
        blosc.use_threads = False  # many threads decode at once, each a slice of its own
        try:
            blosc.decompress(payload, out)
        except (RuntimeError, ValueError) as error:
            raise CorruptionError(f"blosc: {error}") from None
