"""One process at a time: an exclusive lock, and a lease where the file system has no locks, or in a bucket.

``flock`` is refused on Lustre without its mount option, on NFS without lockd, and by some FUSE file systems. There, a file
that is created exclusively names its owner (host, process, random id) and is rewritten while the owner runs. It is broken
only if its owner is certainly gone: a process of this host that no longer exists, or a lease that nobody has rewritten for
``STALE_SECONDS``. In a bucket, an object does the same.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ich_prep.dataset.bucket_lease import BucketLease, require_conditions
from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.file_lease import FileLease
from ich_prep.dataset.lease_owner import STALE_SECONDS, Lease, Owner, owner_here
from ich_prep.errors import BuildError, StoreError

REFRESH_SECONDS = 30.0
# EBADF is NFS's answer where a lock needs a file open for writing.
_NO_FLOCK = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF))
_BUSY = frozenset((errno.EWOULDBLOCK, errno.EACCES))
_ATTEMPTS = 100


class HeldError(Exception):
    """A lock that another process holds; the text says which, if that is known: "(process 12 on host a) " or ""."""


@contextmanager
def locked(target: Place, lease: Place, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on ``target``, an existing file or folder, or where that is not supported the ``lease`` file.

    ``say`` tells the user of the latter. In a bucket it is always the ``lease``. Raises ``HeldError`` where another process
    holds it, ``BuildError`` for a bucket that cannot keep others away, and at the end where the lease was lost to another
    process, because this one was stopped for minutes.
    """
    if isinstance(lease, BucketPath):
        require_conditions(lease)
        with _leased(BucketLease(lease)):
            yield
        return
    assert not isinstance(target, BucketPath)  # what it locks and its lease are beside each other
    # NFS emulates the lock by one that needs a file open for writing.
    descriptor = os.open(target, os.O_RDONLY if target.is_dir() else os.O_RDWR)
    try:
        supported = _flock(descriptor)
        if supported:
            with _no_lease_of_others(lease):
                yield
            return
    finally:
        os.close(descriptor)
    with _leased(FileLease(lease)):
        say(
            f"The file system of {target} has no locks: the file {lease} keeps other builds away instead. After a crash of "
            f"another host it does so for {STALE_SECONDS / 60:.0f} minutes."
        )
        yield


def refuse_if_held(target: Place, lease: Place) -> None:
    """Raise ``HeldError`` while another process holds the lock on ``target``, or the ``lease``; takes neither."""
    if not isinstance(target, BucketPath):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            _flock(descriptor, fcntl.LOCK_SH)  # shared: two processes that look at once do not see each other
        finally:
            os.close(descriptor)
    lock = BucketLease(lease) if isinstance(lease, BucketPath) else FileLease(lease)
    if lease.exists() and not lock.may_be_broken():
        holder = lock.owner()
        raise HeldError(f"({holder}) " if holder else "")


def _flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock the open file; return false where the file system has no locks. Raises ``HeldError``."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise HeldError("") from None
        if error.errno in _NO_FLOCK:
            return False
        raise
    return True


@contextmanager
def _no_lease_of_others(lease: Path) -> Iterator[None]:
    """Refuse a lock while a host on which the same file system has none holds a ``lease``; remove one left behind."""
    if lease.exists():
        with _leased(FileLease(lease)):
            pass
    yield


# --- the lease -------------------------------------------------------------------------------------------------------


@contextmanager
def _leased(lease: Lease) -> Iterator[None]:
    """Hold the ``lease``, refreshing it from a thread."""
    owner = owner_here()
    _take(lease, owner)
    ended = threading.Event()
    lost: list[Owner | None] = []
    refresher = threading.Thread(target=_refresh, args=(lease, owner, ended, lost), name="lease", daemon=True)
    refresher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost:
            raise
    finally:
        ended.set()
        refresher.join()
        if lease.owner() == owner:
            lease.remove()
    if lost:
        raise BuildError(
            f"This process was stopped for minutes, and {lost[0] or 'another process'} took over its lease {lease}. "
            "Finished work is kept: run the same command again once the other has ended."
        )


def _take(lease: Lease, owner: Owner) -> None:
    """Create the ``lease`` for ``owner``; raises ``HeldError`` while another owner may be alive."""
    for _ in range(_ATTEMPTS):
        try:
            lease.create(owner)
            return
        except FileExistsError:
            pass
        if not lease.may_be_broken():
            holder = lease.owner()
            raise HeldError(f"({holder}) " if holder else "")
        lease.break_for(owner)
        if lease.owner() == owner:
            return
    raise HeldError("")


def _refresh(lease: Lease, owner: Owner, ended: threading.Event, lost: list[Owner | None]) -> None:
    """Rewrite the ``lease`` until ``ended``. If another one has it, note that in ``lost`` and interrupt the main thread."""
    while not ended.wait(REFRESH_SECONDS):
        with contextlib.suppress(OSError, StoreError):  # such as a server that restarts: the next refresh may succeed
            if not lease.refresh(owner):
                lost.append(lease.owner())
                _thread.interrupt_main()
                return
