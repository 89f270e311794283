"""Memory that the parent and its decoding process share: files go one way and pixels the other without a copy."""

from __future__ import annotations

import fcntl
import mmap
import os


class SharedMemory:
    """Anonymous memory of a growing size, mapped by the process that made it and by its children, which get ``descriptor``.

    A child cannot shrink it: reading the mapping of a truncated file would end the parent.
    """

    def __init__(self, name: str) -> None:
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._mapping: mmap.mmap | None = None

    def view(self, size: int) -> memoryview:
        """Return the first ``size`` bytes, writable; views that were returned earlier stay valid."""
        if self._mapping is None or len(self._mapping) < size:
            capacity = max(mmap.PAGESIZE, size + size // 4)
            os.ftruncate(self.descriptor, capacity)
            self._mapping = mmap.mmap(self.descriptor, capacity)
        return memoryview(self._mapping)[:size]

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last view."""
        os.close(self.descriptor)
        self._mapping = None


class Attached:
    """The same memory in a child, by the descriptor that it inherited; to read only, unless ``writable``."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self._descriptor = descriptor
        self._access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._mapping: mmap.mmap | None = None

    def view(self, size: int) -> memoryview:
        """Return the first ``size`` bytes, which the parent has made available."""
        if self._mapping is None or len(self._mapping) < size:
            self._mapping = mmap.mmap(self._descriptor, size, access=self._access)
        return memoryview(self._mapping)[:size]
