"""Pixels like CT: runs of any length that equal the row above, and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of slices, (channel, y, x): small and odd ones, some of one block, some of several.
SHAPES = [(1, 16, 16), (3, 16, 16), (1, 40, 40), (3, 61, 67), (1, 400, 401), (3, 300, 300), (2, 1, 64), (1, 70, 1)]


def picture(shape: tuple[int, ...], dtype: type, seed: int) -> NDArray[Any]:
    """Return a picture of ``shape``, a different one for each ``seed``."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(-1024, 3072, shape).astype(dtype)
    for _ in range(int(rng.integers(0, 12))):
        top, left = (int(rng.integers(0, side)) for side in shape[1:])
        bottom, right = (int(rng.integers(low, side)) + 1 for low, side in zip((top, left), shape[1:], strict=True))
        pixels[:, top:bottom, left:right] = rng.integers(-1024, 3072)
    return pixels
