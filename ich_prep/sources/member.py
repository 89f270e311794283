"""A file inside an archive: stored or deflated in a zip archive, or the content of a gzip file."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ich_prep.errors import Reason, SliceError
from ich_prep.files import READ_FLAGS, open_regular
from ich_prep.sources import inflate
from ich_prep.sources.inflate import crc32, inflate_first, inflate_whole
from ich_prep.sources.source import fill

if TYPE_CHECKING:
    from typing_extensions import Buffer

STORED: Final = 0
DEFLATED: Final = 8
GZIPPED: Final = -1  # a whole gzip file; not a method of zip

# The most to read of one file only for its checksum: more than a CT slice of 4096 x 4096 pixels of 16 bits.
LARGEST_MEMBER: Final = 64 * 1024 * 1024
# Deflating incompressible data adds a few bytes; if a directory claims much more, it is wrong.
LOOSE_BYTES: Final = 64 * 1024
CHUNK: Final = 16 * 1024
EMPTY_GZIP: Final = 512  # a gzip file of nothing is not longer, whatever name and comment it has
MAX_DEFLATE_RATIO: Final = 1032  # of deflate itself: 258 bytes in two bits
LOCAL_HEADER_BYTES: Final = 30
_LONGEST_LOCAL_HEADER: Final = 1024  # in practice: prefetched together with the data
_LOCAL_HEADER: Final = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra
# A Member as bytes, and as a record of NumPy for many at once.
_KEY: Final = struct.Struct("<QQQIh")
KEY_RECORD: Final = np.dtype(
    [("offset", "<u8"), ("compressed_size", "<u8"), ("size", "<u8"), ("crc32", "<u4"), ("method", "<i2")]
)


@dataclass(frozen=True, slots=True)
class Member:
    """The location of a member in its archive, according to the archive's directory.

    ``offset`` is that of its local header (0 for a gzip file), sizes are in bytes. ``crc32`` is that of the uncompressed
    bytes; 0 for a gzip file, which contains its own.
    """

    offset: int
    compressed_size: int
    size: int
    crc32: int
    method: int

    def key(self) -> bytes:
        """Return the member as bytes."""
        return _KEY.pack(self.offset, self.compressed_size, self.size, self.crc32, self.method)

    @classmethod
    def from_key(cls, key: bytes) -> Member:
        """Return the member whose ``key`` this is."""
        return cls(*_KEY.unpack(key))


def gzip_member(path: bytes) -> Member | None:
    """Return the gzip file at ``path`` as a member; its size is in its last four bytes (RFC 1952, ISIZE).

    None where that size is impossible: the file is cut off, or has something after its first member. Raises ``OSError``.
    """
    descriptor = open_regular(path)
    try:
        length = os.fstat(descriptor).st_size
        size = int.from_bytes(os.pread(descriptor, 4, max(0, length - 4)), "little")
    finally:
        os.close(descriptor)
    possible = size <= MAX_DEFLATE_RATIO * length and (size > 0 or length <= EMPTY_GZIP)
    return Member(0, length, size, 0, GZIPPED) if possible else None


def read_member(path: bytes, member: Member, buffers: Sequence[Buffer], offset: int, *, verify: bool) -> int:
    """Fill ``buffers`` from byte ``offset`` of a member of the archive at ``path``; see ``Source.read_into``."""
    views = _clipped(buffers, max(0, member.size - offset))
    descriptor = open_regular(path)
    try:
        start = 0 if member.method == GZIPPED else _data_offset(descriptor, member)
        if member.method == STORED:
            return _read_stored(descriptor, start, member, views, offset, verify=verify)
        wbits = inflate.GZIP if member.method == GZIPPED else inflate.RAW
        end = offset + sum(map(len, views))
        if verify:
            _check_rest(member, end)
            data = _inflated(descriptor, start, member, wbits)
        else:
            data = inflate_first(_chunks(descriptor, start, member.compressed_size), end, wbits=wbits)
    finally:
        os.close(descriptor)
    return fill(memoryview(data)[offset:end], views)


def prefetch_member(path: bytes, member: Member, length: int) -> None:
    """Ask the kernel for the first ``length`` bytes of a member, or all of it if that is 0; raises ``OSError``."""
    descriptor = os.open(path, READ_FLAGS)
    try:
        count = min(length or member.compressed_size, member.compressed_size) + _LONGEST_LOCAL_HEADER
        os.posix_fadvise(descriptor, member.offset, count, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _data_offset(descriptor: int, member: Member) -> int:
    """Return the offset of a member's data. The name and extra field in its local header may differ from the directory's."""
    data = os.pread(descriptor, LOCAL_HEADER_BYTES, member.offset)
    if len(data) < LOCAL_HEADER_BYTES or not data.startswith(b"PK\x03\x04"):
        raise SliceError(
            Reason.BAD_ARCHIVE, f"expected a member at byte {member.offset:,} of the archive, found other bytes"
        )
    _, _, method, name, extra = _LOCAL_HEADER.unpack(data)
    if method != member.method:
        raise SliceError(
            Reason.BAD_ARCHIVE, f"expected compression method {member.method}, the member's own header says {method}"
        )
    return member.offset + LOCAL_HEADER_BYTES + int(name) + int(extra)


def _read_stored(
    descriptor: int, start: int, member: Member, views: list[memoryview], offset: int, *, verify: bool
) -> int:
    if not verify:
        return os.preadv(descriptor, views, start + offset)
    rest = member.size - sum(map(len, views))
    _check_rest(member, member.size - rest)
    whole = [*views, memoryview(bytearray(rest))] if rest else views
    got = os.preadv(descriptor, whole, start)
    if got != member.size:
        raise SliceError(Reason.BAD_ARCHIVE, f"expected {member.size:,} bytes, the archive ends after {got:,}")
    _check_crc32(member, crc32(whole))
    return got - rest


def _check_rest(member: Member, end: int) -> None:
    """Raise ``SliceError`` if too much has to be read after byte ``end`` only for the checksum."""
    if member.size - end > LARGEST_MEMBER:
        detail = f"expected at most {LARGEST_MEMBER:,} bytes more than are read, found {member.size - end:,}"
        raise SliceError(Reason.TOO_LARGE, detail)


def _inflated(descriptor: int, start: int, member: Member, wbits: int) -> bytes:
    """Return all bytes of a compressed member, verified."""
    if member.compressed_size > 2 * member.size + LOOSE_BYTES:
        detail = f"{member.compressed_size:,} deflated bytes are too many for {member.size:,}"
        raise SliceError(Reason.BAD_ARCHIVE, detail)
    data = inflate_whole(os.pread(descriptor, member.compressed_size, start), member.size, wbits=wbits)
    if member.method == DEFLATED:
        _check_crc32(member, crc32([data]))
    return data


def _check_crc32(member: Member, computed: int) -> None:
    if computed != member.crc32:
        detail = f"CRC-32 mismatch: the archive says {member.crc32:08x}, computed {computed:08x}"
        raise SliceError(Reason.BAD_ARCHIVE, detail)


def _chunks(descriptor: int, start: int, length: int) -> Iterator[bytes]:
    end = start + length
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk:
            return
        yield chunk
        start += len(chunk)


def _clipped(buffers: Sequence[Buffer], length: int) -> list[memoryview]:
    """Return views of the part of ``buffers`` that ``length`` bytes fill."""
    views = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")[:length]
        length -= len(view)
        views.append(view)
    return views
