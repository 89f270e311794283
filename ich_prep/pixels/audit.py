"""Statistics of the stored values of slices: range and mean in HU, signs of damage, a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.dataset.schema import HISTOGRAM_BINS
from ich_prep.dataset.windows import MAX_HU, MIN_HU
from ich_prep.pixels.hounsfield import rescale_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.pixels.hounsfield import Rescale

NOISE_ROWS = 16
NOISE_SHARE = 0.125

HISTOGRAM_BIN_HU = 64  # bin i counts HU from -1024 + 64 i up to, but not including, -1024 + 64 (i + 1)
# Bins of air (below -512 HU), soft tissue (0 to 127 HU) and bone (from 320 HU).
AIR_BINS, SOFT_BINS, BONE_BINS = slice(0, 8), slice(16, 18), slice(21, 64)
# Bins of lung (-896 to -449 HU); what lies between pixels from -320 HU in a row is inside the body.
LUNG_BINS, BODY_BIN = (2, 9), 11
SAMPLED_SIDE = 16  # minimum number of pixels counted along the longer side: 256 in a slice of 512 x 512


@dataclass(frozen=True, slots=True)
class Audit:
    """Statistics of one slice: range and mean in HU before clipping, padding included, and flags.

    ``content_hash`` is that of the decoded values: equal for the same image under two names.
    """

    hu_min: float
    hu_max: float
    hu_mean: float
    content_hash: str
    flags: tuple[str, ...]


def audit(
    stored: NDArray[np.uint16],
    rescale: Rescale,
    limits: tuple[int, int],
    *,
    bits_stored: int,
    content_hash: str,
    flags: tuple[str, ...] = (),
) -> Audit:
    """Return the audit of a slice's ``stored`` values (rows, columns), repaired and masked; ``limits`` is their ``min_max``.

    To ``flags`` it adds ``constant`` (one value everywhere), ``clipped_high`` (a value above 3071 HU) and ``noise`` (several
    rows in which neighbours differ on average by an eighth of the range of ``bits_stored``).
    """
    values = stored.view(np.int16) if rescale.signed else stored
    low, high = limits
    slope, intercept = rescale.slope, rescale.intercept
    if low == high:
        flags = (*flags, "constant")
    if high * slope + intercept > MAX_HU:
        flags = (*flags, "clipped_high")
    if _is_noisy(values, limits, bits_stored=bits_stored):
        flags = (*flags, "noise")
    return Audit(
        hu_min=low * slope + intercept,
        hu_max=high * slope + intercept,
        hu_mean=cv2.sumElems(values)[0] / values.size * slope + intercept,
        content_hash=content_hash,
        flags=flags,
    )


def _is_noisy(values: NDArray[np.integer], limits: tuple[int, int], *, bits_stored: int) -> bool:
    """Return whether at least two of about 16 sampled rows look like noise rather than pixels."""
    rough = NOISE_SHARE * 2**bits_stored
    if limits[1] - limits[0] <= rough or values.shape[1] == 1:
        return False
    rows = values[:: max(1, len(values) // NOISE_ROWS)]
    steps = cv2.absdiff(rows[:, 1:], rows[:, :-1])
    roughness = cv2.reduce(steps, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)
    return int((roughness > rough).sum()) >= 2


@dataclass(frozen=True)
class Tissues:
    """What a sample of the pixels of n slices shows.

    ``shares``: float32 (n, 3), the shares of air, soft tissue and bone. ``body``: int64 (n,), pixels inside the body, and
    ``lung``: how many of them, and their four neighbours in the sample, are in the range of lung.
    """

    shares: NDArray[np.float32]
    body: NDArray[np.int64]
    lung: NDArray[np.int64]


class HuHistogram:
    """Counts HU over a sample of the pixels of slices: 64 bins of 64 HU, from -1024 to 3072.

    HU are clipped, and padding counts as air. The sample of a slice is every k-th pixel of every k-th row, from the first; k
    is the longer side divided by 16, rounded down, at least 1.
    """

    def __init__(self) -> None:
        self._bins: list[NDArray[np.uint8]] = []

    def add(self, stored: NDArray[np.uint16], rescale: Rescale) -> None:
        """Count the next slice: its ``stored`` values (rows, columns), repaired and masked."""
        step = max(1, max(stored.shape) // SAMPLED_SIDE)
        self._bins.append(_bin_table(rescale).take(stored[::step, ::step]))

    def counts(self) -> NDArray[np.int64]:
        """Return the counts of all slices together, int64 (64,)."""
        bins = np.concatenate([one.reshape(-1) for one in self._bins]) if self._bins else np.empty(0, np.uint8)
        return np.bincount(bins, minlength=HISTOGRAM_BINS)

    def tissues(self) -> Tissues:
        """Return what the samples show, slice by slice, in the order in which slices were added."""
        count = len(self._bins)
        result = Tissues(np.zeros((count, 3), np.float32), np.zeros(count, np.int64), np.zeros(count, np.int64))
        for shape in {one.shape for one in self._bins}:  # nearly always one
            which = [index for index, one in enumerate(self._bins) if one.shape == shape]
            bins = np.stack([self._bins[index] for index in which])
            for column, kind in enumerate((AIR_BINS, SOFT_BINS, BONE_BINS)):
                result.shares[which, column] = ((bins >= kind.start) & (bins < kind.stop)).mean(axis=(1, 2))
            tissue = bins >= BODY_BIN
            inside = np.logical_or.accumulate(tissue, axis=2)
            inside &= np.logical_or.accumulate(tissue[:, :, ::-1], axis=2)[:, :, ::-1]
            result.body[which] = inside.sum(axis=(1, 2))
            result.lung[which] = _interior(inside & (bins >= LUNG_BINS[0]) & (bins < LUNG_BINS[1])).sum(axis=(1, 2))
        return result


def _interior(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the elements of ``mask`` (n, rows, columns) whose four neighbours are in it, too: a rim of foam has none."""
    rows, columns = mask[:, 1:-1], mask[:, :, 1:-1]
    interior = np.zeros_like(mask)
    interior[:, 1:-1] = rows & mask[:, :-2] & mask[:, 2:]
    interior[:, :, 1:-1] &= columns & mask[:, :, :-2] & mask[:, :, 2:]
    interior[:, :, [0, -1]] = False
    return interior


@lru_cache(maxsize=64)
def _bin_table(rescale: Rescale) -> NDArray[np.uint8]:
    """Return the bin of every stored value: uint8 (65536,), indexed by the value's bits as uint16."""
    bins: NDArray[np.uint8] = ((rescale_table(rescale) - MIN_HU) // HISTOGRAM_BIN_HU).astype(np.uint8)
    return bins
