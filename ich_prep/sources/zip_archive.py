"""Zip archives: their members with paths, and the reason for each that cannot be read."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import Reason, SourceError
from ich_prep.files import opened
from ich_prep.sources.member import (
    DEFLATED,
    KEY_RECORD,
    LOCAL_HEADER_BYTES,
    STORED,
    Member,
    prefetch_member,
    read_member,
)
from ich_prep.sources.source import LISTING_SCHEMA, Entries, Listing, TableFile, display_path, is_utf8, with_prefix
from ich_prep.sources.zip_directory import ArchiveError, Directory, read_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from ich_prep.sources.source import Source

_ENCRYPTED: Final = 1 << 0 | 1 << 6 | 1 << 13  # itself, strongly, or its directory (APPNOTE 4.4.4)
_UTF8_NAME: Final = 1 << 11
_UNIX, _WINDOWS = 3, (0, 10, 14)  # hosts of APPNOTE 4.4.2: FAT, NTFS, VFAT
_UNICODE_PATH: Final = 0x7075
# Names to check further: not ASCII, or not a plain relative path.
_UNUSUAL: Final = r"[^\x20-\x5b\x5d-\x7e]|^/|//|(?:^|/)\.\.?(?:/|$)|^[A-Za-z]:|^$"
_LEAVES: Final = re.compile(rb"^/|(?:^|/)\.\.(?:/|$)|^[A-Za-z]:|\0")


@dataclass(frozen=True)
class ZipSource:
    """The members of one archive. A key is a ``Member``'s."""

    path: Path

    @property
    def name(self) -> str:
        """The archive's name without ``.zip``."""
        return self.path.stem

    def list(self) -> Listing:
        """Return the members by their paths in the archive; raises ``SourceError`` if it is broken or empty."""
        entries = Entries()
        try:
            add_members(entries, self, self.path, prefix=b"", key_prefix=b"")
        except ArchiveError as error:
            raise SourceError(
                f"Cannot read the archive {self.path}: {error}. Fetch it again, or unpack it and give --src the folder."
            ) from None
        except OSError as error:
            raise SourceError(f"Cannot read the archive {self.path}: {error.strerror}.") from None
        listing = entries.listing(self.name)
        if not len(listing.files):
            raise SourceError(f"Expected DICOM files in {self.path}; found none.")
        return listing

    def size(self, key: bytes) -> int:
        """Return the uncompressed size according to the archive's directory."""
        return Member.from_key(key).size

    def read_into(self, key: bytes, buffers: Sequence[Buffer], offset: int = 0, *, verify: bool = False) -> int:
        """Fill ``buffers``; see ``Source.read_into``."""
        return read_member(os.fsencode(self.path), Member.from_key(key), buffers, offset, verify=verify)

    def prefetch(self, key: bytes, length: int) -> None:
        """Ask the kernel for a member."""
        with contextlib.suppress(OSError):
            prefetch_member(os.fsencode(self.path), Member.from_key(key), length)


def add_members(entries: Entries, source: Source, archive: Path, *, prefix: bytes, key_prefix: bytes) -> None:
    """Add the members of ``archive`` to ``entries``; raises ``ArchiveError`` and ``OSError``.

    ``prefix`` is prepended to their paths, ``key_prefix`` to their keys, by which ``source`` reads them.
    """
    with opened(archive) as descriptor:
        directory = read_directory(descriptor)
    paths = _paths(directory)
    kept = pc.is_valid(paths).to_numpy(zero_copy_only=False)
    problems = _problems(directory, paths, kept)
    reasons, details = [None] * len(paths), [None] * len(paths)  # type: list[str | None], list[str | None]
    for index, (reason, detail) in problems.items():
        reasons[index], details[index] = reason, detail
    keys = with_prefix(key_prefix, _keys(directory))
    columns = [with_prefix(prefix, paths), pa.array(directory.sizes), keys]
    files = pa.table([*columns, pa.array(reasons, pa.string()), pa.array(details, pa.string())], schema=LISTING_SCHEMA)
    is_table = pc.and_(pc.match_substring_regex(paths.fill_null(b""), r"(?i)\.[ct]sv$"), pc.is_null(files["reason"]))
    is_table = pc.and_(is_table, pa.array(kept)).to_numpy(zero_copy_only=False)
    entries.add_all(files.filter(pa.array(kept & ~is_table)))
    for index in np.flatnonzero(is_table).tolist():
        name = display_path(archive, paths[index].as_py())
        entries.tables.append(TableFile(source, keys[index].as_py(), name))


