"""The directory of a zip archive -> arrays and names, for a million members in seconds (PKWARE APPNOTE.TXT, section 4).

The directory is read in one piece and not trusted: any inconsistency is an ``ArchiveError``.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One record of the directory, 4.3.12; name, extra field and comment follow it.
RECORD: Final = np.dtype(
    [
        ("signature", "<u4"),
        ("made_by", "u1"),
        ("made_on", "u1"),
        ("needs", "<u2"),
        ("flags", "<u2"),
        ("method", "<u2"),
        ("time", "<u2"),
        ("date", "<u2"),
        ("crc32", "<u4"),
        ("compressed_size", "<u4"),
        ("size", "<u4"),
        ("name_length", "<u2"),
        ("extra_length", "<u2"),
        ("comment_length", "<u2"),
        ("disk", "<u2"),
        ("internal", "<u2"),
        ("external", "<u4"),
        ("offset", "<u4"),
    ]
)
_SIGNATURE: Final = 0x02014B50
_LENGTHS: Final = struct.Struct("<HHH")
_END: Final = struct.Struct("<4sHHHHIIH")  # 4.3.16
_END64_LOCATOR: Final = struct.Struct("<4sIQI")  # 4.3.15
_END64: Final = struct.Struct("<4sQHHIIQQQQ")  # 4.3.14
_ZIP64: Final = 0x0001
_ZIP64_OFFSET: Final = np.dtype([("id", "<u2"), ("length", "<u2"), ("offset", "<u8")])
_LARGEST: Final = (1 << 62) - 1
_LONGEST_COMMENT: Final = 0xFFFF
_IN_ZIP64: Final = 0xFFFFFFFF
_ROWS_PER_GATHER: Final = 1 << 16
LARGEST_DIRECTORY: Final = 1 << 30


class ArchiveError(Exception):
    """A file that is not a complete zip archive; the text says why."""


@dataclass(frozen=True)
class Directory:
    """The members of an archive in the order of its directory, one per element of each array and of ``names``.

    ``records`` are of ``RECORD``. ``sizes``, ``compressed_sizes`` and ``offsets`` (of the local headers, in bytes from the
    start of the file) are from Zip64 fields where the record has none. ``names`` (binary) are as stored.
    ``start`` is the offset of the directory, ``data`` its bytes, in which the extra fields start at ``extra_starts``.
    """

    records: NDArray[Any]
    sizes: NDArray[np.int64]
    compressed_sizes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    names: pa.Array
    start: int
    data: bytes
    extra_starts: NDArray[np.int64]

    def extra(self, index: int, header_id: int) -> bytes | None:
        """Return the field ``header_id`` of a member's extra field, None if there is none."""
        start = int(self.extra_starts[index])
        return extra_field(self.data[start : start + int(self.records["extra_length"][index])], header_id)


def read_directory(descriptor: int) -> Directory:
    """Return the directory of the open archive; raises ``ArchiveError`` and ``OSError``."""
    start, length, shift, count, is_zip64 = _find(descriptor)
    data = os.pread(descriptor, length, start)
    record_starts = _record_starts(data)
    if len(record_starts) != count if is_zip64 else len(record_starts) % 0x10000 != count:
        raise ArchiveError(f"its directory lists {len(record_starts):,} members, and its end record says {count:,}")
    records = _gather(data, record_starts)
    if not (records["signature"] == _SIGNATURE).all():
        raise ArchiveError("its directory is damaged")
    name_starts = record_starts + RECORD.itemsize
    extra_starts = name_starts + records["name_length"]
    names = [data[first:end] for first, end in zip(name_starts.tolist(), extra_starts.tolist(), strict=True)]
    directory = Directory(
        records=records,
        sizes=records["size"].astype(np.int64),
        compressed_sizes=records["compressed_size"].astype(np.int64),
        offsets=records["offset"].astype(np.int64),
        names=pa.array(names, pa.binary()),
        start=start,
        data=data,
        extra_starts=extra_starts,
    )
    _fill_zip64(directory)
    directory.offsets[:] += shift
    return directory


