"""Measures one loader, in the same way for all: rate, checksum, memory.

Imports only NumPy: contenders that need other library versions run it in their own venv.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
CORES = 2
WINDOW = 0.25  # seconds
QUIET = 0.02  # stolen share of CPU time: one tick of two cores in a window
MAX_SLOWDOWN = 3  # times the requested seconds

# Endless batches, each epoch in another random order; and a function that reads given rows.
Opened = tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]


def random_batches(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield random batches of rows endlessly: each epoch a permutation."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for at in range(0, count - BATCH + 1, BATCH):
            yield order[at : at + BATCH]


def forever(loader: Any) -> Iterator[Any]:
    """Yield batches epoch after epoch."""
    while True:
        yield from loader


def race(open_: Callable[[], Opened], *, seconds: float, slices: int) -> None:
    """Print a loader's measurements as JSON, and end this process and its children.

    ``rate`` is in slices/s: ``steady_rate`` for ``seconds``, after a warm-up of equal length, or, if ``slices`` is not 0,
    from the first batch until that many have been read. ``first_batch`` is the time from opening, in seconds. ``memory``
    is that of this process and its children at the end, in bytes: private and shared, without the page cache.
    ``checksum`` is that of rows 0..63: all contenders must return the same pixels.
    """
    opening = time.perf_counter()
    batches, read = open_()
    next(batches)
    first = time.perf_counter() - opening
    if slices:
        count, start = 0, time.perf_counter()
        while count < slices:
            count += len(next(batches))
        rate = count / (time.perf_counter() - start)
    else:
        while time.perf_counter() - opening < first + seconds:
            next(batches)
        rate = steady_rate(batches, seconds)
    result = {
        "rate": rate,
        "first_batch": first,
        "memory": sum(map(memory_of, family(os.getpid()))),
        "checksum": zlib.crc32(np.ascontiguousarray(read(np.arange(BATCH))).tobytes()),
    }
    print(json.dumps(result), flush=True)
    for process in family(os.getpid())[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(0)


def steady_rate(batches: Iterator[Any], seconds: float) -> float:
    """Return slices/s over about ``seconds`` without stolen CPU time.

    Batches are timed in windows until those with almost no stolen time add up to ``seconds``, for at most three times as
    long. The windows with the least stolen time count.
    """
    windows: list[tuple[float, float, int]] = []  # share stolen, seconds, slices
    end = time.perf_counter() + MAX_SLOWDOWN * seconds
    while time.perf_counter() < end and sum(spent for share, spent, _ in windows if share <= QUIET) < seconds:
        before, start, count = core_time(), time.perf_counter(), 0
        while time.perf_counter() - start < WINDOW:
            count += len(next(batches))
        windows.append((stolen_since(before), time.perf_counter() - start, count))
    spent, count = 0.0, 0
    for _, more, slices in sorted(windows, key=lambda window: window[0]):
        if spent < seconds:
            spent, count = spent + more, count + slices
    return count / spent


def core_time() -> tuple[int, int]:
    """Return the stolen CPU time (given to other machines by the hypervisor) and all CPU time, in ticks: proc(5), stat."""
    numbers = list(map(int, Path("/proc/stat").read_text().split(None, 9)[1:9]))
    return numbers[7], sum(numbers)


def stolen_since(before: tuple[int, int]) -> float:
    """Return the share of CPU time stolen since ``core_time`` returned ``before``."""
    stolen, passed = core_time()
    return (stolen - before[0]) / max(1, passed - before[1])


def family(process: int) -> list[int]:
    """Return ``process`` and all its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            children += map(int, task.read_text().split())
    return [process, *(one for child in children for one in family(child))]


def memory_of(process: int) -> int:
    """Return the bytes of private and shared memory of ``process``; shared memory is split between its users."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):  # it has just ended
        return 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"])
