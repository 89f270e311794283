"""Turns a slice without resampling: rows and columns exchanged, or read from the other end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2

from ich_prep.dataset.affine import TURNS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def turn(stored: NDArray[np.uint16], name: str | None) -> NDArray[np.uint16]:
    """Return ``stored``, (rows, columns), after the turn ``name``, a key of ``TURNS``: C-contiguous.

    (columns, rows) if the turn exchanges them. ``stored`` is not changed; without a turn, "" or None, it is returned
    itself. Raises ``KeyError`` for an unknown name.
    """
    exchanged, from_last_column, from_last_row = TURNS[name or ""]
    turned: NDArray[np.uint16] = stored
    if from_last_column or from_last_row:
        about_both, about_columns, about_rows = -1, 1, 0
        turned = cv2.flip(
            turned,
            about_both if from_last_column and from_last_row else about_columns if from_last_column else about_rows,
        )  # type: ignore[assignment]
    if exchanged:
        turned = cv2.transpose(turned)  # type: ignore[assignment]
    return turned
