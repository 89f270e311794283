"""Batches of whole scans, or of slabs of them, in the order of their slices: the content depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from ich_prep.errors import UsageError, count
from ich_train.epochs import EpochLoader
from ich_train.feed import Arrays, Buffer, Feed, Tensors
from ich_train.loader import opened, reading_threads
from ich_train.order import bucketed_positions, check_order, epoch_positions, rank_positions
from ich_train.scans import positions_mm, scan_labels, scans_of, slice_labels, spacings

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.scans import Scans

AIR = {"hu": -1024, "windows": 0}  # in the stored pixels


class Rows(Protocol):
    """What a value is read of for each row of a dataset: its images, or features of them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values."""

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> NDArray[Any]:
        """Fill ``out``, (len(rows), ...), with those of ``rows``."""


class VolumeBatch(NamedTuple):
    """Some scans, padded to the longest: views of a buffer that is reused once the next batch is taken.

    ``volumes``: (b, depth, channel, y, x), uint8 window codes or int16 HU, air where padded. ``labels``: (b, depth,
    classes) int8, those given for the slice, else -1. ``scan_labels``: (b, classes) int8, of the scan or the slab, -1
    where unknown. ``mask``: (b, depth) bool, true for slices, which come first. ``positions_mm``: (b, depth) float32,
    along the normal of the slices, from the first one here. ``spacing_mm``: (b, 3) float32, of the stored voxels along
    z, y and x, NaN where unknown. ``rows``: (b, depth) int64, the rows of the dataset, -1 where padded, and ``series``:
    (b,) int64, their series_row, both always on the CPU.
    """

    volumes: torch.Tensor
    labels: torch.Tensor
    scan_labels: torch.Tensor
    mask: torch.Tensor
    positions_mm: torch.Tensor
    spacing_mm: torch.Tensor
    rows: torch.Tensor
    series: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a training step takes: all but the series; the rows say which slices there are without asking a GPU."""
        return self[:-1]

    @property
    def slices(self) -> int:
        """How many slices there are, padding left out."""
        return int((self.rows >= 0).sum())


class _Plan(NamedTuple):
    """The items of a batch, and the depth to which they are padded."""

    items: NDArray[np.int64]
    depth: int


