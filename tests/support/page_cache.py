"""Which pages of a file are in the page cache, and how to drop them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest


def pages_in_memory(path: Path) -> int:
    """Return how many pages of a file are in the page cache: mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        present = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, np.uint8)
        place, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None, use_errno=True).mincore(place, length, present)
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in present)


def evict(*paths: Path) -> None:
    """Drop files from the page cache; skips the test if their file system keeps them."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(pages_in_memory(path) for path in paths):
        pytest.skip(f"SKIPPED: the file system of {paths[0].parent} keeps all files in memory")
