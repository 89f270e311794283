"""File system operations: write atomically, sync, list. The only module that knows fsync and rename.

Some file systems (CIFS, DrvFs of WSL, several FUSE ones) cannot sync a folder. There the names of new files reach the disk
when the file system decides; files themselves are always synced.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ich_prep.dataset.store_url import is_url, whole_url
from ich_prep.errors import UsageError

# What file systems that cannot open or sync a folder answer. A folder that may not be listed cannot be opened either.
_NO_FOLDER_OPEN = frozenset((errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))
_NO_FOLDER_SYNC = frozenset((errno.EINVAL, errno.EBADF, errno.EROFS, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP))

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}")


def local_path(given: str | Path, what: str) -> Path:
    """Return ``given`` as a local path; ``what`` names it in the error, such as ``--out``.

    Raises ``UsageError`` for a URL, where object stores are not supported, and for a link that leads to itself.
    """
    if is_url(given):
        raise UsageError(
            f"{what} is a URL ({whole_url(given)}); here only paths of a file system are supported. Mount the bucket, or "
            "copy the data to a local disk."
        )
    try:
        Path(given).stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{what} {given} is a link that leads to itself. Give another path.") from None
    except ValueError:
        raise UsageError(f"{what} {given} is not a path: it contains a zero byte. Give another path.") from None
    return Path(given)


def new_folder(given: str | Path, what: str, *, outside: object) -> Path:
    """Return ``given`` as the path of a folder to write to; ``what`` names it in the error, such as ``--out``.

    Raises ``UsageError`` for a URL, for anything but a new or empty folder, and for a folder in the dataset ``outside``,
    if that is a path.
    """
    path = local_path(given, what)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not a new or empty folder. Name another with {what}.")
    if isinstance(outside, Path) and outside.resolve() in (path.resolve(), *path.resolve().parents):
        raise UsageError(f"{path} is inside the dataset, which must not be changed. Name another folder with {what}.")
    return path


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make ``folder``, which is new or empty; on failure remove what was written, so that the same command can run again."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir(exist_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or nothing, even after a power cut.

    An ``OSError`` names ``path``: writing itself reports no name.
    """
    with renamed_when_whole(path) as temporary, naming(path), temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an ``OSError`` of the block name ``path``, the file that is written, and no temporary name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, delete it on failure."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (temporary, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def whole_name(name: str) -> str:
    """Return the name of a file, or the one that a temporary file of ``renamed_when_whole`` would have got."""
    temporary = _TEMPORARY.fullmatch(name)
    return temporary[1] if temporary else name


def clear_leftovers(path: Path) -> None:
    """Delete the temporary files that processes killed while writing ``path`` left next to it."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()


def files_below(folder: Path) -> list[Path]:
    """Return all files and links in ``folder`` and below, sorted; none if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def size_of(path: Path) -> int | None:
    """Return the size of the file at ``path`` in bytes, None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def sync_file(path: Path, *, folders: int) -> None:
    """Wait until the file at ``path``, and the entries of that many folders above it, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for folder in path.parents[:folders]:
        sync_folder(folder)


def sync_folder(folder: Path) -> bool:
    """Wait until the names in ``folder`` are on disk; return false, and wait for nothing, where that is not supported."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in _NO_FOLDER_OPEN:
            return False
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def note_on_sync(folder: Path) -> str:
    """Return a sentence for the user if the file system of ``folder`` cannot sync folders, else ""."""
    if sync_folder(folder):
        return ""
    return (
        f"The file system of {folder} cannot sync folders: after a power failure the newest files may be missing, and are "
        "then made again by the same command."
    )