class VolumeLoader(EpochLoader[_Plan, VolumeBatch]):
    """Iterates over the batches of an epoch; each full pass moves on to the next epoch.

    ``dataset`` is an open dataset or its path. ``series`` are the volumes to visit by their ``series_row`` (default: all
    labelled ones), each with its rows that have pixels and a position, in the order of their positions; ``ordered`` is as
    in `ich_train.scans.scans_of`. ``slab`` cuts scans into slabs of that many slices, spread evenly so that they cover the
    scan; a shorter scan is one slab. ``order``, ``seed``, ``weights`` (one for each scan), ``rank`` and ``world_size``
    are as in `ich_train.loader.SliceLoader`; one batch of each rank together are one batch of a single process, padded
    alike. ``rows`` are those whose labels count (default: all): of the others there are only pixels, and a scan of which
    some do not count has no label, unless it was given for the whole series. With ``buckets``, batches that are not
    sequential hold scans of similar length. ``source`` (default: the
    images of the dataset) is what is read for each row, such as features. ``threads`` read ahead up to ``prefetch``
    batches; the buffers have room for ``batch_size`` of the longest scans, see `ich_train.feed.Feed`.

    Raises `UsageError` for volumes that are not in the dataset, no labelled volumes if none are named, an unknown order,
    and numbers out of range; `TypeError` for anything else as ``dataset``.
    """

    SETTINGS = ("batch_size", "order", "seed", "rank", "world_size", "drop_last", "slab", "buckets")

    def __init__(
        self,
        dataset: Dataset | str | Path,
        series: ArrayLike | None = None,
        batch_size: int = 2,
        order: str = "shuffled",
        seed: int = 0,
        threads: int = 2,
        *,
        slab: int = 0,
        buckets: bool = True,
        weights: NDArray[np.float64] | None = None,
        rows: NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch: int = 2,
        pin: bool | None = None,
        source: Rows | None = None,
        ordered: bool = True,
    ) -> None:
        if batch_size < 1 or threads < 1 or prefetch < 1 or slab < 0 or seed < 0:
            raise UsageError(
                "Expected batch_size, threads and prefetch of 1 or more and slab and seed of 0 or more; "
                f"got {batch_size}, {threads}, {prefetch}, {slab} and {seed}."
            )
        check_order(order, weighted=weights is not None)
        self.dataset = opened(dataset)
        self.scans = scans_of(self.dataset, series, ordered=ordered)
        if weights is not None and weights.shape != (len(self.scans),):
            raise UsageError(f"Expected a weight for each of {count(len(self.scans), 'scan')}; got {weights.shape}.")
        self.batch_size, self.order, self.seed, self.slab, self.buckets = batch_size, order, seed, slab, buckets
        self.weights, self.rank, self.world_size, self.drop_last = weights, rank, world_size, drop_last
        self._scan_of_item, self._starts, self._lengths = _items(self.scans, slab)
        self._source: Rows = self.dataset if source is None else source
        self._padding = AIR[self.dataset.spec.store] if source is None else 0
        self._labels = slice_labels(self.dataset)[self.scans.rows]
        if rows is not None:
            self._labels[~np.isin(self.scans.rows, rows)] = -1
        self._item_labels = self._labels_of_items(scan_labels(self.dataset, self.scans, rows))
        self._spacing = spacings(self.dataset, self.scans)
        self._positions = positions_mm(self.dataset, self.scans, self._spacing[:, 0])
        self.depth = int(self._lengths.max())  # of the longest item
        classes, flat = len(self.dataset.classes), batch_size * self.depth
        feed = Feed(
            (
                Buffer((flat, *self._source.shape[1:]), self._source.dtype),
                Buffer((flat, classes), np.int8),
                Buffer((batch_size, classes), np.int8),
                Buffer((flat,), np.bool_),
                Buffer((flat,), np.float32),
                Buffer((batch_size, 3), np.float32),
                Buffer((flat,), np.int64, on_host=True),
                Buffer((batch_size,), np.int64, on_host=True),
            ),
            threads=reading_threads(self.dataset, threads),
            prefetch=prefetch,
            pin=torch.cuda.is_available() if pin is None else pin,
        )
        super().__init__(feed)

    def __len__(self) -> int:
        share = len(self._lengths) // self.world_size
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    @property
    def items(self) -> int:
        """How many scans, or slabs, an epoch visits, of all ranks together."""
        return len(self._lengths)

    @property
    def has_slice_labels(self) -> bool:
        """Whether the label of any slice is known, and not only those of scans."""
        return bool((self._labels >= 0).any())

    @property
    def has_scan_labels(self) -> bool:
        """Whether the label of any scan or slab is known."""
        return bool((self._item_labels >= 0).any())

    @property
    def cuts_scans(self) -> bool:
        """Whether any scan is longer than a slab."""
        return self.items > len(self.scans)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "scans": len(self.scans), "rows": len(self.scans.rows)}

    def _batches(self) -> list[_Plan]:
        of_all = self.batch_size * self.world_size
        positions = self._ordered(of_all)
        return [self._plan(positions[at : at + of_all]) for at in range(0, len(self) * of_all, of_all)]

    def _ordered(self, of_all: int) -> NDArray[np.int64]:
        """Return the items of this epoch, (n,) int64, in the order that all ranks share; ``of_all`` make up a batch."""
        scans = self.scans
        positions = epoch_positions(
            scans.rows[scans.first[self._scan_of_item] + self._starts],
            order=self.order,
            seed=self.seed,
            epoch=self._epoch,
            rows_per_shard=self.dataset.spec.slices_per_shard,
            weights=None if self.weights is None else self.weights[self._scan_of_item],
        )
        if not self.buckets or self.order == "sequential":
            return positions
        return bucketed_positions(positions, self._lengths, batch_size=of_all, seed=self.seed, epoch=self._epoch)

    def _plan(self, together: NDArray[np.int64]) -> _Plan:
        """Return this rank's share of the batch of all ranks, padded to the same depth by each of them."""
        items = rank_positions(together, rank=self.rank, world_size=self.world_size)
        return _Plan(items, depth=int(self._lengths[together].max()))

    def _labels_of_items(self, of_scans: NDArray[np.int8]) -> NDArray[np.int8]:
        """Return the labels of the items, int8 (items, classes): those ``of_scans`` or, of slabs, of their slices.

        A slab is unknown unless its slices are labelled: one of a positive scan may have nothing to show, and those of
        negative scans alone would teach that there are no positive ones.
        """
        labels = of_scans[self._scan_of_item]
        for item in np.flatnonzero(self._lengths < self.scans.lengths[self._scan_of_item]):
            first = self.scans.first[self._scan_of_item[item]] + self._starts[item]
            slices = self._labels[first : first + self._lengths[item]]
            labels[item] = np.where((slices > 0).any(axis=0), 1, np.where((slices == 0).all(axis=0), 0, -1))
        return labels

    def _fill(self, arrays: Arrays, plan: _Plan) -> None:
        volumes, labels, of_scans, mask, positions, spacing, rows, series = arrays
        scans, (items, depth) = self.scans, plan
        of_items = self._scan_of_item[items]
        for k, (scan, start, length) in enumerate(
            zip(of_items.tolist(), self._starts[items].tolist(), self._lengths[items].tolist(), strict=True)
        ):
            first = int(scans.first[scan])
            taken = slice(first + start, first + start + length)
            at, end, padded = k * depth, k * depth + length, (k + 1) * depth
            self._source.read(scans.rows[taken], out=volumes[at:end])
            labels[at:end], rows[at:end], mask[at:end] = self._labels[taken], scans.rows[taken], True
            positions[at:end] = self._positions[taken] - self._positions[taken.start]
            volumes[end:padded], labels[end:padded], rows[end:padded] = self._padding, -1, -1
            mask[end:padded], positions[end:padded] = False, 0
        size = len(items)
        of_scans[:size], spacing[:size] = self._item_labels[items], self._spacing[of_items]
        series[:size] = scans.series[of_items]

    def _batch_of(self, tensors: Tensors, plan: _Plan) -> VolumeBatch:
        b, depth = len(plan.items), plan.depth
        by_slice = {0, 1, 3, 4, 6}  # in the order of the buffers
        return VolumeBatch(
            *(
                tensor[: b * depth].view(b, depth, *tensor.shape[1:]) if k in by_slice else tensor[:b]
                for k, tensor in enumerate(tensors)
            )
        )


def _items(scans: Scans, slab: int) -> Sequence[NDArray[np.int64]]:
    """Return for each item of an epoch its scan, the place in it where it starts, and its length, each (n,) int64."""
    if not slab:
        return np.arange(len(scans)), np.zeros(len(scans), np.int64), scans.lengths
    counts = -(-scans.lengths // slab)
    of_scan = np.repeat(np.arange(len(scans)), counts)
    number = np.arange(len(of_scan)) - np.repeat(np.cumsum(counts) - counts, counts)
    room = np.maximum(scans.lengths - slab, 0)[of_scan]
    starts = np.rint(number * room / np.maximum(counts[of_scan] - 1, 1)).astype(np.int64)
    return of_scan, starts, np.minimum(scans.lengths, slab)[of_scan]
