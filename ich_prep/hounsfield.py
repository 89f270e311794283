"""Stored values -> HU -> window codes, by tables over all 65,536 words that a 16-bit pixel can hold.

A table is exact by construction, for a fractional slope and for padding as for anything else, and one gather does the
work of rescale, clip and window together: for up to four windows at a time, whose codes are the bytes of one entry.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.dataset.native import MAX_WINDOWS, window_codes_by_table
from ich_prep.dataset.windows import AIR_HU, HIGHEST_HU, Window, window_table

if TYPE_CHECKING:
    from numpy.typing import NDArray


_Rescale = tuple[bool, float, float, tuple[int, int] | None]  # signed, slope, intercept, padding


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
def _packed_codes(windows: tuple[Window, ...], rescale: _Rescale | None) -> NDArray[np.uint32]:
    """Return the codes of every word, a byte for each of up to four windows, the first one lowest: uint32 (65536,).

    The words are stored values with a ``rescale`` of signed, slope, intercept and padding, and HU without one.
    """
    codes = np.zeros((65536, MAX_WINDOWS), np.uint8)
    for index, window in enumerate(windows):
        codes[:, index] = window_table(window)
    if rescale is not None:
        signed, slope, intercept, padding = rescale
        hu = rescale_table(signed=signed, slope=slope, intercept=intercept, padding=padding)
        codes = codes[hu.view(np.uint16)]
    return codes.view("<u4").reshape(65536)


def _apply_packed(
    words: NDArray[np.uint16], windows: tuple[Window, ...], rescale: _Rescale | None, out: NDArray[np.uint8]
) -> None:
    if len(out) != len(windows):
        raise ValueError(f"Expected out to be uint8 {(len(windows), *words.shape)}; got {out.dtype} {out.shape}.")
    for first in range(0, len(windows), MAX_WINDOWS):
        some = slice(first, first + MAX_WINDOWS)
        window_codes_by_table(words, _packed_codes(windows[some], rescale), out=out[some])


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
    _apply_packed(words, windows, (signed, slope, intercept, padding), out)


def apply_windows(hu: NDArray[np.int16], *, windows: tuple[Window, ...], out: NDArray[np.uint8]) -> None:
    """Write the codes of ``hu`` (rows, columns) into ``out``, uint8 (windows, rows, columns)."""
    _apply_packed(hu.view(np.uint16), windows, None, out)
