"""Who owns a lease: a process of some host, and whether it has certainly ended."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

STALE_SECONDS = 600.0  # after which a lease that nobody has rewritten is broken


class Lease(Protocol):
    """A file or an object that says who owns what: created exclusively, and rewritten while its owner runs."""

    def create(self, owner: Owner) -> None:
        """Write the lease where there is none; raises ``FileExistsError``."""

    def owner(self) -> Owner | None:
        """Return the owner that the lease names, None where there is no lease or it is not whole."""

    def may_be_broken(self) -> bool:
        """Return whether the owner is certainly gone: a process of this host that ended, or long without a sign of life."""

    def break_for(self, owner: Owner) -> None:
        """Remove the lease if it still may be broken, or make it that of ``owner``; one process at a time does that."""

    def refresh(self, owner: Owner) -> bool:
        """Write the lease again; return false where another one has it."""

    def remove(self) -> None:
        """Remove the lease."""


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
        return self.space == space_here() and started(self.process) != self.started

    def text(self) -> bytes:
        """Return what a lease says of this owner, and the time of this host."""
        return json.dumps({**asdict(self), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}).encode()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def owner_here() -> Owner:
    """Return this process as the owner of a new lease."""
    process = os.getpid()
    return Owner(socket.gethostname(), space_here(), process, started(process), uuid.uuid4().hex)


def owner_in(text: bytes) -> Owner | None:
    """Return the owner that the ``text`` of a lease names, None where it is not whole."""
    try:
        content = json.loads(text)
        return Owner(**{name: content[name] for name in Owner.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):
        return None


def space_here() -> str:
    """Return what identifies the boot of this machine and the process namespace; "" where that is not known."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(process: int) -> str:
    """Return when a process of this machine started, in the kernel's words; "" if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