def _find(descriptor: int) -> tuple[int, int, int, int, bool]:
    """Return the directory's start and length, what to add to offsets, the number of members, and whether it is Zip64.

    Offsets count from the first byte of the archive, which other data may precede, as in self-extracting archives.
    """
    file_size = os.fstat(descriptor).st_size
    tail_start = max(0, file_size - _END.size - _LONGEST_COMMENT)
    tail = os.pread(descriptor, file_size - tail_start, tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise ArchiveError("it has no end record: it is truncated, or not a zip archive")
    _, disk, directory_disk, _, count, length, offset, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = os.pread(descriptor, _END64_LOCATOR.size, max(0, end - _END64_LOCATOR.size))
    is_zip64 = locator.startswith(b"PK\x06\x07")
    if is_zip64:
        _, _, end64, disks = _END64_LOCATOR.unpack(locator)
        record = os.pread(descriptor, _END64.size, min(end64, file_size))
        if not record.startswith(b"PK\x06\x06") and end >= _END64_LOCATOR.size + _END64.size:
            end64 = end - _END64_LOCATOR.size - _END64.size  # if it has no extensible data sector
            record = os.pread(descriptor, _END64.size, end64)
        if len(record) < _END64.size or not record.startswith(b"PK\x06\x06"):
            raise ArchiveError("its Zip64 end record is not where it should be")
        _, _, _, _, disk, directory_disk, _, count, length, offset = _END64.unpack(record)
        end = end64
        disk = disk if disks <= 1 else 1
    if disk or directory_disk:
        raise ArchiveError("it is one part of a split archive; expected one whole file")
    shift = end - length - offset
    if shift < 0 or length > LARGEST_DIRECTORY:
        raise ArchiveError("its directory is not where its end record says")
    return offset + shift, length, shift, count, is_zip64


def _record_starts(data: bytes) -> NDArray[np.int64]:
    """Return the offsets of the records, which follow each other without gaps."""
    starts: list[int] = []
    position, end, lengths = 0, len(data), _LENGTHS.unpack_from
    lengths_at, fixed = RECORD.fields["name_length"][1], RECORD.itemsize  # type: ignore[index]
    while position < end:
        if position + fixed > end:
            raise ArchiveError("its directory ends within a record")
        starts.append(position)
        name, extra, comment = lengths(data, position + lengths_at)
        position += fixed + name + extra + comment
    if position != end:
        raise ArchiveError("its directory ends within a record")
    return np.array(starts, np.int64)


def _gather(data: bytes, starts: NDArray[np.int64], kind: np.dtype[Any] = RECORD) -> NDArray[Any]:
    """Return the records of ``kind`` at the offsets ``starts``."""
    records = np.empty(len(starts), kind)
    raw, rows = np.frombuffer(data, np.uint8), records.view(np.uint8).reshape(len(starts), kind.itemsize)
    for first in range(0, len(starts), _ROWS_PER_GATHER):
        some = starts[first : first + _ROWS_PER_GATHER]
        rows[first : first + len(some)] = raw[some[:, np.newaxis] + np.arange(kind.itemsize)]
    return records


def _fill_zip64(directory: Directory) -> None:
    """Replace sizes and offsets that do not fit in 32 bits with those of the Zip64 extra field (4.5.3).

    In most archives only the offset is missing, and the field comes first: these members are done at once.
    """
    columns = (directory.sizes, directory.compressed_sizes, directory.offsets)
    lacking = np.stack([column == _IN_ZIP64 for column in columns])
    only_offset = np.flatnonzero(lacking[2] & ~lacking[0] & ~lacking[1] & (directory.records["extra_length"] >= 12))
    fields = _gather(directory.data, directory.extra_starts[only_offset], _ZIP64_OFFSET)
    usual = (fields["id"] == _ZIP64) & (fields["length"] >= 8)
    directory.offsets[only_offset[usual]] = fields["offset"][usual].astype(np.int64)
    lacking[:, only_offset[usual]] = False
    for index in np.flatnonzero(lacking.any(axis=0)).tolist():
        field = directory.extra(index, _ZIP64)
        missing_columns = [
            column for column, missing in zip(columns, lacking[:, index].tolist(), strict=True) if missing
        ]
        if field is None or len(field) < 8 * len(missing_columns):
            raise ArchiveError("a member of 4 GiB, or beyond them, has no Zip64 field")
        for i, column in enumerate(missing_columns):
            column[index] = min(_LARGEST, int.from_bytes(field[8 * i : 8 * i + 8], "little"))
    if any((column < 0).any() or (column >= _LARGEST).any() for column in columns):
        raise ArchiveError("a member has an impossible size or offset")


def extra_field(extra: bytes, header_id: int) -> bytes | None:
    """Return the field ``header_id`` of an extra field (4.5.1), None if there is none."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = extra[position] | extra[position + 1] << 8, extra[position + 2] | extra[position + 3] << 8
        if kind == header_id:
            return extra[position + 4 : position + 4 + length]
        position += 4 + length
    return None
