"""A lease that is a file, where the file system has no locks.

Ages are differences between two times of the file system, so clocks of hosts need not agree.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.lease_owner import STALE_SECONDS, Owner, owner_in
from ich_prep.dataset.storage import renamed_when_whole
from ich_prep.files import read_regular

# As on FAT and some FUSE file systems.
_NO_LINKS = frozenset((errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK))


@dataclass(frozen=True)
class FileLease:
    """The lease at ``path``; see ``lease_owner.Lease``."""

    path: Path

    @property
    def breaking(self) -> FileLease:
        """What a process creates while it breaks this lease."""
        return FileLease(self.path.with_name(_breaking_name(self.path.name)))

    def __str__(self) -> str:
        return str(self.path)

    def create(self, owner: Owner) -> None:
        """Give the file its name once it is written; raises ``FileExistsError`` if there is one.

        So a process that is killed or stopped here leaves no lease without an owner, which could only age.
        """
        whole = self._temporary(owner.id)
        try:
            _write_new(whole, owner)
            try:
                os.link(whole, self.path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _write_new(self.path, owner)
        finally:
            whole.unlink(missing_ok=True)
        self._clear_abandoned()

    def owner(self) -> Owner | None:
        """Return the owner that the file names, None where there is no file or it is not whole."""
        try:
            return owner_in(read_regular(self.path))
        except OSError:
            return None

    def may_be_broken(self) -> bool:
        """Return whether the owner is certainly gone, of a file that was to become a lease too."""
        owner = self.owner()
        if owner is not None and owner.is_gone():
            return True
        try:
            written = self.path.stat().st_mtime
        except FileNotFoundError:
            return False
        return self._now() - written > STALE_SECONDS

    def break_for(self, owner: Owner) -> None:
        """Remove the file if it still may be; only one process at a time does that.

        Without a lease of their own two processes could break the same one, the second one the first one's new lease.
        """
        right = self.breaking
        try:
            right.create(owner)
        except FileExistsError:
            if right.may_be_broken():
                right.remove()
            time.sleep(0.02)
            return
        try:
            if self.may_be_broken():
                self.remove()
        finally:
            right.remove()

    def refresh(self, owner: Owner) -> bool:
        """Write the file again, so that its time is that of now; return false where another owner has it."""
        if self.owner() != owner and self.path.parent.is_dir():
            return False
        with renamed_when_whole(self.path) as temporary:
            temporary.write_bytes(owner.text())
        return True

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}")  # named like other temporary files

    def _clear_abandoned(self) -> None:
        """Remove what processes left that were killed while they created this lease."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*"):
            if FileLease(leftover).may_be_broken():
                leftover.unlink(missing_ok=True)

    def _now(self) -> float:
        """Return the time of the file system: that of a file which it has just written."""
        probe = self._temporary(uuid.uuid4().hex)
        try:
            probe.write_bytes(b"\n")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _write_new(path: Path, owner: Owner) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, owner.text())
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)  # such as a full disk
        raise
    finally:
        os.close(descriptor)


def breaking(lease: Place) -> Place:
    """Return the file that a process creates while it breaks a ``lease``."""
    return lease.with_name(_breaking_name(lease.name))


def _breaking_name(name: str) -> str:
    return f"{name}.breaking"
