"""Zip archives as they were downloaded: their members, each with its path, and what cannot be read with the reason."""

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

from ich_prep.errors import Reason, SourceError
from ich_prep.sources.member import (
    DEFLATED,
    LOCAL_HEADER_BYTES,
    STORED,
    Member,
    prefetch_member,
    read_member,
)
from ich_prep.sources.source import Entries, Listing, TableFile, display_path, is_utf8
from ich_prep.sources.zip_directory import ArchiveError, Directory, extra_field, read_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from ich_prep.sources.source import Source

_ENCRYPTED: Final = 1 << 0 | 1 << 6 | 1 << 13  # itself, strongly, or its directory (APPNOTE 4.4.4)
_UTF8_NAME: Final = 1 << 11
_UNIX, _WINDOWS = 3, (0, 10, 14)  # hosts of APPNOTE 4.4.2: FAT, NTFS, VFAT
_UNICODE_PATH: Final = 0x7075
# Names that need a closer look: not ASCII, or with anything that is not simply a path.
_UNUSUAL: Final = re.compile(rb"[^\x20-\x5b\x5d-\x7e]|^/|//|(?:^|/)\.\.?(?:/|$)|^[A-Za-z]:")
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
        """Return the members by their paths in the archive; raises ``SourceError`` where it is broken or empty."""
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
        """Return the uncompressed size that the archive's directory gives."""
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

    ``prefix`` goes before their paths, ``key_prefix`` before their keys, by which ``source`` reads them.
    """
    descriptor = os.open(archive, os.O_RDONLY)
    try:
        directory = read_directory(descriptor)
    finally:
        os.close(descriptor)
    paths = _paths(directory)
    problems = _problems(directory, paths)
    columns = (directory.offsets, directory.compressed_sizes, directory.sizes, directory.records["crc32"])
    methods = directory.records["method"].tolist()
    for index, fields in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        path, problem = paths[index], problems.get(index)
        if path is None:
            continue
        offset, compressed_size, size, checksum = fields
        method = methods[index] if methods[index] in (STORED, DEFLATED) else STORED
        key = key_prefix + Member(offset, compressed_size, size, checksum, method).key()
        if problem is None and path[-4:].lower() == b".csv" and is_utf8(path):
            entries.tables.append(TableFile(source, key, display_path(archive, path)))
        else:
            reason, detail = problem or (None, None)
            entries.add(prefix + path, size, key, reason, detail)


def _paths(directory: Directory) -> list[bytes | None]:
    """Return the path of each member in UTF-8, "/" between its parts; None for a folder, the name itself if it leaves it."""
    records = directory.records
    paths: list[bytes | None] = []
    for index, name in enumerate(directory.names):
        path = name
        if _UNUSUAL.search(name):
            record = records[index]
            path = _decoded(name, int(record["flags"]), directory.extras[index])
            if record["made_on"] in _WINDOWS and b"/" not in path:
                path = path.replace(b"\\", b"/")
            if not _LEAVES.search(path):
                folder = path.endswith(b"/")
                path = b"/".join(part for part in path.split(b"/") if part not in (b"", b".")) + b"/" * folder
        paths.append(None if not path or path.endswith(b"/") else path)
    return paths


def _decoded(name: bytes, flags: int, extra: bytes) -> bytes:
    """Return a member's name in UTF-8.

    Without the flag that says so a name is of code page 437 (APPNOTE D.1), unless the archive has it in Unicode beside
    (4.6.9), or its bytes are UTF-8: many programs write that and no flag.
    """
    if flags & _UTF8_NAME or name.isascii():
        return name
    field = extra_field(extra, _UNICODE_PATH)
    if field is not None and len(field) > 5 and int.from_bytes(field[1:5], "little") == zlib.crc32(name):
        return field[5:]
    return name if is_utf8(name) else name.decode("cp437").encode()


def _problems(directory: Directory, paths: list[bytes | None]) -> dict[int, tuple[Reason, str]]:
    """Return the members that cannot be read, by their place in the directory, each with the reason and a sentence."""
    records = directory.records
    problems: dict[int, tuple[Reason, str]] = {}

    def note(those: NDArray[np.bool_], detail: str, reason: Reason = Reason.BAD_ARCHIVE) -> None:
        for index in np.flatnonzero(those).tolist():
            problems.setdefault(index, (reason, detail))

    note(records["flags"] & _ENCRYPTED != 0, "expected a member that is not encrypted: unpack the archive first")
    mode = records["external"] >> 16
    note((records["made_on"] == _UNIX) & (mode & 0xF000 == stat.S_IFLNK), "expected a file, found a symbolic link")
    stored, deflated = records["method"] == STORED, records["method"] == DEFLATED
    for method in np.unique(records["method"][~stored & ~deflated]).tolist():
        detail = f"expected a member that is stored or deflated, found compression method {method}"
        note(records["method"] == method, detail)
    note(stored & (directory.sizes != directory.compressed_sizes), "a stored member has two different sizes")
    note(_overlaps(directory), "it shares bytes with another member, or with the archive's directory")
    places: dict[bytes, int] = {}
    for index, path in enumerate(paths):
        if path is None:
            continue
        if _LEAVES.search(path):
            problems[index] = Reason.BAD_PATH, "expected a path that stays within its archive"
        elif path in places:
            problems[places[path]] = Reason.DUPLICATE, "a later member of the archive has the same path"
        places[path] = index
    return problems


def _overlaps(directory: Directory) -> NDArray[np.bool_]:
    """Return which members begin before another one ends, or end behind the beginning of the directory."""
    order = np.argsort(directory.offsets, kind="stable")
    begins = directory.offsets[order]
    ends = begins + LOCAL_HEADER_BYTES + directory.records["name_length"][order] + directory.compressed_sizes[order]
    overlaps = ends > directory.begin
    if len(order):
        furthest = np.maximum.accumulate(ends)[:-1]
        overlaps[1:] |= begins[1:] < furthest
        overlaps[:-1] |= ends[:-1] > begins[1:]
    result = np.zeros(len(order), bool)
    result[order] = overlaps
    return result
