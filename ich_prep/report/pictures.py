"""The pictures of a report: a seeded sample of slices, read once each, as small PNG files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.dataset.windows import window_table
from ich_prep.pixels.thumbnail import thumbnail_png

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset

SMALL, LARGE = 96, 160  # pixels a side
# All pictures of a page together: with noise, which PNG cannot compress, they still leave room for the rest of 5 MB.
MAX_SMALL, MAX_LARGE = 200, 36
READ_AT_ONCE = 16  # slices


def sample(
    rows: NDArray[np.int64], series_row: NDArray[np.int64], number: int, *, seed: int, name: str
) -> NDArray[np.int64]:
    """Return up to ``number`` of ``rows``, drawn by ``seed`` and ``name``, ascending; of each volume one at most."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = rng.permutation(rows)
    first = np.unique(series_row[drawn], return_index=True)[1]
    return np.sort(drawn[np.sort(first)[:number]])


def thumbnails(dataset: Dataset, rows: Iterable[int], size: int) -> dict[int, bytes]:
    """Return the PNG file of each of ``rows``, which must have pixels.

    It shows the first channel of a windows store, and the first window of an HU store.
    """
    wanted = sorted(set(map(int, rows)))
    found: dict[int, bytes] = {}
    for start in range(0, len(wanted), READ_AT_ONCE):
        batch = wanted[start : start + READ_AT_ONCE]
        codes = _codes(dataset, batch)
        found |= {row: thumbnail_png(picture, size) for row, picture in zip(batch, codes, strict=True)}
    return found


def _codes(dataset: Dataset, rows: Sequence[int]) -> NDArray[np.uint8]:
    pixels = dataset.read(rows)[:, 0]
    if dataset.spec.store == "windows":
        return pixels
    codes: NDArray[np.uint8] = window_table(dataset.spec.windows[0])[pixels.view(np.uint16)]
    return codes
