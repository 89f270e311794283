"""Batches on their way to a GPU: copied in a separate stream, overlapped with computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch

from ich_train.loader import Batch
from ich_train.volume_loader import VolumeBatch

BatchT = TypeVar("BatchT", bound=Batch | VolumeBatch)

ON_HOST = frozenset({"rows", "series"})  # fields of a batch that stay on the CPU
MAX_QUEUED_STEPS = 2  # computations in the queue of a GPU while the host prepares the next


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that copies batches to ``device``: the allocator has a memory pool per stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_device(batches: Iterable[BatchT], device: torch.device) -> Iterator[BatchT]:
    """Yield ``batches`` with their pixels and labels on ``device``; their rows and series stay on the CPU.

    On a GPU a batch is copied in a separate stream, overlapped with the computation of the one before. The host runs no
    further than ``MAX_QUEUED_STEPS`` computations ahead: otherwise it would use up the loader's prefetched batches, wait
    for buffers that the GPU still has to read, and count that as waiting for data. The loader reuses a buffer only after
    the computing stream, which waits for the copy, has passed that point.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _moved(batch, device)
        return
    copies, computing = _copy_stream(device), torch.cuda.current_stream(device)
    queued: deque[torch.cuda.Event] = deque()
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = _moved(batch, device)
        computing.wait_stream(copies)
        for name in moved._fields:
            if name not in ON_HOST:
                getattr(moved, name).record_stream(computing)  # the allocator reuses it after the computation only
        yield moved
        queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        queued[-1].record(computing)
        if len(queued) > MAX_QUEUED_STEPS:
            queued.popleft().synchronize()
    for computed in queued:
        computed.synchronize()


def _moved(batch: BatchT, device: torch.device) -> BatchT:
    tensors = (
        tensor if name in ON_HOST else tensor.to(device, non_blocking=True)
        for name, tensor in zip(batch._fields, batch, strict=True)
    )
    return type(batch)(*tensors)
