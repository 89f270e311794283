"""Folders: the files below one, including those in zip archives and gzip files, in the same order on every machine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ich_prep.errors import Reason, SourceError
from ich_prep.files import READ_FLAGS, NotRegularError
from ich_prep.sources.member import Member, gzip_member, prefetch_member, read_member
from ich_prep.sources.source import Entries, Listing, TableFile, display_path
from ich_prep.sources.zip_archive import add_members
from ich_prep.sources.zip_directory import ArchiveError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Separates the path of an archive from the key of a member; no path contains it.
_INSIDE: Final = b"\0"
_ZIP, _GZIP, _TABLES = b".zip", b".dcm.gz", (b".csv", b".tsv")


@dataclass(frozen=True)
class FolderSource:
    """The files below one folder, following links.

    The members of ``a.zip`` have paths as if they were in a folder ``a``, and ``1.dcm.gz`` has the path ``1.dcm``. If
    such a folder or file exists, the path keeps its ``.zip`` or ``.gz``. A key is the path below the folder; for a file
    inside an archive it is the archive's path, a zero byte, and a ``Member``'s key.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def list(self) -> Listing:
        """Return every file, special ones with a reason not to read them.

        Raises ``SourceError`` if a folder cannot be read, or there is no file.
        """
        entries = Entries()
        for folder, names, below in _walk(self.path):
            taken = {*names, *below}
            for name, size in sorted(names.items()):
                if isinstance(size, NotRegularError):
                    entries.add(folder + name, 0, folder + name, Reason.UNREADABLE, size.strerror)
                else:
                    self._add(entries, folder, name, size, taken)
        listing = entries.listing(self.name)
        if not len(listing.files):
            raise SourceError(f"Expected DICOM files below {self.path}; found none.")
        return listing

    def _add(self, entries: Entries, folder: bytes, name: bytes, size: int, taken: set[bytes]) -> None:
        path, ending = folder + name, name.lower()
        if ending.endswith(_TABLES):
            entries.tables.append(TableFile(self, path, display_path(self.path, path)))
        elif ending.endswith(_ZIP):
            self._add_archive(entries, path, size, _without_ending(name, _ZIP, taken))
        elif ending.endswith(_GZIP):
            with contextlib.suppress(OSError):  # the scan reports why it cannot be read
                member = gzip_member(self._base + path)
                if member is None:
                    entries.add(path, size, path, Reason.BAD_ARCHIVE, "it does not end like one whole gzip file")
                    return
                unpacked = folder + _without_ending(name, b".gz", taken)
                entries.add(unpacked, member.size, path + _INSIDE + member.key())
                return
            entries.add(path, size, path)
        else:
            entries.add(path, size, path)

    def _add_archive(self, entries: Entries, path: bytes, size: int, folder: bytes) -> None:
        """Add the members of the archive at ``path`` as files of ``folder``, or the archive itself if it is broken."""
        prefix = path[: path.rfind(b"/") + 1] + folder + b"/"
        try:
            archive = Path(os.fsdecode(self._base + path))
            add_members(entries, self, archive, prefix=prefix, key_prefix=path + _INSIDE)
        except ArchiveError as error:
            entries.add(path, size, path, Reason.BAD_ARCHIVE, str(error))
        except OSError as error:
            entries.add(path, size, path, Reason.UNREADABLE, error.strerror or str(error))

    def size(self, key: bytes) -> int:
        """Return the length of a file in bytes, uncompressed; raises ``OSError``."""
        path, inside, member = key.partition(_INSIDE)
        if inside:
            return Member.from_key(member).size
        status = os.stat(self._base + path)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularError(self._base + path, status.st_mode)
        return status.st_size

    def read_into(self, key: bytes, buffers: Sequence[Buffer], offset: int = 0, *, verify: bool = False) -> int:
        """Fill ``buffers``; see ``Source.read_into``. A plain file has no checksum to verify."""
        path, inside, member = key.partition(_INSIDE)
        if inside:
            return read_member(self._base + path, Member.from_key(member), buffers, offset, verify=verify)
        # ``size`` refuses what is no regular file. One replaced by a FIFO since then cannot be read at an offset, and is
        # opened without waiting: that check costs the usual file nothing.
        descriptor = os.open(self._base + path, READ_FLAGS)
        try:
            return os.preadv(descriptor, buffers, offset)
        except OSError as error:
            if error.errno == errno.ESPIPE:
                raise NotRegularError(self._base + path, os.fstat(descriptor).st_mode) from None
            raise
        finally:
            os.close(descriptor)

    def prefetch(self, key: bytes, length: int) -> None:
        """Ask the kernel for a file."""
        path, inside, member = key.partition(_INSIDE)
        with contextlib.suppress(OSError):
            if inside:
                prefetch_member(self._base + path, Member.from_key(member), length)
                return
            descriptor = os.open(self._base + path, READ_FLAGS)  # of anything but a regular file the advice is refused
            try:
                os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    @cached_property
    def _base(self) -> bytes:
        return os.path.join(os.fsencode(self.path), b"")


def _walk(root: Path) -> Iterator[tuple[bytes, dict[bytes, int | NotRegularError], list[bytes]]]:
    """Yield each folder below ``root``, with its relative path ending in "/", its files with their sizes, and its folders.

    What is no regular file has an error instead of a size; a link that leads nowhere has size 0, and the scan reports it.
    A folder that is reached twice, through a link, is yielded once, under the same path on every machine.
    """
    base = os.fsencode(root)
    pending, seen = [b""], set[tuple[int, int]]()
    while pending:
        folder = pending.pop()
        directory = os.path.join(base, folder)
        files: dict[bytes, int | NotRegularError] = {}
        below: list[bytes] = []
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        files[entry.name] = entry.stat().st_size
                    elif entry.is_dir(follow_symlinks=False):
                        below.append(entry.name)
                    else:
                        _add_special(entry, files, below)
        except OSError as error:
            raise SourceError(
                f"Cannot list {os.fsdecode(directory)}: {error.strerror}. Fix its permissions, or point --src at a folder "
                "that you can read."
            ) from None
        yield folder, files, below
        pending += sorted((folder + name + b"/" for name in below), reverse=True)


def _add_special(entry: os.DirEntry[bytes], files: dict[bytes, int | NotRegularError], below: list[bytes]) -> None:
    """Add what a link leads to, or a FIFO, socket or device."""
    try:
        status = entry.stat()
    except OSError:  # a link that leads nowhere, or to itself
        files[entry.name] = 0
        return
    if stat.S_ISDIR(status.st_mode):
        below.append(entry.name)
    elif stat.S_ISREG(status.st_mode):
        files[entry.name] = status.st_size
    else:
        files[entry.name] = NotRegularError(entry.path, status.st_mode)


def _without_ending(name: bytes, ending: bytes, taken: set[bytes]) -> bytes:
    """Return ``name`` without its ``ending``, or with it if the short name is ``taken``; add the result to ``taken``."""
    short = name[: -len(ending)]
    chosen = name if short in taken or not short else short
    taken.add(chosen)
    return chosen
