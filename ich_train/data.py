"""Rows in an order -> the chunks of a batch read together -> batches in reused buffers, pinned where there is a GPU.

Threads read ahead, each every n-th batch into a ring of its own; what a batch holds depends on the seed and the epoch
alone, not on their number.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from ich_prep.store import SLICES

from ich_prep.dataset.classes import RSNA_CLASSES, UNKNOWN
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import OK
from ich_prep.errors import UsageError
from ich_train.order import epoch_positions, rank_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

AHEAD = 2  # computations in the queue of a GPU while the host prepares the next


class Batch(NamedTuple):
    """Some slices: views of a buffer that is used again once the next batch is taken.

    ``images``: (b, channel x (2 context + 1), y, x), uint8 window codes or int16 HU; with context the slices below
    come first. ``labels``: (b, 6) int8, -1 where unknown. ``rows``: (b,) int64, the rows of the dataset.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor


def usable_rows(dataset: Dataset, *, allow_series_labels: bool = False) -> NDArray[np.int64]:
    """Return the rows whose status is ok and of which a label is known, ascending.

    Raises ``UsageError`` where there are none, or where labels are those of whole series, which are weak labels of its
    slices, unless allowed.
    """
    table = dataset.read_table(SLICES, ["status", "label_level"])
    ok = pc.equal(table["status"], OK).to_numpy(zero_copy_only=False)
    by_series = pc.equal(table["label_level"], "series").to_numpy(zero_copy_only=False)
    if by_series.any() and not allow_series_labels:
        raise UsageError(
            f"Expected labels of slices; {int(by_series.sum())} slices of {dataset.path} carry the label of their whole "
            "series. To take those as labels of each slice, set allow_series_labels = true in [train], or in Python give "
            "rows=usable_rows(dataset, allow_series_labels=True)."
        )
    labelled = pc.not_equal(table["label_level"], "none").to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(ok & labelled)
    if not len(rows):
        raise UsageError(
            f"Expected slices with labels in {dataset.path}; of its {len(ok)} slices {int(ok.sum())} have pixels, and none "
            "of these has a label. Build again with --labels; to read slices without labels, name their rows."
        )
    return rows


def read_labels(dataset: Dataset) -> NDArray[np.int8]:
    """Return the six labels of every row, int8 (slices, 6) in the order of ``CLASSES``, -1 where unknown."""
    table = dataset.read_table(SLICES, list(RSNA_CLASSES))
    return np.stack([table[name].fill_null(UNKNOWN).to_numpy() for name in RSNA_CLASSES], axis=1)


