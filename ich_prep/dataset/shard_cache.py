"""Whole shards of object stores on a local disk, shared by all processes that name the same folder.

A shard is kept under its fingerprint and length, so datasets, generations and copies that have equal shards share it.
Processes lock ranges of one file: a shard is fetched by one of them, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ich_prep.dataset.shard_format import CRC_BYTES, MISSING, fingerprint, index_bytes, parse_index
from ich_prep.dataset.stores import MAX_REQUEST
from ich_prep.errors import CorruptionError, UsageError
from ich_prep.files import open_regular
from ich_prep.messages import message

LOCK = "lock"
WHOLE, PART = ".shard", ".part"
_NAME = re.compile(r"([0-9a-f]{16})-[0-9]+\.(?:shard|part)")
_ROOM = 1 << 62  # where in the file of locks the one is under which room is made
_AT_ONCE = 16  # requests for one shard

Fetch = Callable[[Sequence[tuple[int, int]]], Sequence[memoryview]]


@dataclass(frozen=True)
class Kept:
    """A shard as the cache knows it: its fingerprint, its length in bytes, and how many chunks its index has."""

    fingerprint: str
    size: int
    chunks: int

    @property
    def name(self) -> str:
        """The name of its file, without an ending."""
        return f"{self.fingerprint}-{self.size}"


class ShardCache:
    """Keeps shards in ``folder``, of at most ``size`` bytes in all. Safe to share between threads and processes.

    Room is made by removing the shards that were used longest ago, but none that was used since this cache was opened: of
    a dataset larger than the cache, what fits stays, and the rest is read from the store. So it is where the disk is full
    or cannot be written; ``say`` tells the user, once.
    """

    def __init__(self, folder: str | Path, size: int, *, say: Callable[[str], None] | None = None) -> None:
        self.folder, self.size = Path(folder).absolute(), size
        self._say: Callable[[str], None] | None = _to_stderr if say is None else say
        self._refused: set[str] = set()  # the names of shards that are not kept
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(_ROOM) as lock:
                os.utime(lock)
                self._opened = os.fstat(lock).st_mtime_ns  # by the clock of the file system
        except OSError as error:
            raise UsageError(
                f"--cache {folder} cannot be used: {(error.strerror or '').lower()}. Name a folder of a local disk that can "
                "be written and has locks."
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.size)

    def open_shard(self, shard: Kept, fetch: Fetch) -> int | None:
        """Return a descriptor of the file of ``shard``, fetched if it is not there; None if it is not kept.

        ``fetch`` returns ranges of its bytes, start to end, from the store; what it raises is raised here.
        """
        if shard.name in self._refused:
            return None
        path = self.folder / (shard.name + WHOLE)
        try:
            with self._locked(int(shard.fingerprint[:15], 16)):
                found = _opened(path, shard)
                return self._fetched(path, shard, fetch) if found is None else found
        except OSError as error:
            self._refuse(shard, f"{self.folder}: {(error.strerror or str(error)).lower()}")
            return None

    def used(self, shard: Kept) -> None:
        """Note that ``shard`` is in use, so that it stays."""
        with suppress(OSError):
            os.utime(self.folder / (shard.name + WHOLE))

    def discard(self, shard: Kept) -> None:
        """Remove a shard that turned out to be damaged, and do without it from now on."""
        self._refused.add(shard.name)
        with suppress(OSError):
            (self.folder / (shard.name + WHOLE)).unlink()

    def _refuse(self, shard: Kept, why: str) -> None:
        self._refused.add(shard.name)
        if self._say is not None:
            say, self._say = self._say, None
            say(f"Note: the cache does not keep all shards ({why}); the others are read from the store each time.")

    def _fetched(self, path: Path, shard: Kept, fetch: Fetch) -> int | None:
        """Fetch a shard into the file ``path``, and return its descriptor. The caller holds its lock."""
        part = path.with_suffix(PART)
        with self._locked(_ROOM):
            if not self._make_room(shard.size):
                self._refuse(shard, f"{self.folder} has its {self.size:,} bytes")
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, shard.size)  # counted from now on
            except BaseException:
                _drop(descriptor, part)
                raise
        try:
            ranges = [(at, min(at + MAX_REQUEST, shard.size)) for at in range(0, shard.size, MAX_REQUEST)]
            for i in range(0, len(ranges), _AT_ONCE):
                some = ranges[i : i + _AT_ONCE]
                for (start, _), data in zip(some, fetch(some), strict=True):
                    _write_all(descriptor, data, start)
            if not _is_whole(descriptor, shard):  # reading its chunks says what is wrong, if they are needed
                _drop(descriptor, part)
                self._refused.add(shard.name)
                return None
            part.rename(path)
        except BaseException:
            with suppress(OSError):
                _drop(descriptor, part)
            raise
        return descriptor

    def _make_room(self, size: int) -> bool:
        """Remove shards until there is room for ``size`` more bytes; return whether there is. The caller holds the lock."""
        taken, removable = 0, list[tuple[int, int, str]]()
        for entry in os.scandir(self.folder):
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            with suppress(FileNotFoundError):
                found = entry.stat()
                if entry.name.endswith(PART) and self._remove_if_orphaned(match[1], entry.path):
                    continue
                taken += found.st_size
                if entry.name.endswith(WHOLE) and found.st_mtime_ns < self._opened:
                    removable.append((found.st_mtime_ns, found.st_size, entry.path))
        excess = taken + size - self.size
        if excess > sum(length for _, length, _ in removable):
            return False
        for _, length, path in sorted(removable):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            excess -= length
        return True

    def _remove_if_orphaned(self, print_: str, path: str) -> bool:
        """Remove the part of a shard that no process fetches any more: it was killed."""
        with suppress(BlockingIOError), self._locked(int(print_[:15], 16), wait=False):
            Path(path).unlink()
            return True
        return False

    @contextmanager
    def _locked(self, at: int, *, wait: bool = True) -> Iterator[int]:
        """Hold the lock at one place of the file of locks; yield its descriptor. Raises ``BlockingIOError`` unless ``wait``.

        It is a lock of the open file, not of the process, so threads keep each other away too.
        """
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            words = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
            fcntl.fcntl(lock, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, words)
            yield lock
        finally:
            os.close(lock)


def _opened(path: Path, shard: Kept) -> int | None:
    """Return a descriptor of the file of ``shard``, None if it is not there or not whole."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == shard.size and _is_whole(descriptor, shard):
        with suppress(OSError):
            os.utime(path)
        return descriptor
    _drop(descriptor, path)
    return None


def _is_whole(descriptor: int, shard: Kept) -> bool:
    """Return whether index and checksums in an open file are those of ``shard``; chunks are checked when they are read."""
    tail = index_bytes(shard.chunks)
    data = os.pread(descriptor, tail, shard.size - tail)
    try:
        index = parse_index(data, chunks=shard.chunks, body=shard.size - tail)
    except CorruptionError:
        return False
    ends = index[index[:, 0] != MISSING].sum(axis=1).tolist()
    stored = b"".join(os.pread(descriptor, CRC_BYTES, end - CRC_BYTES) for end in ends)
    return fingerprint(np.frombuffer(stored, "<u4"), data) == shard.fingerprint


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        at, data = at + written, data[written:]


def _drop(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{message(text)}\n")
