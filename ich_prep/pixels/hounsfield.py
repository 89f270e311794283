"""Stored values -> HU -> window codes, by lookup tables over all 65,536 values of a 16-bit pixel.

A table is exact by construction, also with a fractional slope or padding. One lookup does rescale, clip and window
together, for up to four windows at a time: their codes are the bytes of one table entry.

Stored values are uint16 throughout: the 16 bits of the pixel, in two's complement if the values are signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.dataset.native import MAX_WINDOWS, window_codes_by_table
from ich_prep.dataset.windows import MAX_HU, MIN_HU, Window, window_table

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Rescale:
    """How the stored values of a slice become HU: stored value x ``slope`` + ``intercept`` (PS3.3 C.11.1.1.2).

    ``signed`` says how the 16 bits are read (PixelRepresentation). Stored values within ``padding``, both ends included,
    are outside the image (PS3.3 C.7.5.1.1.2) and become air, -1024 HU.
    """

    slope: float
    intercept: float
    signed: bool
    padding: tuple[int, int] | None = None


@lru_cache(maxsize=64)
def rescale_table(rescale: Rescale) -> NDArray[np.int16]:
    """Return the HU of every stored value: read-only int16 (65536,), indexed by the value's bits as uint16.

    Exact in float64, rounded half to even if the slope is fractional, clipped to -1024..3071 HU.
    """
    bits = np.arange(65536, dtype=np.uint16)
    stored = bits.view(np.int16) if rescale.signed else bits
    hu = np.rint(stored.astype(np.float64) * rescale.slope + rescale.intercept)
    table = np.clip(hu, MIN_HU, MAX_HU).astype(np.int16)
    if rescale.padding is not None:
        low, high = rescale.padding
        table[(stored >= low) & (stored <= high)] = MIN_HU
    table.flags.writeable = False
    return table


def apply_rescale(stored: NDArray[np.uint16], rescale: Rescale, *, out: NDArray[np.int16]) -> None:
    """Write the HU of ``stored`` (rows, columns) into ``out``, int16 of the same shape; see ``rescale_table``."""
    cv2.LUT(stored, rescale_table(rescale), dst=out)


def apply_rescale_and_windows(
    stored: NDArray[np.uint16], rescale: Rescale, *, windows: tuple[Window, ...], out: NDArray[np.uint8]
) -> None:
    """Write the window codes of ``stored`` (rows, columns) into ``out``, uint8 (windows, rows, columns), in one step.

    Raises ``ValueError`` if ``out`` has another shape or type.
    """
    _apply_packed(stored, windows, rescale, out)


def apply_windows(hu: NDArray[np.int16], *, windows: tuple[Window, ...], out: NDArray[np.uint8]) -> None:
    """Write the window codes of ``hu`` (rows, columns) into ``out``, uint8 (windows, rows, columns).

    Raises ``ValueError`` if ``out`` has another shape or type.
    """
    _apply_packed(hu.view(np.uint16), windows, None, out)


def _apply_packed(
    values: NDArray[np.uint16], windows: tuple[Window, ...], rescale: Rescale | None, out: NDArray[np.uint8]
) -> None:
    if len(out) != len(windows):
        raise ValueError(f"Expected out to be uint8 {(len(windows), *values.shape)}; got {out.dtype} {out.shape}.")
    for first in range(0, len(windows), MAX_WINDOWS):
        some = slice(first, first + MAX_WINDOWS)
        window_codes_by_table(values, _packed_codes(windows[some], rescale), out=out[some])


@lru_cache(maxsize=64)
def _packed_codes(windows: tuple[Window, ...], rescale: Rescale | None) -> NDArray[np.uint32]:
    """Return the codes of every 16-bit value, one byte for each of up to four windows, the first lowest: uint32 (65536,).

    With a ``rescale`` the values are stored values, without one they are HU.
    """
    codes = np.zeros((65536, MAX_WINDOWS), np.uint8)
    for index, window in enumerate(windows):
        codes[:, index] = window_table(window)
    if rescale is not None:
        codes = codes[rescale_table(rescale).view(np.uint16)]
    return codes.view("<u4").reshape(65536)
