"""Files of a build: write atomically, sync, list. The only module that knows fsync and rename.

A place is on a file system or in a bucket, where a request writes an object whole and durably, and a folder is its objects.

Some file systems (CIFS, DrvFs of WSL, several FUSE ones) cannot sync a folder. There the names of new files reach the disk
when the file system decides; files themselves are always synced.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import TypeVar, overload

from ich_prep.dataset.bucket_path import BucketPath, Place, bucket_path, delete_all
from ich_prep.errors import UsageError
from ich_prep.files import is_url, read_regular, whole_url

# What file systems that cannot open or sync a folder answer. A folder that may not be listed cannot be opened either.
_NO_FOLDER_OPEN = frozenset((errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))
_NO_FOLDER_SYNC = frozenset((errno.EINVAL, errno.EBADF, errno.EROFS, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP))

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}")
_AT_ONCE = 16  # requests of a bucket
_SECONDS_BETWEEN_LOGS = 10.0  # an object cannot be appended to: it is written again

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def place_of(given: str | Place, what: str, *, endpoint: str | None = None, atomic: bool = True) -> Place:
    """Return ``given`` as a path, or as a place in a bucket where it is a URL; ``what`` names it in the error.

    ``endpoint`` and ``atomic`` are those of the bucket. Raises ``UsageError``.
    """
    if isinstance(given, BucketPath):
        return given
    if is_url(given):
        return bucket_path(given, what, endpoint=endpoint, atomic=atomic)
    return local_path(given, what)


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


def read_whole(path: Place, *, limit: int | None = None) -> bytes:
    """Return the bytes of the regular file or the object at ``path``; raises ``OSError``, also beyond ``limit`` bytes."""
    return path.read_bytes(limit=limit) if isinstance(path, BucketPath) else read_regular(path, limit=limit)


def write_whole(path: Place, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or nothing, even after a power cut.

    An ``OSError`` names ``path``: writing itself reports no name.
    """
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
    with renamed_when_whole(path) as temporary, naming(path), temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_first(path: Place, data: bytes) -> None:
    """Write ``data`` as ``write_whole`` does; in a bucket, raise ``FileExistsError`` where there is something else.

    On a file system the caller holds a lock. In a bucket, whose leases may be broken, the store decides who is first.
    """
    if isinstance(path, BucketPath):
        path.create(data)
    else:
        write_whole(path, data)


@contextmanager
def written_whole(path: Place) -> Iterator[io.RawIOBase | io.BytesIO]:
    """Yield a sink for the bytes of the file at ``path``, which it becomes once they are whole; it is not synced."""
    if isinstance(path, BucketPath):
        sink = io.BytesIO()
        yield sink
        path.write_bytes(sink.getbuffer())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(path) as temporary, open(temporary, "wb", buffering=0) as file:
        yield file


@contextmanager
def line_writer(path: Place) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends a line to the text at ``path``; a bucket has them at the end, and every ten seconds."""
    if not isinstance(path, BucketPath):

        def append(line: str) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

        yield append
        return
    lines = [path.read_bytes()] if path.is_file() else []
    written = time.monotonic()

    def add(line: str) -> None:
        nonlocal written
        lines.append(f"{line}\n".encode())
        if time.monotonic() - written > _SECONDS_BETWEEN_LOGS:
            written = time.monotonic()
            path.write_bytes(b"".join(lines))

    try:
        yield add
    finally:
        path.write_bytes(b"".join(lines))


def for_each(function: Callable[[_Item], _Result], items: Iterable[_Item], *, at: Place) -> Iterator[_Result]:
    """Return what ``function`` returns for each of ``items``, in order; several at a time where they are in a bucket."""
    if not isinstance(at, BucketPath):
        return map(function, items)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="requests") as pool:
        return iter([*pool.map(function, items)])


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


def clear_leftovers(path: Place) -> None:
    """Delete the temporary files that processes killed while writing ``path`` left next to it; buckets have none."""
    if isinstance(path, BucketPath):
        return
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()


@overload
def files_below(folder: Path) -> list[Path]: ...
@overload
def files_below(folder: Place) -> list[Place]: ...
def files_below(folder: Place) -> list[Path] | list[Place]:
    """Return all files and links in ``folder`` and below, sorted; none if it is no folder."""
    if isinstance(folder, BucketPath):
        places: list[Place] = [place for place, _ in folder.below()]
        return places
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def remove_files(paths: Iterable[Place]) -> None:
    """Delete the files at ``paths``, those that are there."""
    places = list(paths)
    delete_all(place for place in places if isinstance(place, BucketPath))
    for path in places:
        if not isinstance(path, BucketPath):
            path.unlink(missing_ok=True)


def free_bytes(folder: Place) -> int | None:
    """Return how many bytes the disk of ``folder`` has free, None for a bucket."""
    return None if isinstance(folder, BucketPath) else shutil.disk_usage(folder).free


def size_of(path: Place) -> int | None:
    """Return the size of the file at ``path`` in bytes, None if there is none."""
    if isinstance(path, BucketPath):
        meta = path.meta()
        return None if meta is None else meta.size
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def modified_at(path: Place) -> float:
    """Return when the file at ``path`` was written, in seconds by the clock of its store; raises ``FileNotFoundError``."""
    return path.store.head(path.key).modified if isinstance(path, BucketPath) else path.stat().st_mtime


def path_below(path: Place, folder: Place) -> PurePath:
    """Return the path of ``path`` relative to ``folder``; raises ``ValueError`` where it is not below."""
    if isinstance(path, BucketPath):
        return path.relative_to(folder)
    return path.relative_to(folder)  # type: ignore[arg-type]  # of one place, both are of one kind


def sync_file(path: Place, *, folders: int) -> None:
    """Wait until the file at ``path``, and the entries of that many folders above it, are on disk."""
    if isinstance(path, BucketPath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for folder in path.parents[:folders]:
        sync_folder(folder)


def sync_folder(folder: Place) -> bool:
    """Wait until the names in ``folder`` are on disk; return false, and wait for nothing, where that is not supported."""
    if isinstance(folder, BucketPath):
        return True
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


def note_on_sync(folder: Place) -> str:
    """Return a sentence for the user if the file system of ``folder`` cannot sync folders, else ""."""
    if sync_folder(folder):
        return ""
    return (
        f"The file system of {folder} cannot sync folders: after a power failure the newest files may be missing, and are "
        "then made again by the same command."
    )
