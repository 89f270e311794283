"""(rows, columns) -> (size, size): padded to a square with air, then averaged down or interpolated up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from ich_prep.dataset.windows import MIN_HU

if TYPE_CHECKING:
    from numpy.typing import NDArray


def resize_hu(hu: NDArray[np.int16], *, out: NDArray[np.int16]) -> None:
    """Write ``hu`` (rows, columns) into ``out``, int16 (size, size).

    A slice that is not square is centred on a square of air (-1024 HU). It is then averaged by area if it shrinks
    and interpolated linearly if it grows, rounded to whole HU.
    """
    rows, columns = hu.shape
    side, size = max(rows, columns), out.shape[0]
    if rows != columns:
        square = np.full((side, side), MIN_HU, np.int16)
        top, left = (side - rows) // 2, (side - columns) // 2
        square[top : top + rows, left : left + columns] = hu
        hu = square
    if side == size:
        np.copyto(out, hu)
    else:
        cv2.resize(hu, (size, size), dst=out, interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
