"""Many reads of many files in one system call.

A thread that reads chunk after chunk gives Python's lock away at each, and has to wait for it as often. Linux AIO
(io_submit(2)) takes a list of reads: those from the page cache are done when the call returns. Where the kernel does not
let us, they are made one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_READS = 256  # of one call: /proc/sys/fs/aio-max-nr is shared by all processes


class _Numbers(NamedTuple):
    """Those of the system calls, which glibc has no functions for."""

    setup: int
    destroy: int
    getevents: int
    submit: int


_MACHINES = {"x86_64": _Numbers(206, 207, 208, 209), "aarch64": _Numbers(0, 1, 4, 2)}
_NUMBERS = _MACHINES.get(os.uname().machine) if ctypes.sizeof(ctypes.c_long) == 8 else None
_PREADV = 7  # IOCB_CMD_PREADV

# struct iocb of linux/aio_abi.h, on machines whose bytes are in little endian order.
_REQUEST = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("parts", "<u8"),
        ("part_count", "<u8"),
        ("start", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
_DATA, _RESULT = 0, 2  # of the four words of struct io_event
_PART_BYTES = 16  # struct iovec

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 6
_libc.syscall.restype = ctypes.c_long
_libc.preadv2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
_libc.preadv2.restype = ctypes.c_ssize_t


def read_many(
    descriptors: NDArray[np.int64], starts: NDArray[np.int64], parts: NDArray[np.int64], *, flags: int = 0
) -> NDArray[np.int64]:
    """Read from file ``descriptors[i]``, from byte ``starts[i]`` on, into the memory ``parts[i]``, for each i.

    ``parts`` (n, parts, 2) holds addresses and lengths (struct iovec); whoever calls keeps that memory alive, and the
    files open. ``flags`` are those of preadv2(2). Returns how many bytes each read found, int64 (n,), or the negative
    errno of what went wrong with it. Flags that the file system of one of them does not know may be refused for all.
    """
    parts = np.ascontiguousarray(parts, np.int64)
    found = np.empty(len(starts), np.int64)
    for first in range(0, len(starts), MOST_READS):
        some = slice(first, first + MOST_READS)
        context = _context()
        if context is None:
            found[some] = _one_by_one(descriptors[some], starts[some], parts[some], flags)
            continue
        try:
            found[some] = context.read(descriptors[some], starts[some], parts[some], flags)
        except BaseException:
            context.close()  # Ctrl-C, say: nothing may write into that memory any more
            raise
        _idle.append(context)
    return found


class _Context:
    """What the kernel keeps for a list of reads (io_setup(2)), for one thread at a time."""

    def __init__(self, numbers: _Numbers) -> None:
        """Raises ``OSError`` where the kernel gives none: a sandbox forbids it, or the machine's limit is used up."""
        handle = ctypes.c_ulong(0)
        code = _call(numbers.setup, MOST_READS, ctypes.addressof(handle))
        if code < 0:
            raise OSError(-code, os.strerror(-code))
        self._numbers, self._handle = numbers, handle.value
        self._requests = np.zeros(MOST_READS, _REQUEST)
        self._requests["data"] = np.arange(MOST_READS)
        self._requests["opcode"] = _PREADV
        self._pointers = address(self._requests) + _REQUEST.itemsize * np.arange(MOST_READS)
        self._events = np.empty((MOST_READS, 4), np.int64)
        self._at_pointers, self._at_events = address(self._pointers), address(self._events)

    def read(
        self, descriptors: NDArray[np.int64], starts: NDArray[np.int64], parts: NDArray[np.int64], flags: int
    ) -> NDArray[np.int64]:
        """As ``read_many``, for ``MOST_READS`` at most."""
        count = len(starts)
        requests = self._requests[:count]
        requests["descriptor"], requests["start"], requests["rw_flags"] = descriptors, starts, flags
        requests["parts"] = address(parts) + _PART_BYTES * parts.shape[1] * np.arange(count)
        requests["part_count"] = parts.shape[1]
        found = np.zeros(count, np.int64)
        again = []
        asked = under_way = 0
        while asked < count:
            taken = _call(self._numbers.submit, self._handle, count - asked, self._at_pointers + 8 * asked)
            if taken > 0:
                asked, under_way = asked + taken, under_way + taken
            elif taken == -errno.EOPNOTSUPP and flags:
                found[asked:] = taken
                break
            else:  # the first of them was refused: plain reads work on more than these do, and tell why they do not
                again.append(asked)
                asked += 1
        while under_way:
            done = _call(self._numbers.getevents, self._handle, under_way, under_way, self._at_events)
            if done == -errno.EINTR:
                continue
            if done < 0:
                raise OSError(-done, os.strerror(-done))
            events = self._events[:done]
            found[events[:, _DATA]] = events[:, _RESULT]
            under_way -= done
        again += (found == -errno.EINTR).nonzero()[0].tolist()
        if again:
            found[again] = _one_by_one(descriptors[again], starts[again], parts[again], flags)
        return found

    def close(self) -> None:
        """Wait for all reads that are under way, and let go of the kernel's memory."""
        _call(self._numbers.destroy, self._handle)


_idle: list[_Context] = []
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the process that made them


def _context() -> _Context | None:
    """Return a context that nobody uses, or None where there is none to be had."""
    with contextlib.suppress(IndexError):
        return _idle.pop()
    with contextlib.suppress(OSError):
        return _Context(_NUMBERS) if _NUMBERS is not None else None
    return None


def _call(number: int, *values: int) -> int:
    """Make a system call; return its result, or the negative errno."""
    return _or_errno(_libc.syscall(number, *values, *[0] * (5 - len(values))))


def _one_by_one(
    descriptors: NDArray[np.int64], starts: NDArray[np.int64], parts: NDArray[np.int64], flags: int
) -> NDArray[np.int64]:
    found = np.empty(len(starts), np.int64)
    for index, (descriptor, start) in enumerate(zip(descriptors.tolist(), starts.tolist(), strict=True)):
        count = -errno.EINTR
        while count == -errno.EINTR:
            count = _or_errno(_libc.preadv2(descriptor, address(parts[index]), parts.shape[1], start, flags))
        found[index] = count
    return found


def _or_errno(result: int) -> int:
    return result if result >= 0 else -ctypes.get_errno()


def address(array: NDArray[np.generic]) -> int:
    """Return where the memory of ``array`` begins."""
    return int(array.__array_interface__["data"][0])
