"""Stored values from the decoder: their range, and unused bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def min_max(stored: NDArray[np.uint16], *, signed: bool) -> tuple[int, int]:
    """Return the least and the greatest of the ``stored`` values (rows, columns), given as their 16 bits."""
    low, high, _, _ = cv2.minMaxLoc(stored.view(np.int16) if signed else stored)
    return int(low), int(high)


def mask_unused_bits(
    stored: NDArray[np.uint16], *, bits_stored: int, signed: bool
) -> tuple[NDArray[np.uint16], tuple[int, int]]:
    """Return ``stored`` (rows, columns) without the bits above BitsStored, and the ``min_max`` of the result.

    Bits that are not stored are not part of the value (PS3.5 8.1.1); signed values are sign-extended to 16 bits. If no
    value has such bits, as is usual, ``stored`` itself is returned.
    """
    least, greatest = (-(1 << bits_stored - 1), (1 << bits_stored - 1) - 1) if signed else (0, (1 << bits_stored) - 1)
    low, high = min_max(stored, signed=signed)
    if least <= low and high <= greatest:
        return stored, (low, high)
    shift = 16 - bits_stored
    masked = ((stored << shift).view(np.int16) >> shift).view(np.uint16) if signed else stored & np.uint16(greatest)
    return masked, min_max(masked, signed=signed)
