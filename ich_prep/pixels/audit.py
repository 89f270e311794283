"""What a slice's values say about it: range and mean in HU, what share of it is air or bone, and suspicious signs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.pixels.hounsfield import rescale_table
from ich_prep.windows import AIR_HU, HIGHEST_HU

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.pixels.hounsfield import Rescale

NOISE_ROWS = 16
NOISE_SHARE = 0.125

HISTOGRAM_BINS = 64
HISTOGRAM_BIN_HU = 64  # bin i counts HU from -1024 + 64 i up to, not including, -1024 + 64 (i + 1)
HISTOGRAM_STEP = 8  # rows and columns between the pixels that are counted
SOFT_TISSUE_HU = (-192, 192)  # bin edges: lung, air and foam lie below, calcified bone and metal above


@dataclass(frozen=True, slots=True)
class Audit:
    """What the values of one slice say, padding included, before any resize.

    ``hu_min``, ``hu_max`` and ``hu_mean`` are HU before they are clipped. ``hu_histogram``, int64 (64,), counts every 8th
    pixel of every 8th row in bins of 64 HU from -1024 to 3072, clipped, padding as air. Of these pixels ``share_air`` is
    the share below -192 HU, ``share_soft`` that from -192 up to 192 HU, ``share_bone`` that of 192 HU or more; they add up
    to 1. ``flags``: see ``audit``.
    """

    hu_min: float
    hu_max: float
    hu_mean: float
    share_air: float
    share_soft: float
    share_bone: float
    flags: tuple[str, ...]
    hu_histogram: NDArray[np.int64]


def audit(stored: NDArray[np.uint16], rescale: Rescale, limits: tuple[int, int], *, bits_stored: int) -> Audit:
    """Return the audit of a slice's ``stored`` values (rows, columns), repaired and masked; ``limits`` is their ``min_max``.

    Flags: ``constant`` (one value everywhere), ``noise`` (several rows in which neighbours differ on average by an eighth of
    the range of ``bits_stored``), ``clipped_high`` (a value above 3071 HU).
    """
    values = stored.view(np.int16) if rescale.signed else stored
    low, high = (limit * rescale.slope + rescale.intercept for limit in limits)
    flags = []
    if limits[0] == limits[1]:
        flags.append("constant")
    if high > HIGHEST_HU:
        flags.append("clipped_high")
    if _is_noisy(values, limits, bits_stored=bits_stored):
        flags.append("noise")
    counts = hu_histogram(stored, rescale)
    first, last = ((hu - AIR_HU) // HISTOGRAM_BIN_HU for hu in SOFT_TISSUE_HU)
    total = int(counts.sum())
    air, bone = int(counts[:first].sum()), int(counts[last:].sum())
    return Audit(
        hu_min=low,
        hu_max=high,
        hu_mean=cv2.sumElems(values)[0] / values.size * rescale.slope + rescale.intercept,
        share_air=air / total,
        share_soft=(total - air - bone) / total,
        share_bone=bone / total,
        flags=tuple(flags),
        hu_histogram=counts,
    )


def hu_histogram(stored: NDArray[np.uint16], rescale: Rescale) -> NDArray[np.int64]:
    """Return how many of every 8th pixel of every 8th row of ``stored`` (rows, columns) lie in each bin: int64 (64,)."""
    sample = np.ascontiguousarray(stored[::HISTOGRAM_STEP, ::HISTOGRAM_STEP])
    bins = cv2.LUT(sample, _bin_table(rescale))
    return np.bincount(bins.reshape(-1), minlength=HISTOGRAM_BINS)


@lru_cache(maxsize=64)
def _bin_table(rescale: Rescale) -> NDArray[np.uint8]:
    """Return the histogram bin of every stored value: uint8 (65536,), indexed by the value's bits as uint16."""
    table: NDArray[np.uint8] = ((rescale_table(rescale) - AIR_HU) // HISTOGRAM_BIN_HU).astype(np.uint8)
    return table


def _is_noisy(values: NDArray[np.integer], limits: tuple[int, int], *, bits_stored: int) -> bool:
    """Return whether at least two of about 16 rows look like noise: bits that were never pixels."""
    rough = NOISE_SHARE * 2**bits_stored
    if limits[1] - limits[0] <= rough or values.shape[1] == 1:
        return False
    rows = values[:: max(1, len(values) // NOISE_ROWS)]
    steps = cv2.absdiff(rows[:, 1:], rows[:, :-1])
    roughness = cv2.reduce(steps, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F)
    return int((roughness > rough).sum()) >= 2