def neighbours(dataset: Dataset, rows: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Return for each of ``rows`` the rows from ``context`` below to ``context`` above in its series, (n, 2 context + 1).

    A neighbour that is not there, or whose status is not ok, is the nearest one towards the slice that is.
    """
    table = dataset.read_table(SLICES, ["status", "series_row"])
    ok = pc.equal(table["status"], OK).to_numpy(zero_copy_only=False)
    series = table["series_row"].to_numpy()
    found = np.repeat(rows[:, np.newaxis], 2 * context + 1, axis=1)
    for sign in (-1, 1):
        for distance in range(1, context + 1):
            wanted = rows + sign * distance
            inside = np.clip(wanted, 0, len(series) - 1)
            there = (inside == wanted) & (series[inside] == series[rows]) & ok[inside]
            nearer = found[:, context + sign * (distance - 1)]
            found[:, context + sign * distance] = np.where(there, wanted, nearer)
    return found


@dataclass
class _Slot:
    """One buffer of the ring, and what tells that a GPU has finished reading it.

    Its memory is a batch of tensors and, for the threads, the same as arrays: torch lets go of Python's lock at each
    call, and getting it back costs more than the call.
    """

    batch: Batch
    images: NDArray[Any]
    labels: NDArray[np.int8]
    rows: NDArray[np.int64]
    pinned: bool
    copied: Any = None


class _Ring:
    """The buffers of one reading thread: free ones go to the thread, filled ones (or what went wrong) come back."""

    def __init__(self, slots: list[_Slot]) -> None:
        self.free: SimpleQueue[_Slot | None] = SimpleQueue()  # None: look at ``stopped``
        self.filled: SimpleQueue[_Slot | BaseException] = SimpleQueue()
        self.stopped = False
        for slot in slots:
            self.free.put(slot)


class SliceLoader:
    """Iterates over the batches of an epoch; each full pass moves on to the next epoch.

    ``rows`` (default: all usable ones) are visited in the ``order`` "sequential", "shuffled" or "windowed" (see
    ``order.epoch_positions``), drawn by ``weights`` if given; of several ranks each visits its own share. ``context``
    neighbours below and above join as channels. ``threads`` read ahead up to ``prefetch`` batches, rounded up to as many
    for each, and beside those hold one that it fills and one for the consumer: threads x (2 + ceil(prefetch / threads))
    buffers of a batch. These are pinned when ``pin`` says so (default: where there is a GPU). ``wait_seconds`` is how
    long the consumer has waited for data.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64] | None = None,
        batch_size: int = 64,
        order: str = "shuffled",
        seed: int = 0,
        threads: int = 2,
        context: int = 0,
        *,
        weights: NDArray[np.float64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch: int = 4,
        pin: bool | None = None,
    ) -> None:
        if batch_size < 1 or threads < 1 or prefetch < 1 or context < 0:
            raise UsageError(
                "Expected batch_size, threads and prefetch of 1 or more and context of 0 or more; "
                f"got {batch_size}, {threads}, {prefetch} and {context}."
            )
        self.dataset = dataset
        self.rows = usable_rows(dataset) if rows is None else np.asarray(rows, np.int64)
        self.batch_size, self.order, self.seed, self.threads = batch_size, order, seed, threads
        self.weights, self.rank, self.world_size, self.drop_last = weights, rank, world_size, drop_last
        self.wait_seconds = 0.0
        self._epoch = self._batch = 0
        self._context = context
        self._labels = read_labels(dataset)[self.rows]
        self._neighbours = neighbours(dataset, self.rows, context) if context else self.rows[:, np.newaxis]
        pinned = torch.cuda.is_available() if pin is None else pin
        # In each ring one slot is the consumer's, one is being filled, the rest are ready, or a GPU still reads them.
        depth = 2 + -(-prefetch // threads)
        self._slots = [[self._make_slot(pinned) for _ in range(depth)] for _ in range(threads)]

    def __len__(self) -> int:
        share = len(self.rows) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Begin with ``epoch``, at its first batch."""
        self._epoch, self._batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: after the batches that were taken, in the order that these settings give."""
        return {"epoch": self._epoch, "batch": self._batch, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; raises ``UsageError`` where it belongs to other settings, and so to another order."""
        here = self._settings()
        different = [
            f"{name} was {state.get(name)} and is {here[name]}" for name in here if state.get(name) != here[name]
        ]
        if different:
            raise UsageError(
                f"Expected the state of a loader with the same settings; {'; '.join(different)}. Resume with the settings "
                "that the run began with."
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def __iter__(self) -> Iterator[Batch]:
        batches, first = self._batches(), self._batch
        rings = [_Ring(slots) for slots in self._slots]
        threads = [
            threading.Thread(target=self._read_ahead, args=(ring, batches[first + index :: self.threads]), daemon=True)
            for index, ring in enumerate(rings)
        ]
        for thread in threads:
            thread.start()
        try:
            for number in range(first, len(batches)):
                ring = rings[(number - first) % self.threads]
                slot, size = self._take(ring), len(batches[number])
                self._batch = number + 1
                if self._batch == len(batches):
                    self._epoch, self._batch = self._epoch + 1, 0
                try:
                    yield slot.batch if size == self.batch_size else Batch(*(tensor[:size] for tensor in slot.batch))
                finally:  # also where the consumer stops here: the next epoch uses the buffer again
                    if slot.pinned:
                        # A copy to the GPU may still be on its way: it is over once the stream has passed this point.
                        slot.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                        slot.copied.record()
                ring.free.put(slot)
        finally:
            for ring in rings:
                ring.stopped = True
                ring.free.put(None)
            for thread in threads:
                thread.join()

    def _settings(self) -> dict[str, Any]:
        names = ("batch_size", "order", "seed", "rank", "world_size", "drop_last")
        return {**{name: getattr(self, name) for name in names}, "rows": len(self.rows)}

    def _make_slot(self, pinned: bool) -> _Slot:
        channels, height, width = self.dataset.shape[1:]
        # NumPy asks the kernel for huge pages where an array is large; torch does not.
        images = torch.from_numpy(
            np.empty((self.batch_size, channels * (2 * self._context + 1), height, width), self.dataset.dtype)
        )
        labels = torch.empty((self.batch_size, len(RSNA_CLASSES)), dtype=torch.int8)
        rows = torch.empty(self.batch_size, dtype=torch.int64)
        if pinned:
            images, labels = images.pin_memory(), labels.pin_memory()
        return _Slot(Batch(images, labels, rows), images.numpy(), labels.numpy(), rows.numpy(), pinned)

    def _batches(self) -> list[NDArray[np.int64]]:
        """Return the positions, indices into ``rows``, of each batch of this epoch."""
        positions = epoch_positions(
            self.rows,
            order=self.order,
            seed=self.seed,
            epoch=self._epoch,
            rows_per_shard=self.dataset.spec.slices_per_shard,
            weights=self.weights,
        )
        mine = rank_positions(positions, rank=self.rank, world_size=self.world_size)
        return [mine[at : at + self.batch_size] for at in range(0, len(self) * self.batch_size, self.batch_size)]

    def _read_ahead(self, ring: _Ring, batches: list[NDArray[np.int64]]) -> None:
        """Read one of ``batches`` after the other into free slots: the life of a reading thread."""
        try:
            for positions in batches:
                slot = ring.free.get()
                if slot is None or ring.stopped:
                    return
                self._fill(slot, positions)
                ring.filled.put(slot)
        except BaseException as error:
            ring.filled.put(error)

    def _fill(self, slot: _Slot, positions: NDArray[np.int64]) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        size = len(positions)
        wanted = self._neighbours[positions].reshape(-1)
        self.dataset.read(wanted, out=slot.images[:size].reshape(len(wanted), *self.dataset.shape[1:]))
        slot.labels[:size] = self._labels[positions]
        slot.rows[:size] = self.rows[positions]

    def _take(self, ring: _Ring) -> _Slot:
        start = time.perf_counter()
        taken = ring.filled.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(taken, BaseException):
            raise taken
        return taken


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream in which batches travel to ``device``: memory is kept ready for each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def on_device(loader: SliceLoader, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of ``loader`` with images and labels on ``device``.

    On a GPU a batch travels in a stream of its own, while the one before it is computed. The host goes no further than
    ``AHEAD`` computations ahead: otherwise it would use up what the loader has ready, wait for buffers that the GPU
    still has to read, and count that as waiting for data. The loader uses a buffer again only after the computing
    stream, which waits for the copy, has come so far.
    """
    if device.type != "cuda":
        for batch in loader:
            yield Batch(batch.images.to(device), batch.labels.to(device), batch.rows)
        return
    copies, computing = _copy_stream(device), torch.cuda.current_stream(device)
    queued: deque[torch.cuda.Event] = deque()
    for batch in loader:
        with torch.cuda.stream(copies):
            images = batch.images.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
        computing.wait_stream(copies)
        for tensor in (images, labels):
            tensor.record_stream(computing)  # their memory is theirs until the computation is done with it
        yield Batch(images, labels, batch.rows)
        queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
        queued[-1].record(computing)
        if len(queued) > AHEAD:
            queued.popleft().synchronize()
    for computed in queued:
        computed.synchronize()


class SliceDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """The usable slices of a dataset for a ``torch.utils.data.DataLoader`` of one's own.

    Item i is (image, labels, row): uint8 or int16 (channel, y, x), int8 (6,), and the row. ``__getitems__`` reads a
    whole batch at once. It may be sent to worker processes: each opens the dataset for itself.
    """

    def __init__(self, path: str | Path, rows: NDArray[np.int64] | None = None) -> None:
        self.path = Path(path)
        dataset = open_dataset(self.path)
        self.rows = usable_rows(dataset) if rows is None else np.asarray(rows, np.int64)
        self._labels = read_labels(dataset)[self.rows]
        self._dataset: Dataset | None = dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Return the items of a batch: views of one array that is read at once."""
        if self._dataset is None:
            self._dataset = open_dataset(self.path)
        positions = np.asarray(indices, np.int64)
        images = torch.from_numpy(self._dataset.read(self.rows[positions]))
        labels = torch.from_numpy(self._labels[positions])
        return list(zip(images, labels, self.rows[positions].tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}
