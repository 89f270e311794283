"""Batches that threads read ahead into a ring of reused buffers, pinned if a GPU takes them; a batch is a number here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

Arrays = tuple[NDArray[Any], ...]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Buffer:
    """The shape and type of one array of a batch. ``on_host``: it is never copied to a GPU, and so never pinned."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    on_host: bool = False


@dataclass
class _Slot:
    """The memory of one batch, as tensors for the consumer and as arrays for the thread that fills it.

    Arrays, because torch releases the GIL at each call, and getting it back costs more than the call.
    """

    tensors: Tensors
    arrays: Arrays
    copy_done: torch.cuda.Event | None = None  # set if the consumer may have begun a copy to a GPU


class _Ring:
    """The slots of one reading thread: free ones go to the thread, filled ones (or its error) come back."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self.free: SimpleQueue[_Slot | None] = SimpleQueue()  # None: look at ``stopped``
        self.filled: SimpleQueue[_Slot | BaseException] = SimpleQueue()
        self.stopped = False
        for slot in slots:
            self.free.put(slot)


class Feed:
    """Runs a reading function ahead of its consumer, on ``threads`` threads, into the memory of ``buffers``.

    Up to ``prefetch`` batches are ready, rounded up to the same number for each thread; each thread also has one that it
    fills and one for the consumer: threads x (2 + ceil(prefetch / threads)) batches in all, allocated once.
    ``wait_seconds`` is how long the consumer has waited.
    """

    def __init__(self, buffers: Sequence[Buffer], *, threads: int, prefetch: int, pin: bool) -> None:
        self.threads = threads
        self.wait_seconds = 0.0
        self._pin = pin
        # In each ring one slot is the consumer's, one is being filled, the rest are ready, or a GPU still reads them.
        depth = 2 + -(-prefetch // threads)
        self._slots = [[_make_slot(buffers, pin) for _ in range(depth)] for _ in range(threads)]

    def run(self, read: Callable[[Arrays, int], None], numbers: Sequence[int]) -> Iterator[Tensors]:
        """Yield the filled buffers of each of ``numbers``, in their order; each is reused once the next is taken.

        ``read(arrays, number)`` fills the arrays; thread k runs it for every ``threads``-th number from the k-th on. Its
        errors are raised here, in turn.
        """
        rings = [_Ring(slots) for slots in self._slots]
        threads = [
            threading.Thread(target=_read_ahead, args=(ring, read, numbers[k :: self.threads]), daemon=True)
            for k, ring in enumerate(rings)
        ]
        for thread in threads:
            thread.start()
        try:
            for k in range(len(numbers)):
                ring = rings[k % self.threads]
                slot = self._take(ring)
                try:
                    yield slot.tensors
                finally:  # also if the consumer stops here: the next run uses the buffer again
                    if self._pin:
                        # A copy to the GPU may be in flight: it is over once the stream has passed this point.
                        slot.copy_done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                        slot.copy_done.record()
                ring.free.put(slot)
        finally:
            for ring in rings:
                ring.stopped = True
                ring.free.put(None)
            for thread in threads:
                thread.join()

    def _take(self, ring: _Ring) -> _Slot:
        start = time.perf_counter()
        taken = ring.filled.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(taken, BaseException):
            raise taken
        return taken


def _make_slot(buffers: Sequence[Buffer], pin: bool) -> _Slot:
    # NumPy asks the kernel for huge pages if an array is large; torch does not.
    tensors = [torch.from_numpy(np.empty(buffer.shape, buffer.dtype)) for buffer in buffers]
    if pin:
        tensors = [
            tensor if buffer.on_host else tensor.pin_memory() for tensor, buffer in zip(tensors, buffers, strict=True)
        ]
    return _Slot(tuple(tensors), tuple(tensor.numpy() for tensor in tensors))


def _read_ahead(ring: _Ring, read: Callable[[Arrays, int], None], numbers: Sequence[int]) -> None:
    """Read one batch after the other into free slots: main loop of a reader thread."""
    try:
        for number in numbers:
            slot = ring.free.get()
            if slot is None or ring.stopped:
                return
            if slot.copy_done is not None:
                slot.copy_done.synchronize()
            read(slot.arrays, number)
            ring.filled.put(slot)
    except BaseException as error:
        ring.filled.put(error)
