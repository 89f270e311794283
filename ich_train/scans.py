"""The scans of a dataset: which rows each has, in order, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import UsageError, count

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ich_prep.dataset.dataset import Dataset


@dataclass(frozen=True)
class Scans:
    """The volumes of a dataset that can be read as a sequence: rows with pixels and a position, in order.

    Scan i is the volume ``series[i]`` and has the rows ``rows[first[i] : first[i] + lengths[i]]``; none is empty.
    """

    series: NDArray[np.int64]  # (n,) series_row, ascending
    first: NDArray[np.int64]  # (n,)
    lengths: NDArray[np.int64]  # (n,)
    rows: NDArray[np.int64]  # all rows, scan by scan

    def __len__(self) -> int:
        return len(self.series)

    def of(self, scan: int) -> NDArray[np.int64]:
        """Return the rows of one scan."""
        return self.rows[self.first[scan] : self.first[scan] + self.lengths[scan]]


def scans_of(dataset: Dataset, series: ArrayLike | None = None, *, ordered: bool = True) -> Scans:
    """Return the volumes ``series``, integers of any type, as `Scans`; by default all that have a label.

    Rows whose status is not ok are left out, and so are those without a position, because their place in the scan is
    not known; unless ``ordered`` is false, as for predictions, of which each slice needs one. Raises `UsageError` for
    volumes that are not in the dataset, or that have no such row.
    """
    of_row = dataset.slices["series_row"].fill_null(-1).to_numpy().astype(np.int64)
    usable = dataset.is_ok & (of_row >= 0)
    if ordered:
        usable &= dataset.slices["position_mm"].is_valid().to_numpy()
    wanted = _labelled(dataset, of_row, usable) if series is None else _checked(dataset, series)
    rows = np.flatnonzero(usable & np.isin(of_row, wanted))
    found, first, lengths = np.unique(of_row[rows], return_index=True, return_counts=True)
    missing = np.setdiff1d(wanted, found)
    if len(missing):
        raise UsageError(
            f"{count(len(missing), 'volume')} of {dataset.path} cannot be read as a scan, such as series_row {missing[0]}: "
            f"no slice has {'both pixels and a position' if ordered else 'pixels'}. Leave them out."
        )
    if not len(found):
        raise UsageError(
            f"No scan of {dataset.path} has a label and slices with pixels and positions. Build again with --labels; to "
            "read scans without labels, name them by their series_row."
        )
    return Scans(found, first.astype(np.int64), lengths.astype(np.int64), rows)


def without_position(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of ``rows`` that have no position, and so no place in their scan."""
    positions = dataset.slices["position_mm"].take(pa.array(rows))
    lacking: NDArray[np.int64] = rows[positions.is_null().to_numpy()]
    return lacking


def slice_labels(dataset: Dataset) -> NDArray[np.int8]:
    """Return the labels of every row that were given for the slice, int8 (slices, classes), else -1.

    The labels of a whole series, study or patient say nothing about one of its slices.
    """
    of_slice = pc.equal(dataset.slices["label_level"], "slice").fill_null(False).to_numpy(zero_copy_only=False)
    labels: NDArray[np.int8] = np.where(of_slice[:, np.newaxis], dataset.labels, -1).astype(np.int8)
    return labels


def scan_labels(dataset: Dataset, scans: Scans, rows: NDArray[np.int64] | None = None) -> NDArray[np.int8]:
    """Return the labels of each scan, int8 (scans, classes), -1 where unknown.

    Positive if any of its slices is, negative if all of them are known to be; or as its series, study or patient is
    labelled. ``rows`` are those whose labels count (default: all): a scan is unknown if one of its slices has a label of
    its own that does not.
    """
    labels = dataset.labels[scans.rows]
    highest = np.maximum.reduceat(labels, scans.first, axis=0)
    all_known = np.logical_and.reduceat(labels >= 0, scans.first, axis=0)
    found: NDArray[np.int8] = np.where((highest > 0) | all_known, highest, -1).astype(np.int8)
    if rows is not None:
        left_out = (slice_labels(dataset)[scans.rows] >= 0).any(axis=1) & ~np.isin(scans.rows, rows)
        found[np.logical_or.reduceat(left_out, scans.first)] = -1
    return found


def spacings(dataset: Dataset, scans: Scans) -> NDArray[np.float32]:
    """Return the distance in mm of each scan's stored voxels along z, y and x, float32 (scans, 3), NaN where unknown.

    From the series table: along z the median distance of its slices; in the plane that of the source's pixels, times
    the longer side of the source over the stored side, because a slice is padded to a square and resized.
    """
    lines = dataset.series.take(pa.array(scans.series))

    def numbers(name: str) -> NDArray[np.float64]:
        values: NDArray[np.float64] = lines[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
        return values

    resized = np.fmax(numbers("source_rows"), numbers("source_columns")) / dataset.spec.size
    y, x = numbers("pixel_spacing_y_mm") * resized, numbers("pixel_spacing_x_mm") * resized
    return np.stack([numbers("slice_spacing_mm"), y, x], axis=1).astype(np.float32)


def positions_mm(dataset: Dataset, scans: Scans, spacing_mm: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the position of each of the scans' rows along the normal of its slices, float64 (rows,).

    A row without one is taken to be ``spacing_mm`` (scans,) above the row before, or 1 mm where that is not known.
    """
    found: NDArray[np.float64] = dataset.slices["position_mm"].fill_null(np.nan).to_numpy()
    positions = found[scans.rows]
    for scan in np.unique(np.searchsorted(scans.first, np.flatnonzero(np.isnan(positions)), side="right") - 1):
        rows = positions[scans.first[scan] : scans.first[scan] + scans.lengths[scan]]
        known = np.flatnonzero(~np.isnan(rows))
        last = int(known[-1]) if len(known) else 0  # those without come after those with one
        step = spacing_mm[scan] if np.isfinite(spacing_mm[scan]) else 1.0
        start = rows[last] if len(known) else 0.0
        rows[last:] = start + step * np.arange(len(rows) - last)
    return positions


def _labelled(dataset: Dataset, of_row: NDArray[np.int64], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    unlabelled = pc.equal(dataset.slices["label_level"], "none").fill_null(True).to_numpy(zero_copy_only=False)
    return np.unique(of_row[usable & ~unlabelled])


def _checked(dataset: Dataset, series: ArrayLike) -> NDArray[np.int64]:
    wanted = np.asarray(series)
    if wanted.ndim != 1 or not wanted.size or wanted.dtype.kind not in "iu":
        raise UsageError(
            f"Expected the series_row of one volume or more, integers of shape (n,); found {wanted.shape} {wanted.dtype}."
        )
    outside = wanted[(wanted < 0) | (wanted >= len(dataset.series))]
    if len(outside):
        raise UsageError(
            f"Expected a series_row of 0 to {len(dataset.series) - 1} of {dataset.path}; found {outside[0]}."
        )
    return np.unique(wanted).astype(np.int64)
