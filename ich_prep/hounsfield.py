"""Stored values -> HU -> window codes, by tables over all 65,536 words that a 16-bit pixel can hold.

A table is exact by construction, for a fractional slope and for padding as for anything else, and one gather does the
work of rescale, clip and window together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.windows import AIR_HU, HIGHEST_HU, Window, window_table

if TYPE_CHECKING:
    from numpy.typing import NDArray


@lru_cache(maxsize=64)
def rescale_table(
    *, signed: bool, slope: float, intercept: float, padding: tuple[int, int] | None = None
) -> NDArray[np.int16]:
    """Return the HU of every 16-bit stored value: read-only int16 (65536,), indexed by the value seen as uint16.

    HU = stored value x slope + intercept (PS3.3 C.11.1.1.2), exact in float64, rounded half to even where the slope is
    fractional, and clipped to -1024..3071 HU. Stored values within ``padding``, both ends included, are no part of the
    image (PS3.3 C.7.5.1.1.2) and become air.
    """
    words = np.arange(65536, dtype=np.uint16)
    stored = words.view(np.int16) if signed else words
    hu = np.rint(stored.astype(np.float64) * slope + intercept)
    table = np.clip(hu, AIR_HU, HIGHEST_HU).astype(np.int16)
    if padding is not None:
        table[(stored >= padding[0]) & (stored <= padding[1])] = AIR_HU
    table.flags.writeable = False
    return table


@lru_cache(maxsize=64)
def _codes_of_stored(
    window: Window, signed: bool, slope: float, intercept: float, padding: tuple[int, int] | None
) -> NDArray[np.uint8]:
    hu = rescale_table(signed=signed, slope=slope, intercept=intercept, padding=padding)
    return window_table(window)[hu.view(np.uint16)]


def apply_rescale(
    words: NDArray[np.uint16],
    *,
    signed: bool,
    slope: float,
    intercept: float,
    padding: tuple[int, int] | None,
    out: NDArray[np.int16],
) -> None:
    """Write the HU of stored ``words`` (rows, columns) into ``out``, int16 of the same shape; see ``rescale_table``."""
    table = rescale_table(signed=signed, slope=slope, intercept=intercept, padding=padding)
    cv2.LUT(words, table, dst=out)


def apply_rescale_and_windows(
    words: NDArray[np.uint16],
    *,
    signed: bool,
    slope: float,
    intercept: float,
    padding: tuple[int, int] | None,
    windows: tuple[Window, ...],
    out: NDArray[np.uint8],
) -> None:
    """Write the codes of stored ``words`` (rows, columns) into ``out``, uint8 (windows, rows, columns), in one step."""
    for plane, window in zip(out, windows, strict=True):
        cv2.LUT(words, _codes_of_stored(window, signed, slope, intercept, padding), dst=plane)


def apply_windows(hu: NDArray[np.int16], *, windows: tuple[Window, ...], out: NDArray[np.uint8]) -> None:
    """Write the codes of ``hu`` (rows, columns) into ``out``, uint8 (windows, rows, columns)."""
    words = hu.view(np.uint16)
    for plane, window in zip(out, windows, strict=True):
        cv2.LUT(words, window_table(window), dst=plane)
