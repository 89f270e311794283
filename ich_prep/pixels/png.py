"""Grey pictures as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def png_bytes(codes: NDArray[np.uint8]) -> bytes:
    """Return ``codes``, uint8 (y, x), as a grey PNG file with exactly these values."""
    _, data = cv2.imencode(".png", codes)
    return data.tobytes()
