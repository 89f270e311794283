"""Files of the user: only regular ones are opened, whatever links lead to them, so that no read waits for ever.

A FIFO without a writer blocks whoever opens it, a terminal or a device may block or never end. The check is made on the
open descriptor, so a file that is replaced between listing and reading is caught too.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

# O_NONBLOCK: opening a FIFO returns at once, and changes nothing for regular files. O_NOCTTY: no terminal is taken over.
READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}")  # pathlib turns s3://bucket into s3:/bucket

# What operating systems, file servers and version control put beside the user's files, in lower case.
_LITTER_NAMES = frozenset(
    (".ds_store", "icon\r", ".localized", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "autorun.inf")
    + (".directory", ".nomedia", ".picasa.ini", "picasa.ini", ".gitkeep", ".gitignore", ".gitattributes", ".keep")
)
_LITTER = re.compile(r"\._.+|~\$.*|\.nfs[0-9a-f]+|.*@syno(?:eastream|resource).*", re.DOTALL)
_LITTER_FOLDERS = frozenset(("@eadir", "__macosx", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd"))


def is_url(text: object) -> bool:
    """Return whether ``text`` is a URL such as s3://bucket/data.zarr, and not the path of a file system."""
    return _URL.match(str(text)) is not None


def whole_url(url: object) -> str:
    """Return a URL that pathlib may have shortened as it was, and a path as it is."""
    return _URL.sub(lambda match: f"{match[1].lower()}://", str(url), count=1)


def is_litter(path: PurePath) -> bool:
    """Return whether ``path``, relative to the user's folder, is that of a file that no user made, by its name."""
    *folders, name = (part.lower() for part in path.parts)
    return name in _LITTER_NAMES or _LITTER.fullmatch(name) is not None or not _LITTER_FOLDERS.isdisjoint(folders)


class NotRegularError(OSError):
    """A path that leads to something other than a regular file; ``strerror`` says what it is."""

    def __init__(self, path: str | bytes | os.PathLike[str], mode: int) -> None:
        is_folder = stat.S_ISDIR(mode)
        words = os.strerror(errno.EISDIR) if is_folder else f"expected a regular file, found {kind_of(mode)}"
        super().__init__(errno.EISDIR if is_folder else errno.EINVAL, words, os.fsdecode(path))
        self.strerror: str = words


def kind_of(mode: int) -> str:
    """Return what a file of this ``st_mode`` is, with its article."""
    return next((words for matches, words in _KINDS if matches(mode)), "a regular file")


def open_regular(path: str | bytes | os.PathLike[str]) -> int:
    """Return a descriptor of the regular file at ``path``, open for reading; links are followed.

    Raises ``NotRegularError``, and ``OSError`` as ``os.open`` does. Nothing blocks: of a socket or a device without a
    driver the operating system refuses the opening itself, which is reported in the same words.
    """
    try:
        descriptor = os.open(path, READ_FLAGS)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise NotRegularError(path, os.stat(path).st_mode) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotRegularError(path, mode)
    return descriptor


@contextmanager
def opened(path: str | bytes | os.PathLike[str]) -> Iterator[int]:
    """Open the regular file at ``path`` as ``open_regular`` does; close it at the end of the block."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Raise ``OSError`` where ``path`` is no regular file: before a library that opens files itself is given it."""
    with opened(path):
        pass


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Return the bytes of the regular file at ``path``; raises ``OSError``, also for one of more than ``limit`` bytes."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, expected at most {limit:,}", str(path))
        return file.read()
