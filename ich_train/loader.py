"""Batches of labelled slices in a random order: what a batch holds depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.errors import UsageError
from ich_train.epochs import EpochLoader
from ich_train.feed import Arrays, Buffer, Feed, Tensors
from ich_train.order import check_order, epoch_positions, rank_positions
from ich_train.rows import checked_rows, labelled_rows, neighbours

if TYPE_CHECKING:
    from numpy.typing import NDArray


FAR_THREADS = 8


class Batch(NamedTuple):
    """Some slices: views of a buffer that is reused once the next batch is taken.

    ``images``: (b, channel x (2 context + 1), y, x), uint8 window codes or int16 HU; with context the slices below
    come first. ``labels``: (b, classes) int8, -1 where unknown. ``rows``: (b,) int64, the rows of the dataset, always on
    the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a training step takes."""
        return self.images, self.labels

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return len(self.rows)


class SliceLoader(EpochLoader["NDArray[np.int64]", Batch]):
    """Iterates over the batches of an epoch; each full pass moves on to the next epoch.

    ``dataset`` is an open dataset or its path. ``rows`` (default: all labelled ones) are visited in the ``order``
    "sequential", "shuffled" or "windowed" (see ``order.epoch_positions``), drawn by ``weights`` if given; each of
    several ranks visits its own share. ``context`` neighbours below and above are added as channels. ``threads`` read
    ahead up to ``prefetch`` batches, in buffers as `ich_train.feed.Feed` describes, pinned if ``pin`` (default: if there
    is a GPU). ``wait_seconds`` is how long the consumer has waited for data.

    Raises `UsageError` for an unknown order, rows that are not rows of the dataset, a dataset without labelled slices if
    no rows are given, and numbers out of range; `TypeError` for anything else as ``dataset``.
    """

    SETTINGS = ("batch_size", "order", "seed", "rank", "world_size", "drop_last")

    def __init__(
        self,
        dataset: Dataset | str | Path,
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
        check_order(order, weighted=weights is not None)
        self.dataset = opened(dataset)
        self.rows = labelled_rows(self.dataset) if rows is None else checked_rows(self.dataset, rows)
        self.batch_size, self.order, self.seed = batch_size, order, seed
        self.weights, self.rank, self.world_size, self.drop_last = weights, rank, world_size, drop_last
        self._labels = self.dataset.labels[self.rows]
        self._read_rows = neighbours(self.dataset, self.rows, context) if context else self.rows[:, np.newaxis]
        channels, *sides = self.dataset.shape[1:]
        feed = Feed(
            (
                Buffer((batch_size, channels * (2 * context + 1), *sides), self.dataset.dtype),
                Buffer((batch_size, len(self.dataset.classes)), np.int8),
                Buffer((batch_size,), np.int64, on_host=True),
            ),
            threads=reading_threads(self.dataset, threads),
            prefetch=prefetch,
            pin=torch.cuda.is_available() if pin is None else pin,
        )
        super().__init__(feed)

    def __len__(self) -> int:
        share = len(self.rows) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    @property
    def items(self) -> int:
        """How many slices an epoch visits, of all ranks together."""
        return len(self.rows)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "rows": len(self.rows)}

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

    def _fill(self, arrays: Arrays, positions: NDArray[np.int64]) -> None:
        images, labels, rows = arrays
        size = len(positions)
        wanted = self._read_rows[positions].reshape(-1)
        self.dataset.read(wanted, out=images[:size].reshape(len(wanted), *self.dataset.shape[1:]))
        labels[:size] = self._labels[positions]
        rows[:size] = self.rows[positions]

    def _batch_of(self, tensors: Tensors, positions: NDArray[np.int64]) -> Batch:
        size = len(positions)
        return Batch(*(tensor[:size] for tensor in tensors) if size < self.batch_size else tensors)


class SliceDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """The labelled slices of a dataset for a ``torch.utils.data.DataLoader`` of your own.

    ``dataset`` is an open dataset or its path. Item i is (image, labels, row): uint8 or int16 (channel, y, x), int8
    (classes,), and the row. ``__getitems__`` reads a whole batch at once. It can be sent to worker processes: each opens
    the dataset for itself.
    """

    def __init__(self, dataset: Dataset | str | Path, rows: NDArray[np.int64] | None = None) -> None:
        self.dataset = opened(dataset)
        self.rows = labelled_rows(self.dataset) if rows is None else checked_rows(self.dataset, rows)
        self._labels = self.dataset.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Return the items of a batch: views of one array that is read at once."""
        positions = np.asarray(indices, np.int64)
        images = torch.from_numpy(self.dataset.read(self.rows[positions]))
        labels = torch.from_numpy(self._labels[positions])
        return list(zip(images, labels, self.rows[positions].tolist(), strict=True))


def reading_threads(dataset: Dataset, threads: int) -> int:
    """Return how many threads read: more than ``threads`` from an object store, where they wait for answers."""
    return max(threads, FAR_THREADS) if any(part.is_far for part in dataset.parts) else threads


def opened(dataset: Dataset | str | Path) -> Dataset:
    """Return ``dataset``, opened if it is a path; raises `TypeError` for anything else."""
    if isinstance(dataset, str | Path):
        return open_dataset(dataset)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected an open dataset or the path of one; found {type(dataset).__name__}.")
    return dataset