def _keys(directory: Directory) -> pa.Array:
    """Return the key of each member, as ``Member.key``."""
    keys = np.empty(len(directory.sizes), KEY_RECORD)
    keys["offset"], keys["compressed_size"], keys["size"] = (
        directory.offsets,
        directory.compressed_sizes,
        directory.sizes,
    )
    keys["crc32"], keys["method"] = directory.records["crc32"], directory.records["method"].astype(np.int16)
    fixed = pa.binary(KEY_RECORD.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(fixed, len(keys), [None, pa.py_buffer(keys)]).cast(pa.binary())


def _paths(directory: Directory) -> pa.Array:
    """Return the path of each member in UTF-8, "/" between its parts; null for a folder.

    A name that leads out of its archive is returned unchanged.
    """
    names = directory.names
    is_folder = pc.match_substring_regex(names, "/$")
    unusual = pc.match_substring_regex(names, _UNUSUAL).to_numpy(zero_copy_only=False)
    paths = pc.if_else(is_folder, pa.scalar(None, pa.binary()), names)
    if not unusual.any():
        return paths
    cleaned = [_clean(directory, index) for index in np.flatnonzero(unusual).tolist()]
    return pc.replace_with_mask(paths, pa.array(unusual), pa.array(cleaned, pa.binary()))


def _clean(directory: Directory, index: int) -> bytes | None:
    record = directory.records[index]
    path = _decoded(directory, index)
    if record["made_on"] in _WINDOWS and b"/" not in path:
        path = path.replace(b"\\", b"/")
    if not _LEAVES.search(path):
        folder = path.endswith(b"/")
        path = b"/".join(part for part in path.split(b"/") if part not in (b"", b".")) + b"/" * folder
    return None if not path or path.endswith(b"/") else path


def _decoded(directory: Directory, index: int) -> bytes:
    """Return a member's name in UTF-8.

    Without the flag for UTF-8 a name is in code page 437 (APPNOTE D.1), unless an extra field has it in Unicode (4.6.9),
    or its bytes are valid UTF-8: many programs write UTF-8 without the flag.
    """
    name: bytes = directory.names[index].as_py()
    if directory.records["flags"][index] & _UTF8_NAME or name.isascii():
        return name
    field = directory.extra(index, _UNICODE_PATH)
    if field is not None and len(field) > 5 and int.from_bytes(field[1:5], "little") == zlib.crc32(name):
        return field[5:]
    return name if is_utf8(name) else name.decode("cp437").encode()


def _problems(directory: Directory, paths: pa.Array, kept: NDArray[np.bool_]) -> dict[int, tuple[Reason, str]]:
    """Return the members that cannot be read, by their index in the directory, each with the reason and a sentence."""
    records = directory.records
    problems: dict[int, tuple[Reason, str]] = {}

    def note(affected: NDArray[np.bool_], detail: str, reason: Reason = Reason.BAD_ARCHIVE) -> None:
        for index in np.flatnonzero(affected & kept).tolist():
            problems.setdefault(index, (reason, detail))

    leaves = pc.match_substring_regex(paths.fill_null(b""), _LEAVES.pattern.decode())
    note(leaves.to_numpy(zero_copy_only=False), "expected a path that stays within its archive", Reason.BAD_PATH)
    note(_replaced(paths), "a later member of the archive has the same path", Reason.DUPLICATE)
    note(records["flags"] & _ENCRYPTED != 0, "expected a member that is not encrypted: unpack the archive first")
    mode = records["external"] >> 16
    note((records["made_on"] == _UNIX) & (mode & 0xF000 == stat.S_IFLNK), "expected a file, found a symbolic link")
    stored, deflated = records["method"] == STORED, records["method"] == DEFLATED
    for method in np.unique(records["method"][~stored & ~deflated]).tolist():
        detail = f"expected a member that is stored or deflated, found compression method {method}"
        note(records["method"] == method, detail)
    note(stored & (directory.sizes != directory.compressed_sizes), "a stored member has two different sizes")
    note(_overlaps(directory), "it shares bytes with another member, or with the archive's directory")
    return problems


def _replaced(paths: pa.Array) -> NDArray[np.bool_]:
    """Return which members are replaced by a later one of the same path: the last wins, as in most programs."""
    if len(pc.unique(paths)) == len(paths):
        return np.zeros(len(paths), bool)
    codes = paths.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    last = np.full(codes.max(initial=-1) + 2, -1, np.int64)  # the last element is for the nulls
    last[codes] = np.arange(len(codes))
    replaced: NDArray[np.bool_] = last[codes] != np.arange(len(codes))
    return replaced


def _overlaps(directory: Directory) -> NDArray[np.bool_]:
    """Return which members overlap another one, or end after the start of the directory."""
    order = np.argsort(directory.offsets, kind="stable")
    starts = directory.offsets[order]
    ends = starts + LOCAL_HEADER_BYTES + directory.records["name_length"][order] + directory.compressed_sizes[order]
    overlaps = ends > directory.start
    if len(order):
        furthest = np.maximum.accumulate(ends)[:-1]
        overlaps[1:] |= starts[1:] < furthest
        overlaps[:-1] |= ends[:-1] > starts[1:]
    result = np.zeros(len(order), bool)
    result[order] = overlaps
    return result
