"""Small pictures of slices, as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray


def thumbnail_png(codes: NDArray[np.uint8], size: int) -> bytes:
    """Return a picture, uint8 (y, x) and square, as a PNG file of at most ``size`` pixels a side, averaged by area."""
    picture: NDArray[Any] = codes
    if len(codes) > size:
        picture = cv2.resize(codes, (size, size), interpolation=cv2.INTER_AREA)
    done, png = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done, "PNG has a form for every uint8 picture"
    return png.tobytes()
