"""The bytes of one Zarr v3 shard (codec ``sharding_indexed``): encode, index, decode; nothing else.

A shard is its chunks in order, then the index: for each chunk its offset and length, uint64 little endian, 2^64-1 twice
for a chunk that is not there, and the CRC32C of these. A chunk is one slice: blosc, then its CRC32C.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import google_crc32c
import numpy as np
import xxhash
from numcodecs import blosc

from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

CODECS = ("lz4", "zstd", "none")
CRC_BYTES = 4
BLOSC_LEVELS = {"lz4": 5, "zstd": 1}  # docs/benchmarks.md: zstd 5 encodes six times as long for a twentieth less
MOST_BLOCK = 1 << 18
FRAME_HEADER = 16  # version, of the compressor, flags, item size; then int32: inflated size, block size, frame size
FRAME_COPIED = 2  # in the flags: not compressed
MISSING = np.iinfo(np.uint64).max

_crc_bytes = struct.Struct("<I").pack
_crc_value = struct.Struct("<I").unpack


class Sink(Protocol):
    """Where a shard's bytes go: an unbuffered file, or a buffer."""

    def write(self, data: memoryview, /) -> int | None:
        """Take some of ``data``; return how many bytes."""


def block_bytes(slice_bytes: int) -> int:
    """Return the size of the blocks of a frame: the largest part of a slice, an even one, that blosc takes for lz4."""
    parts = -(-slice_bytes // MOST_BLOCK)
    while slice_bytes % parts:
        parts += 1
    return slice_bytes // parts


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

    def __post_init__(self) -> None:
        blosc.use_threads = False  # one task, one core; and equal bytes whatever the number of cores

    def append(self, pixels: NDArray[np.uint8] | NDArray[np.int16]) -> None:
        """Write the next chunk: one slice, (channel, y, x), C-contiguous."""
        if self.codec == "none":
            payload = pixels.tobytes()
        else:
            payload = blosc.compress(
                pixels, self.codec.encode(), BLOSC_LEVELS[self.codec], blosc.SHUFFLE, block_bytes(pixels.nbytes)
            )
        checksum = _crc_bytes(google_crc32c.value(payload))
        _write_all(self.sink, payload)
        _write_all(self.sink, checksum)
        self._seen.update(checksum)
        self._index.append((self._offset, len(payload) + CRC_BYTES))
        self._offset += len(payload) + CRC_BYTES

    def skip(self) -> None:
        """Leave the next chunk out: a hole, which every Zarr reader takes for the fill value."""
        self._index.append((MISSING, MISSING))

    def finish(self) -> tuple[int, str]:
        """Write the index; return the shard's length in bytes and its fingerprint (see ``fingerprint``)."""
        while len(self._index) < self.chunks:
            self.skip()
        entries = np.array(self._index, "<u8").tobytes()
        index = entries + _crc_bytes(google_crc32c.value(entries))
        _write_all(self.sink, index)
        self._seen.update(index)
        return self._offset + len(index), self._seen.hexdigest()


def _write_all(sink: Sink, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[sink.write(view) or 0 :]


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
    if google_crc32c.value(entries) != _crc_value(data[-CRC_BYTES:])[0]:
        raise CorruptionError("the checksum of its index does not fit")
    index = np.frombuffer(entries, "<u8").reshape(chunks, 2)
    offsets, lengths = index[index[:, 0] != MISSING].T
    if (offsets > body).any() or (lengths > body - offsets).any() or (lengths <= CRC_BYTES).any():
        raise CorruptionError("its index points outside of it")
    return index


def fits(payload: NDArray[np.uint8], checksum: Buffer) -> bool:
    """Return whether ``checksum``, four bytes, is the CRC32C of ``payload``."""
    return google_crc32c.value(payload) == _crc_value(checksum)[0]  # type: ignore[no-any-return]


def decode_chunk(data: NDArray[np.uint8], *, codec: str, out: NDArray[np.uint8]) -> None:
    """Decode one chunk, ``data`` (its bytes, checksum included), into ``out``: the bytes of one slice, uint8 (n,).

    Raises ``CorruptionError`` where the checksum or the length does not fit.
    """
    payload = data[:-CRC_BYTES]
    if not fits(payload, data[-CRC_BYTES:].data):
        raise CorruptionError("its checksum does not fit")
    # Bytes 4 to 8 of a blosc frame say how long it is inflated: a shorter one would leave a part of ``out`` as it was.
    size = payload.nbytes if codec == "none" else int.from_bytes(payload[4:8].data, "little")
    if size != out.nbytes:
        raise CorruptionError(f"expected {out.nbytes} bytes, found {size}")
    if codec == "none":
        np.copyto(out, payload)
        return
    try:
        blosc.decompress(payload, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptionError(f"blosc: {error}") from None


# --- many chunks as one frame ----------------------------------------------------------------------------------------
#
# A blosc frame is a header of 16 bytes, the offset of each of its blocks (int32, from the frame's beginning), and the
# blocks, in any order and with anything between them. Frames of one slice each, whose blocks are of one size, become
# one frame of many slices by a header and a list of offsets written before them, with no block moved.


def frame_room(chunks: int, slice_bytes: int) -> int:
    """Return how many bytes before the first chunk ``decode_together`` needs free."""
    return FRAME_HEADER + 4 * chunks * (slice_bytes // block_bytes(slice_bytes))


def decode_together(
    data: NDArray[np.uint8], places: NDArray[np.int64], order: NDArray[np.intp], *, out: NDArray[np.uint8]
) -> bool:
    """Decode chunk ``order[i]`` into line i of ``out``, uint8 (n, slice_bytes), all in one call.

    Chunk k is ``data[places[k]:places[k + 1]]``; the ``frame_room`` before the first one is written to. Checksums are
    not looked at. Returns False, with ``out`` undefined, where the frames do not go together: blosc left one
    uncompressed, or they are no frames of one slice.
    """
    slice_bytes = out.shape[1]
    starts = places[:-1]
    if (np.diff(places) < FRAME_HEADER + CRC_BYTES).any():
        return False
    first = data[starts[0] : starts[0] + FRAME_HEADER].view("<i4")
    _, inflated, block, _ = first.tolist()
    if inflated != slice_bytes or block < 1 or slice_bytes % block:
        return False
    count = slice_bytes // block
    length = FRAME_HEADER + 4 * count
    if (np.diff(places) < length + CRC_BYTES).any() or FRAME_HEADER + 4 * count * len(order) > starts[0]:
        return False
    heads = data[starts[:, np.newaxis] + np.arange(length)].view("<i4")
    if (heads[:, :3] != first[:3]).any() or first.view(np.uint8)[2] & FRAME_COPIED:
        return False
    blocks = (heads[:, 4:] + starts[:, np.newaxis]).astype("<i4")[order]
    end = int(places[-1])
    data[:FRAME_HEADER].view("<i4")[:] = first[0], out.nbytes, block, end
    data[FRAME_HEADER : FRAME_HEADER + blocks.nbytes] = blocks.reshape(-1).view(np.uint8)
    try:
        blosc.decompress(data[:end], out)
    except (RuntimeError, ValueError):
        return False
    return True
