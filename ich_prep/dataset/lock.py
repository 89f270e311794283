"""One process at a time: an exclusive lock, and a lease file where the file system has no locks.

``flock`` is refused on Lustre without its mount option, on NFS without lockd, and by some FUSE file systems. There, a file
that is created exclusively names its owner (host, process, random id) and is rewritten while the owner runs. It is broken
only if its owner is certainly gone: a process of this host that no longer exists, or a lease that nobody has rewritten for
``STALE_SECONDS``. Ages are differences between two times of the file system, so clocks of hosts need not agree.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ich_prep.dataset.storage import renamed_when_whole
from ich_prep.errors import BuildError
from ich_prep.files import read_regular

REFRESH_SECONDS = 30.0
STALE_SECONDS = 600.0
# EBADF is NFS's answer where a lock needs a file open for writing.
_NO_FLOCK = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF))
# As on FAT and some FUSE file systems.
_NO_LINKS = frozenset((errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK))
_BUSY = frozenset((errno.EWOULDBLOCK, errno.EACCES))
_ATTEMPTS = 100


class HeldError(Exception):
    """A lock that another process holds; the text says which, if that is known: "(process 12 on host a) " or ""."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lease. ``space`` identifies the machine's boot and process namespace, in which ``process`` counts.

    ``started`` tells a process from a later one with its number (proc(5), stat, field 22). ``id`` is random.
    """

    host: str
    space: str
    process: int
    started: str
    id: str

    def is_gone(self) -> bool:
        """Return whether the owner has certainly ended: it was a process here, and is no longer."""
        return self.space == _space() and _started(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


@contextmanager
def locked(target: Path, lease: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on ``target``, an existing file or folder, or where that is not supported the ``lease`` file.

    ``say`` tells the user of the latter. Raises ``HeldError`` where another process holds it, and ``BuildError`` at the end
    where the lease was lost to another process, because this one was stopped for minutes.
    """
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
    with _leased(lease):
        say(
            f"The file system of {target} has no locks: the file {lease} keeps other builds away instead. After a crash of "
            f"another host it does so for {STALE_SECONDS / 60:.0f} minutes."
        )
        yield


def refuse_if_held(target: Path, lease: Path) -> None:
    """Raise ``HeldError`` while another process holds the lock on ``target``, or the ``lease``; takes neither."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        _flock(descriptor, fcntl.LOCK_SH)  # shared: two processes that look at once do not see each other
    finally:
        os.close(descriptor)
    if lease.exists() and not _may_be_broken(lease):
        holder = _owner_of(lease)
        raise HeldError(f"({holder}) " if holder else "")


def breaking(lease: Path) -> Path:
    """Return the file that a process creates while it breaks a ``lease``."""
    return lease.with_name(f"{lease.name}.breaking")


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
        with _leased(lease):
            pass
    yield


# --- the lease -------------------------------------------------------------------------------------------------------


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    """Hold the lease at ``path``, refreshing it from a thread."""
    owner = Owner(socket.gethostname(), _space(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex)
    _take(path, owner)
    ended = threading.Event()
    lost: list[Owner | None] = []
    refresher = threading.Thread(target=_refresh, args=(path, owner, ended, lost), name="lease", daemon=True)
    refresher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost:
            raise
    finally:
        ended.set()
        refresher.join()
        if _owner_of(path) == owner:
            path.unlink(missing_ok=True)
    if lost:
        raise BuildError(
            f"This process was stopped for minutes, and {lost[0] or 'another process'} took over its lease {path}. "
            "Finished work is kept: run the same command again once the other has ended."
        )


def _take(path: Path, owner: Owner) -> None:
    """Create the lease at ``path`` for ``owner``; raises ``HeldError`` while another owner may be alive."""
    for _ in range(_ATTEMPTS):
        try:
            _create(path, owner)
            _clear_abandoned(path)
            return
        except FileExistsError:
            pass
        if _may_be_broken(path):
            _break(path, owner)
        else:
            holder = _owner_of(path)
            raise HeldError(f"({holder}) " if holder else "")
    raise HeldError("")


def _create(path: Path, owner: Owner) -> None:
    """Create the lease at ``path``, whole; raises ``FileExistsError`` if there is one.

    A file gets the name once it is written, so a process that is killed or stopped here leaves no lease without an owner,
    which could only age.
    """
    whole = path.with_name(f".{path.name}.{owner.id}")  # named like other temporary files
    try:
        _write_new(whole, owner)
        try:
            os.link(whole, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_new(path, owner)
    finally:
        whole.unlink(missing_ok=True)


def _write_new(path: Path, owner: Owner) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, _text(owner))
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)  # such as a full disk
        raise
    finally:
        os.close(descriptor)


def _clear_abandoned(path: Path) -> None:
    """Remove what processes left that were killed while they created the lease at ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        if _may_be_broken(leftover):
            leftover.unlink(missing_ok=True)


def _break(path: Path, owner: Owner) -> None:
    """Remove the lease at ``path`` if it still may be; only one process at a time does that.

    Without a lock of their own two processes could break the same lease, the second one the first one's new lease.
    """
    right = breaking(path)
    try:
        _create(right, owner)
    except FileExistsError:
        if _may_be_broken(right):
            right.unlink(missing_ok=True)
        time.sleep(0.02)
        return
    try:
        if _may_be_broken(path):
            path.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)


def _may_be_broken(path: Path) -> bool:
    """Return whether the owner of the lease at ``path``, or of a file that was to become it, is certainly gone."""
    owner = _owner_of(path)
    if owner is not None and owner.is_gone():
        return True
    try:
        written = path.stat().st_mtime
    except FileNotFoundError:
        return False
    return _now_on(path) - written > STALE_SECONDS


def _now_on(path: Path) -> float:
    """Return the time of the file system on which ``path`` is: that of a file which it has just written."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # named like other temporary files
    try:
        probe.write_bytes(b"\n")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _refresh(path: Path, owner: Owner, ended: threading.Event, lost: list[Owner | None]) -> None:
    """Rewrite the lease until ``ended``. If another owner has it, note that in ``lost`` and interrupt the main thread."""
    while not ended.wait(REFRESH_SECONDS):
        with contextlib.suppress(OSError):  # such as a server that restarts: the next refresh may succeed
            holder = _owner_of(path)
            if holder != owner and path.parent.is_dir():
                lost.append(holder)
                _thread.interrupt_main()
                return
            with renamed_when_whole(path) as temporary:
                temporary.write_bytes(_text(owner))


def _owner_of(path: Path) -> Owner | None:
    """Return the owner that the lease at ``path`` names, None where there is no lease or it is not whole."""
    try:
        content = json.loads(read_regular(path))
        return Owner(**{name: content[name] for name in Owner.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _text(owner: Owner) -> bytes:
    return json.dumps({**asdict(owner), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()


def _space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """Return when a process of this machine started, in the kernel's words; "" if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
